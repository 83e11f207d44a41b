// d (+)= a b by a warpgroup on the tensor cores, beside its threads (PTX ISA: Asynchronous Warpgroup Level Matrix
// Instructions). sm_90a. d is 64×N with N a multiple of 16 up to 256, a 64×16, b 16×N, of f16 or bf16.
//
// With w the warp of the group, g = lane/4, t = lane%4:
//   d    d[4j], d[4j + 1] → row 16w + g, columns 8j + 2t + {0, 1};  d[4j + 2], d[4j + 3] → row 16w + g + 8
//   a    in registers: a[i] → row 16w + g + 8(i%2), columns 2t + 8(i/2) + {0, 1}
//
// The order of things: wgmma_fence, products, wgmma_commit, wgmma_wait. In between, d and a's registers are left alone and
// operands in shared memory stay as they are; products into the same d follow each other.
#pragma once

#include "element.cuh"
#ifndef ATTN_EMULATOR
#include "wgmma_registers.cuh"
#endif

namespace attn::ptx {

// Operand in shared memory under the 128-byte swizzle (16-byte chunk c of 128-byte row r at c ^ (r % 8)), in panels whose
// first row is at a multiple of 1024 bytes; `start` may lie inside (Matrix Descriptor). Distances are in bytes.
//
//   inner dimension along the 128 bytes   `rows_8` from 8 rows to the next 8; `panel` is not looked at
//   the other one along them              a row is one k; `rows_8` from 8 k to the next 8, `panel` from 64 columns to the
//                                         next 64
DEVICE uint64_t matrix_descriptor(const void* start, int rows_8, int panel) {
    uint64_t address = shared_address(start);
    return (address & 0x3ffff) >> 4 | uint64_t(panel >> 4) << 16 | uint64_t(rows_8 >> 4) << 32 | uint64_t(1) << 62;
}

// No instruction: what is computed from the result is computed behind this, where it would otherwise be moved out of loops
// and hold registers there.
DEVICE uint64_t here(uint64_t descriptor) {
#ifndef ATTN_EMULATOR
    asm volatile("" : "+l"(descriptor));
#endif
    return descriptor;
}

// How an operand lies in shared memory: along the inner dimension (k), or along its rows (a) or columns (b).
enum class Major { inner, outer };

template <class E>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

#ifdef ATTN_EMULATOR

// d = a b, plus d if it `accumulates`; both operands in shared memory.
template <class E, Major a_major, Major b_major, int Count>
void wgmma_m64k16(float (&d)[Count], uint64_t a, uint64_t b, bool accumulates) {
    emulator::wgmma({2 * Count, is_bf16<E>, accumulates, false, a_major == Major::outer, b_major == Major::outer, a, b},
                    d, nullptr);
}

// The same with a from registers.
template <class E, Major b_major, int Count>
void wgmma_m64k16(float (&d)[Count], const uint32_t (&a)[4], uint64_t b, bool accumulates) {
    emulator::wgmma({2 * Count, is_bf16<E>, accumulates, true, false, b_major == Major::outer, 0, b}, d, a);
}

#else

// For each size: the operands behind the sums, by number.
#define ATTN_WGMMA_SIZES(instruction) \
    instruction(1, "m64n16k16", "%8", "%9", "%10", "%11", "%12", "%13", "%14") \
    instruction(2, "m64n32k16", "%16", "%17", "%18", "%19", "%20", "%21", "%22") \
    instruction(3, "m64n48k16", "%24", "%25", "%26", "%27", "%28", "%29", "%30") \
    instruction(4, "m64n64k16", "%32", "%33", "%34", "%35", "%36", "%37", "%38") \
    instruction(5, "m64n80k16", "%40", "%41", "%42", "%43", "%44", "%45", "%46") \
    instruction(6, "m64n96k16", "%48", "%49", "%50", "%51", "%52", "%53", "%54") \
    instruction(7, "m64n112k16", "%56", "%57", "%58", "%59", "%60", "%61", "%62") \
    instruction(8, "m64n128k16", "%64", "%65", "%66", "%67", "%68", "%69", "%70") \
    instruction(9, "m64n144k16", "%72", "%73", "%74", "%75", "%76", "%77", "%78") \
    instruction(10, "m64n160k16", "%80", "%81", "%82", "%83", "%84", "%85", "%86") \
    instruction(11, "m64n176k16", "%88", "%89", "%90", "%91", "%92", "%93", "%94") \
    instruction(12, "m64n192k16", "%96", "%97", "%98", "%99", "%100", "%101", "%102") \
    instruction(13, "m64n208k16", "%104", "%105", "%106", "%107", "%108", "%109", "%110") \
    instruction(14, "m64n224k16", "%112", "%113", "%114", "%115", "%116", "%117", "%118") \
    instruction(15, "m64n240k16", "%120", "%121", "%122", "%123", "%124", "%125", "%126") \
    instruction(16, "m64n256k16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#define ATTN_WGMMA_SHARED_OF(type, blocks, shape, x0, x1, x2, x3, x4)                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " x2 ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" ATTN_SUMS_##blocks "}, " x0 \
                 ", " x1 ", p, 1, 1, " x3 ", " x4 ";\n}"                                                     \
                 : ATTN_OPERANDS_##blocks                                                                    \
                 : "l"(a), "l"(b), "r"(int(accumulates)), "n"(int(a_major)), "n"(int(b_major)))
