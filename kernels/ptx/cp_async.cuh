// Copies from global to shared memory that run beside the thread (PTX ISA: Asynchronous Data Movement, cp.async).
#pragma once

#include "device.cuh"

namespace attn::ptx {

// 16 bytes, both addresses 16-byte aligned. When not `present`, 16 zero bytes are written and `global` is not touched.
DEVICE void cp_async_16(void* shared, const void* global, bool present) {
#ifdef ATTN_EMULATOR
    emulator::copy_async(shared, global, present);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(present ? 16 : 0)
                 : "memory");
#endif
}

// Closes the thread's group of copies since the last commit.
DEVICE void cp_async_commit() {
#ifdef ATTN_EMULATOR
    emulator::copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of the thread's own groups are in flight; other threads need a barrier after it.
template <int N>
DEVICE void cp_async_wait() {
#ifdef ATTN_EMULATOR
    emulator::copy_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace attn::ptx
