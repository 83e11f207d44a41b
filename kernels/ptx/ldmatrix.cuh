// Loads 8×8 matrices of 16-bit elements from shared memory (PTX ISA: Warp Level Matrix Instructions, ldmatrix).
// Lane 8i + r passes the 16-byte aligned address of row r of matrix i. Lane l receives of matrix i, in r[i], row l/4,
// columns 2(l%4) + {0, 1}; with _trans row 2(l%4) + {0, 1}, column l/4. x2 reads the addresses of lanes 0..15.
#pragma once

#include "device.cuh"

namespace attn::ptx {

DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef ATTN_EMULATOR
    emulator::ldmatrix(r, row, 4, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef ATTN_EMULATOR
    emulator::ldmatrix(r, row, 4, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#ifdef ATTN_EMULATOR
    emulator::ldmatrix(r, row, 2, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#ifdef ATTN_EMULATOR
    emulator::ldmatrix(r, row, 2, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

}  // namespace attn::ptx
