// Barriers in shared memory that count arrivals, and bytes that copies have written (PTX ISA: Parallel Synchronization,
// mbarrier). sm_90.
//
// A phase ends when all arrivals have been made and as many bytes written as were announced; the next one, of the other
// parity, begins at once. The first has parity 0.
#pragma once

#include "device.cuh"

namespace attn::ptx {

struct Mbarrier {
    uint64_t state;
};

// By one thread, before any other uses it: fence_mbarrier_init and a barrier of the block lie between.
DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
#ifdef ATTN_EMULATOR
    emulator::mbarrier_init(barrier, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes initialised barriers known to the copy engine (membar/fence, fence.mbarrier_init).
DEVICE void fence_mbarrier_init() {
#ifndef ATTN_EMULATOR
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// What the thread did before is seen by those that wait for the phase.
DEVICE void mbarrier_arrive(Mbarrier* barrier) {
#ifdef ATTN_EMULATOR
    emulator::mbarrier_arrive(barrier, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// The same, and announces bytes of copies that the phase also waits for.
DEVICE void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
#ifdef ATTN_EMULATOR
    emulator::mbarrier_arrive(barrier, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// Whether the phase of this parity has ended; waits for a while before it says no.
DEVICE bool mbarrier_try_wait_parity(Mbarrier* barrier, int parity) {
#ifdef ATTN_EMULATOR
    emulator::mbarrier_wait(barrier, parity);
    return true;
#else
    uint32_t is_over;
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(is_over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return is_over;
#endif
}

}  // namespace attn::ptx
