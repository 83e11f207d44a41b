// Roles of warps and warpgroups, four warps each (PTX ISA: Miscellaneous Instructions, setmaxnreg; Parallel
// Synchronization, elect.sync). sm_90.
#pragma once

#include "shuffle.cuh"

namespace attn::ptx {

// The thread's warpgroup, known to the compiler as the same for the whole warp.
DEVICE int warpgroup() { return shuffle(thread() / 128, 0); }

// True in one lane of the warp, whose lanes all ask, and the same one each time.
DEVICE bool elect() {
#ifdef ATTN_EMULATOR
    return lane() == emulator::elected_lane();
#else
    uint32_t is_elected;
    asm volatile(
        "{\n.reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, elected;\n}"
        : "=r"(is_elected));
    return is_elected;
#endif
}

// Gives registers of the warpgroup's threads back, down to Count each, a multiple of 8 in 24..256. The block has a fixed
// number of them: those that it was launched with.
template <int Count>
DEVICE void setmaxnreg_dec() {
#ifdef ATTN_EMULATOR
    emulator::set_registers(Count, false);
#else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// Takes registers for the warpgroup's threads, up to Count each; waits until the block has them.
template <int Count>
DEVICE void setmaxnreg_inc() {
#ifdef ATTN_EMULATOR
    emulator::set_registers(Count, true);
#else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

}  // namespace attn::ptx
