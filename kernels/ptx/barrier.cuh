// Barriers of a block and of a warp (PTX ISA: Parallel Synchronization, bar and bar.warp.sync).
#pragma once

#include "index.cuh"

namespace attn::ptx {

// Waits for every thread of the block; shared and global writes before it are seen after it.
DEVICE void barrier_sync() {
#ifdef ATTN_EMULATOR
    emulator::barrier(0, threads());
#else
    asm volatile("bar.sync 0;" ::: "memory");
#endif
}

// Named barrier `id` in 1..15 of `count` threads, a multiple of 32.
DEVICE void barrier_sync(int id, int count) {
#ifdef ATTN_EMULATOR
    emulator::barrier(id, count);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

// Counts as a thread at named barrier `id`, without waiting there (bar.arrive).
DEVICE void barrier_arrive(int id, int count) {
#ifdef ATTN_EMULATOR
    emulator::barrier_arrive(id, count);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

// Waits for the 32 threads of the warp and orders their memory accesses. Shuffles and mma order none.
DEVICE void warp_sync() {
#ifdef ATTN_EMULATOR
    emulator::warp_barrier();
#else
    asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
#endif
}

}  // namespace attn::ptx
