// Copies of boxes of a tensor by the copy engine (PTX ISA: Asynchronous Data Movement, cp.async.bulk.tensor). sm_90.
#pragma once

#include "mbarrier.cuh"

namespace attn::ptx {

// A tensor of four dimensions in global memory, the box that a copy moves and how it lies in shared memory: a CUtensorMap,
// which the launch writes into the kernel's parameters. Aligned as newer toolkits' documentation asks.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

// The box at `at` (innermost dimension first) to `shared`, at a multiple of 1024 bytes; its bytes count for the phase of
// `barrier` that is under way. Elements outside the tensor are zero, and count. `map` is part of the kernel's parameters.
// By one thread.
DEVICE void tensor_load(void* shared, const TensorMap& map, Mbarrier* barrier, const int (&at)[4]) {
#ifdef ATTN_EMULATOR
    emulator::tensor_load(shared, &map, barrier, at);
#else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
#endif
}

// Before the thread's ordinary writes to shared memory are read by the copy engine or by wgmma, which a barrier must
// follow (fence.proxy.async).
DEVICE void fence_proxy_async() {
#ifdef ATTN_EMULATOR
    emulator::fence_proxy_async();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace attn::ptx
