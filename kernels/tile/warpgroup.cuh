// Products of a warpgroup that run beside its threads: operands are tiles of 16-bit elements in shared memory
// (SwizzledTile, at a multiple of 1024 bytes), the left one also rows in registers; sums are those of 64 rows, 16 for each
// warp, in the layout of Accumulator.
//
// Sums and rows in registers are left alone, and tiles stay as they are, from multiply_beside to the wait.
#pragma once

#include "../ptx/warpgroup.cuh"
#include "../ptx/wgmma.cuh"
#include "native.cuh"

namespace attn::tile {

template <int N>
using WarpgroupSums = Accumulator<float, 1, N / 8>;

// First of the warp's rows among the warpgroup's.
DEVICE int first_row_of_warp() { return 16 * (ptx::warp() % 4); }

template <int N>
DEVICE float (&registers_of(Accumulator<float, 1, N>& sums))[4 * N] {
    return reinterpret_cast<float(&)[4 * N]>(sums.value);
}

// Columns 64 i … 64 i + 63 of sums.
template <int N>
DEVICE const WarpgroupSums<64>& columns_of(const Accumulator<float, 1, N>& sums, int i) {
    return reinterpret_cast<const WarpgroupSums<64>&>(sums.value[0][8 * i]);
}

// An operand whose inner dimension runs along the columns of a tile of `Rows` rows: the left one from row `row` on, or the
// right one, stored as its transpose.
template <class E, int Rows>
struct AlongColumns {
    using Element = E;
    static constexpr ptx::Major kMajor = ptx::Major::inner;
    uint64_t first;

    DEVICE explicit AlongColumns(const Element* tile, int row = 0)
        : first(ptx::matrix_descriptor(tile + row * kPanelColumns, 1024, 0)) {}

    DEVICE AlongColumns here() const {
        AlongColumns copy = *this;
        copy.first = ptx::here(first);
        return copy;
    }

    // Of columns k … k + 15.
    DEVICE uint64_t at(int k) const { return first + (k / 64 * Rows * 128 + k % 64 * 2) / 16; }
};

// An operand whose inner dimension runs along the rows of a tile of `Rows` rows: the right one from column `column` on, or
// the left one, stored as its transpose. `column` is a multiple of 64.
template <class E, int Rows>
struct AlongRows {
    using Element = E;
    static constexpr ptx::Major kMajor = ptx::Major::outer;
    uint64_t first;

    DEVICE explicit AlongRows(const Element* tile, int column = 0)
        : first(ptx::matrix_descriptor(tile + column * Rows, 1024, Rows * 128)) {}

    DEVICE AlongRows here() const {
        AlongRows copy = *this;
        copy.first = ptx::here(first);
        return copy;
    }

    // Of rows k … k + 15.
    DEVICE uint64_t at(int k) const { return first + k * 128 / 16; }
};

// 64 rows × N columns in registers, as left operand.
template <class Element, int N>
struct PackedRows {
    uint32_t value[N / 16][4];

    // Sums, rounded.
    DEVICE void set(const WarpgroupSums<N>& sums) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            const float(&x)[4] = sums.value[0][n];
            value[n / 2][n % 2 * 2] = ptx::pack<Element>(x[0], x[1]);
            value[n / 2][n % 2 * 2 + 1] = ptx::pack<Element>(x[2], x[3]);
        }
    }

    DEVICE WarpgroupSums<N> widened() const {
        WarpgroupSums<N> sums;
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            float(&x)[4] = sums.value[0][n];
            ptx::unpack<Element>(value[n / 2][n % 2 * 2], x[0], x[1]);
            ptx::unpack<Element>(value[n / 2][n % 2 * 2 + 1], x[2], x[3]);
        }
        return sums;
    }
};

// Sums, rounded to elements.
template <class Element, int Blocks>
DEVICE void round_to(Accumulator<float, 1, Blocks>& sums) {
    PackedRows<Element, 8 * Blocks> packed;
    packed.set(sums);
    sums = packed.widened();
}

// sums = left · right over `Inner` (a multiple of 16), plus what they were if it `accumulates`: a group of products of
// its own, for wait_products. Operands are AlongColumns or AlongRows.
template <int Inner, int N, class Left, class Right>
DEVICE void multiply_beside(Accumulator<float, 1, N>& sums, const Left& left, const Right& right, bool accumulates) {
    ptx::wgmma_registers(registers_of(sums));
    ptx::wgmma_fence();
    auto a = left.here();
    auto b = right.here();
#pragma unroll
    for (int k = 0; k < Inner; k += 16) {
        ptx::wgmma_m64k16<typename Left::Element, Left::kMajor, Right::kMajor>(registers_of(sums), a.at(k), b.at(k),
                                                                               accumulates || k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_registers(registers_of(sums));
}

// The same with the left operand in registers.
template <class Element, int Inner, int N, class Right>
DEVICE void multiply_beside(Accumulator<float, 1, N>& sums, PackedRows<Element, Inner>& left, const Right& right,
                            bool accumulates) {
    ptx::wgmma_registers(registers_of(sums));
#pragma unroll
    for (int k = 0; k < Inner / 16; ++k) ptx::wgmma_registers(left.value[k]);
    ptx::wgmma_fence();
    auto b = right.here();
#pragma unroll
    for (int k = 0; k < Inner; k += 16) {
        ptx::wgmma_m64k16<Element, Right::kMajor>(registers_of(sums), left.value[k / 16], b.at(k),
                                                  accumulates || k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_registers(registers_of(sums));
}

// Numbers of which none is negative are computed before what is waited for behind this.
template <int N>
DEVICE void compute_before_wait(Accumulator<float, 1, N>& x) {
    uint32_t bits = 0;
    x.each([&](int, int, float& x) { bits |= ptx::bit_cast<uint32_t>(x); });
    ptx::compute_before_wait(bits);
}

DEVICE void compute_before_wait(RowValues<float, 1>& x) {
    uint32_t bits = 0;
    x.each([&](int, float& x) { bits |= ptx::bit_cast<uint32_t>(x); });
    ptx::compute_before_wait(bits);
}

// Waits until at most `Groups` of the latest groups of products are under way; `sums` are those of the others.
template <int Groups, int... N>
DEVICE void wait_products(Accumulator<float, 1, N>&... sums) {
    ptx::wgmma_wait<Groups>();
    (ptx::wgmma_registers(registers_of(sums)), ...);
}

}  // namespace attn::tile