#define ATTN_WGMMA_SHARED(blocks, shape, x0, x1, x2, x3, x4, x5, x6)                       \
    if constexpr (Count == 8 * blocks) {                                                   \
        if constexpr (is_bf16<E>) ATTN_WGMMA_SHARED_OF("bf16", blocks, shape, x0, x1, x2, x3, x4); \
        else ATTN_WGMMA_SHARED_OF("f16", blocks, shape, x0, x1, x2, x3, x4);                \
    }

#define ATTN_WGMMA_REGISTERS_OF(type, blocks, shape, x0, x1, x2, x3, x4, x5, x6)                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " x5 ", 0;\n"                                             \
                 "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" ATTN_SUMS_##blocks "}, {" x0 \
                 ", " x1 ", " x2 ", " x3 "}, " x4 ", p, 1, 1, " x6 ";\n}"                                     \
                 : ATTN_OPERANDS_##blocks                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulates)), "n"(int(b_major)))
#define ATTN_WGMMA_REGISTERS(blocks, shape, x0, x1, x2, x3, x4, x5, x6)                                       \
    if constexpr (Count == 8 * blocks) {                                                                     \
        if constexpr (is_bf16<E>) ATTN_WGMMA_REGISTERS_OF("bf16", blocks, shape, x0, x1, x2, x3, x4, x5, x6); \
        else ATTN_WGMMA_REGISTERS_OF("f16", blocks, shape, x0, x1, x2, x3, x4, x5, x6);                       \
    }

template <class E, Major a_major, Major b_major, int Count>
DEVICE void wgmma_m64k16(float (&d)[Count], uint64_t a, uint64_t b, bool accumulates) {
    static_assert(Count % 8 == 0 && Count <= 128, "a multiple of 16 columns, up to 256");
    ATTN_WGMMA_SIZES(ATTN_WGMMA_SHARED)
}

template <class E, Major b_major, int Count>
DEVICE void wgmma_m64k16(float (&d)[Count], const uint32_t (&a)[4], uint64_t b, bool accumulates) {
    static_assert(Count % 8 == 0 && Count <= 128, "a multiple of 16 columns, up to 256");
    ATTN_WGMMA_SIZES(ATTN_WGMMA_REGISTERS)
}

#endif

// After ordinary code has touched registers that products use, and before the first of these.
DEVICE void wgmma_fence() {
#ifdef ATTN_EMULATOR
    emulator::wgmma_fence();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of products since the last commit.
DEVICE void wgmma_commit() {
#ifdef ATTN_EMULATOR
    emulator::wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most N groups are under way.
template <int N>
DEVICE void wgmma_wait() {
#ifdef ATTN_EMULATOR
    emulator::wgmma_wait(N);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// What `bits` is made of is computed before what is waited for behind this; otherwise the assembler moves the wait up. A
// fence that is not executed: the bits are those of numbers of which none is negative, so they are never all set, not even
// with NaN, which the device's arithmetic makes without a sign.
DEVICE void compute_before_wait(uint32_t bits) {
#ifdef ATTN_EMULATOR
    (void)bits;
#else
    asm volatile("{\n.reg .pred are_set;\nsetp.eq.u32 are_set, %0, 0xffffffff;\n@are_set membar.cta;\n}" ::"r"(bits)
                 : "memory");
#endif
}

// No instruction: keeps accesses to a register of a product on their side of the fence or wait beside this.
template <int Count>
DEVICE void wgmma_registers(float (&d)[Count]) {
#ifdef ATTN_EMULATOR
    (void)d;
#else
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// The same for a left operand.
template <int Count>
DEVICE void wgmma_registers(uint32_t (&a)[Count]) {
#ifdef ATTN_EMULATOR
    (void)a;
#else
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(a[i])::"memory");
#endif
}

}  // namespace attn::ptx
