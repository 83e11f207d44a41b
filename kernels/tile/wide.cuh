// Products of tiles whose elements lie in shared (or global) memory in the type of the sums: f32 through tf32 tensor
// cores in one product (operands that were 16-bit numbers are exact), two (the right operand was) or three (neither was),
// f64 through its own.
#pragma once

#include "../ptx/element.cuh"
#include "../ptx/mma.cuh"
#include "accumulator.cuh"

namespace attn::tile {

// A row-major tile; `row` is the distance of rows in elements.
template <class Real>
struct WideTile {
    Real* data;
    int row;

    DEVICE Real& at(int r, int c) const { return data[r * row + c]; }

    // The tile from row r and column c on.
    DEVICE WideTile from(int r, int c) const { return {data + (r * row + c), row}; }
};

// Distance of rows, in elements, for rows of `width` numbers: 4 modulo 32, and rows at multiples of 16 bytes. With g = lane/4
// and t = lane%4, a lane reads row g of what is stored along the inner dimension and column g of what is stored across it.
// Of f32, g rows and `apart` indices are 4g + t banks on, columns and `neighbours` 8t + g: 32 different ones. Of f64, whose
// half-warps have 16 banks of 8 bytes, 4g + t and, `apart`, 4t + g are. `neighbours` of f32 along rows and of f64 across them
// are read in the order of `read_neighbours`.
DEVICE constexpr int wide_row(int width) { return (width + 31) / 32 * 32 + 4; }

// From a lane's first inner index of a step to its second.
DEVICE constexpr int distance(Inner inner) { return inner == Inner::neighbours ? 1 : 4; }

// This lane's first inner index of a step.
template <Inner kInner>
DEVICE int inner_index() {
    return (kInner == Inner::neighbours ? 2 : 1) * (ptx::lane() % 4);
}

// Left operand [rows × inner].
template <class Math>
struct WideLeftRows {
    static constexpr bool kIsInRegisters = false;
    typename Math::Tile tile;

    template <Inner kInner>
    DEVICE typename Math::Left fragment(int m, int k) const {
        auto block = tile.from(16 * m + ptx::lane() / 4, k + inner_index<kInner>());
        if constexpr (kInner == Inner::neighbours) {
            typename Math::Real x[4];
            read_neighbours(x[0], x[1], [&](int at) { return block.at(0, at); });
            read_neighbours(x[2], x[3], [&](int at) { return block.at(8, at); });
            return Math::left(x);
        } else {
            constexpr int kNext = distance(kInner);
            return Math::left({block.at(0, 0), block.at(0, kNext), block.at(8, 0), block.at(8, kNext)});
        }
    }
};

// Left operand stored as its transpose [inner × rows].
template <class Math>
struct WideLeftTransposed {
    static constexpr bool kIsInRegisters = false;
    typename Math::Tile tile;

    template <Inner kInner>
    DEVICE typename Math::Left fragment(int m, int k) const {
        auto block = tile.from(k + inner_index<kInner>(), 16 * m + ptx::lane() / 4);
        constexpr int kNext = distance(kInner);
        return Math::left({block.at(0, 0), block.at(kNext, 0), block.at(0, 8), block.at(kNext, 8)});
    }
};

// Left operand in registers: a block of sums as it is.
template <class Math, int M, int N>
struct WideLeftRegisters {
    static constexpr bool kIsInRegisters = true;
    const Accumulator<typename Math::Real, M, N>& sums;

    template <Inner kInner>
    DEVICE typename Math::Left fragment(int m, int k) const {
        static_assert(kInner == Inner::neighbours, "columns of a block of sums");
        return Math::left(sums.value[m][k / 8]);
    }
};

// Right operand [inner × columns].
template <class Math>
struct WideRightRows {
    static constexpr bool kIsAcross = true;
    typename Math::Tile tile;

    template <Inner kInner>
    DEVICE void fragments(int n, int k, typename Math::Right (&pair)[2]) const {
        auto block = tile.from(k + inner_index<kInner>(), 8 * n + ptx::lane() / 4);
        if constexpr (kInner == Inner::neighbours && sizeof(typename Math::Real) == sizeof(double)) {
            typename Math::Real x[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                read_neighbours(x[0], x[1], [&](int at) { return block.at(at, 8 * i); });
                pair[i] = Math::right(x);
            }
        } else {
            constexpr int kNext = distance(kInner);
            pair[0] = Math::right({block.at(0, 0), block.at(kNext, 0)});
            pair[1] = Math::right({block.at(0, 8), block.at(kNext, 8)});
        }
    }
};

// Right operand stored as its transpose [columns × inner].
template <class Math>
struct WideRightTransposed {
    static constexpr bool kIsAcross = false;
    typename Math::Tile tile;

