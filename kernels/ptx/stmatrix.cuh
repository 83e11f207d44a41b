// Stores 8×8 matrices of 16-bit elements to shared memory (PTX ISA: Warp Level Matrix Instructions, stmatrix). sm_90.
// Lane 8i + r passes the 16-byte aligned address of row r of matrix i. Lane l gives of matrix i, in r[i], row l/4,
// columns 2(l%4) + {0, 1}; with _trans row 2(l%4) + {0, 1}, column l/4.
#pragma once

#include "device.cuh"

namespace attn::ptx {

DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
#ifdef ATTN_EMULATOR
    emulator::stmatrix(row, r, false);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
#ifdef ATTN_EMULATOR
    emulator::stmatrix(row, r, true);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

}  // namespace attn::ptx
