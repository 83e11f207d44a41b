// d += a b by a full warp on the tensor cores (PTX ISA: Warp Level Matrix Instructions, mma).
// With g = lane/4, t = lane%4:
//   d (16×8)    d[0], d[1] → row g, columns 2t + {0, 1};  d[2], d[3] → row g + 8 (f64: 8×8, only the first two)
//   a (16×k)    k 16: a[i] → row g + 8(i%2), columns 2t + 8(i/2) + {0, 1};  k 8: row g + 8(i%2), column t + 4(i/2)
//   b (k×8)     k 16: b[i] → rows 2t + 8i + {0, 1}, column g;               k 8: row t + 4i, column g
//   f64, k 4    a → row g, column t;  b → row t, column g
#pragma once

#include "element.cuh"

namespace attn::ptx {

DEVICE void mma_m16n8k16(f16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef ATTN_EMULATOR
    emulator::mma(emulator::Operation::mma_f16, d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma_m16n8k16(bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef ATTN_EMULATOR
    emulator::mma(emulator::Operation::mma_bf16, d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Operands are the bits of floats; the low 13 are ignored, so round first (round_to_tf32).
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef ATTN_EMULATOR
    emulator::mma(emulator::Operation::mma_tf32, d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma_m8n8k4_f64(double (&d)[2], double a, double b) {
#ifdef ATTN_EMULATOR
    emulator::mma(emulator::Operation::mma_f64, d, &a, &b);
#else
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(d[0]), "+d"(d[1])
                 : "d"(a), "d"(b));
#endif
}

}  // namespace attn::ptx