    template <Inner kInner>
    DEVICE void fragments(int n, int k, typename Math::Right (&pair)[2]) const {
        auto block = tile.from(8 * n + ptx::lane() / 4, k + inner_index<kInner>());
        constexpr int kNext = distance(kInner);
        pair[0] = Math::right({block.at(0, 0), block.at(0, kNext)});
        pair[1] = Math::right({block.at(8, 0), block.at(8, kNext)});
    }
};

// f32 as one tf32 number, or as the sum of two.
template <int Count>
struct Split {
    uint32_t big[Count];
    uint32_t small[Count];
};

template <class Real, int Passes>
struct Wide;

template <int Passes>
struct Wide<float, Passes> {
    using Real = float;
    using Tile = WideTile<float>;
    static constexpr int kStep = 8;
    // Products in one pass are of results that are rounded to 16 bits, far above what is cut off.
    static constexpr bool kAddsApart = Passes > 1;
    using LeftRows = WideLeftRows<Wide>;
    using LeftTransposed = WideLeftTransposed<Wide>;
    template <int M, int N>
    using LeftRegisters = WideLeftRegisters<Wide, M, N>;
    using RightRows = WideRightRows<Wide>;
    using RightTransposed = WideRightTransposed<Wide>;
    using Left = Split<4>;
    using Right = Split<2>;

    // Without bank conflicts on the right, of which there are more.
    template <class L, class R>
    static constexpr Inner kInner = L::kIsInRegisters || R::kIsAcross ? Inner::neighbours : Inner::apart;

    template <int kParts, int Count>
    DEVICE static Split<Count> split(const float (&x)[Count]) {
        Split<Count> parts;
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            float big = ptx::round_to_tf32(x[i]);
            parts.big[i] = ptx::bit_cast<uint32_t>(big);
            float rest = kParts == 1 || x[i] == big ? 0.0f : x[i] - big;
            parts.small[i] = ptx::bit_cast<uint32_t>(ptx::round_to_tf32(rest));
        }
        return parts;
    }

    // Order of the instruction: rows r and r + 8 at t, then at t + 4.
    DEVICE static Left left(const float (&x)[4]) { return split<Passes >= 2 ? 2 : 1>({x[0], x[2], x[1], x[3]}); }
    DEVICE static Right right(const float (&x)[2]) { return split<Passes == 3 ? 2 : 1>(x); }

    DEVICE static void multiply(float (&sums)[4], const Left& a, const Right& b) {
        if (Passes >= 2) ptx::mma_m16n8k8_tf32(sums, a.small, b.big);
        if (Passes == 3) ptx::mma_m16n8k8_tf32(sums, a.big, b.small);
        ptx::mma_m16n8k8_tf32(sums, a.big, b.big);
    }
};

template <>
struct Wide<double, 1> {
    using Real = double;
    using Tile = WideTile<double>;
    static constexpr int kStep = 8;
    static constexpr bool kAddsApart = false;
    using LeftRows = WideLeftRows<Wide>;
    using LeftTransposed = WideLeftTransposed<Wide>;
    template <int M, int N>
    using LeftRegisters = WideLeftRegisters<Wide, M, N>;
    using RightRows = WideRightRows<Wide>;
    using RightTransposed = WideRightTransposed<Wide>;
    struct Left {
        double value[4];
    };
    struct Right {
        double value[2];
    };

    template <class L, class R>
    static constexpr Inner kInner = L::kIsInRegisters ? Inner::neighbours : Inner::apart;

    DEVICE static Left left(const double (&x)[4]) { return {x[0], x[1], x[2], x[3]}; }
    DEVICE static Right right(const double (&x)[2]) { return {x[0], x[1]}; }

    DEVICE static void multiply(double (&sums)[4], const Left& a, const Right& b) {
        double upper[2] = {sums[0], sums[1]}, lower[2] = {sums[2], sums[3]};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            ptx::mma_m8n8k4_f64(upper, a.value[k], b.value[k]);
            ptx::mma_m8n8k4_f64(lower, a.value[2 + k], b.value[k]);
        }
        sums[0] = upper[0], sums[1] = upper[1], sums[2] = lower[0], sums[3] = lower[1];
    }
};

}  // namespace attn::tile
