// Products of 16-bit tiles on tensor cores with f32 sums.
//
// A tile is stored in panels of 64 columns, 128 bytes a row; the 16-byte chunk c of row r lies at chunk c ^ (r % 8), so
// that eight rows of a chunk column are in different banks.
#pragma once

#include "../ptx/element.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "accumulator.cuh"

namespace attn::tile {

constexpr int kPanelColumns = 64;

// `rows` rows (a multiple of 8) × panels of 64 columns in shared memory.
template <class Element>
struct SwizzledTile {
    Element* data;
    int rows;

    // Eight elements from column c (a multiple of 8) of row r.
    DEVICE Element* chunk(int r, int c) const {
        unsigned panel = unsigned(c) / kPanelColumns, index = unsigned(c) % kPanelColumns / 8;
        return data + ((panel * rows + r) * kPanelColumns + (index ^ (unsigned(r) % 8)) * 8);
    }

    // The chunk at column c + offset, where c has the bits of a multiple of 8 that `offset` has not.
    DEVICE Element* chunk_beside(int r, int c, int offset) const {
        unsigned swizzled = (unsigned(r) % 8 * 8) ^ unsigned(c);
        return data + (unsigned(offset) / kPanelColumns * rows * kPanelColumns + r * kPanelColumns) +
               (swizzled ^ (unsigned(offset) % kPanelColumns));
    }

    DEVICE Element& at(int r, int c) const { return chunk(r, c)[c % 8]; }

    DEVICE static constexpr int size(int rows, int columns) {
        return rows * ((columns + kPanelColumns - 1) / kPanelColumns) * kPanelColumns;
    }
};

template <class Element>
struct Native;

// Left operand [rows × inner], starting at row `row`.
template <class Math>
struct NativeLeftRows {
    typename Math::Tile tile;
    int row = 0;

    template <Inner>
    DEVICE typename Math::Left fragment(int m, int k) const {
        typename Math::Left a;
        int lane = ptx::lane();
        ptx::ldmatrix_x4(a.value, tile.chunk(row + 16 * m + lane % 16, k + lane / 16 * 8));
        return a;
    }
};

// Left operand in registers, rounded.
template <class Math, int M, int N>
struct NativeLeftRegisters {
    const Accumulator<float, M, N>& sums;

    template <Inner>
    DEVICE typename Math::Left fragment(int m, int k) const {
        typename Math::Left a;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float(&x)[4] = sums.value[m][k / 8 + half];
            a.value[2 * half] = ptx::pack<typename Math::Element>(x[0], x[1]);
            a.value[2 * half + 1] = ptx::pack<typename Math::Element>(x[2], x[3]);
        }
        return a;
    }
};

// Right operand [inner × columns], starting at column `column`.
template <class Math>
struct NativeRightRows {
    typename Math::Tile tile;
    int column = 0;

    template <Inner>
    DEVICE void fragments(int n, int k, typename Math::Right (&pair)[2]) const {
        uint32_t b[4];
        int lane = ptx::lane();
        ptx::ldmatrix_x4_trans(b, tile.chunk_beside(k + lane % 16, lane / 16 * 8, column + 8 * n));
        pair[0] = {{b[0], b[1]}};
        pair[1] = {{b[2], b[3]}};
    }
};

// Right operand stored as its transpose [columns × inner], starting at row `row`.
template <class Math>
struct NativeRightTransposed {
    typename Math::Tile tile;
    int row = 0;

    template <Inner>
    DEVICE void fragments(int n, int k, typename Math::Right (&pair)[2]) const {
        uint32_t b[4];
        int lane = ptx::lane();
        ptx::ldmatrix_x4(b, tile.chunk(row + 8 * n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        pair[0] = {{b[0], b[1]}};
        pair[1] = {{b[2], b[3]}};
    }
};

template <class E>
struct Native {
    using Element = E;
    using Real = float;
    using Tile = SwizzledTile<E>;
    static constexpr int kStep = 16;
    static constexpr bool kAddsApart = false;
    template <class L, class R>
    static constexpr Inner kInner = Inner::neighbours;
    using LeftRows = NativeLeftRows<Native>;
    template <int M, int N>
    using LeftRegisters = NativeLeftRegisters<Native, M, N>;
    using RightRows = NativeRightRows<Native>;
    using RightTransposed = NativeRightTransposed<Native>;

    struct Left {
        uint32_t value[4];
    };
    struct Right {
        uint32_t value[2];
    };

    DEVICE static void multiply(float (&sums)[4], const Left& a, const Right& b) {
        ptx::mma_m16n8k16(E{}, sums, a.value, b.value);
    }
};

}  // namespace attn::tile
