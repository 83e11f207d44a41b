// Products of tiles whose elements lie in shared (or global) memory in the type of the sums: f32 through tf32 tensor
// cores in one product (operands that were 16-bit numbers are exact), two (the right operand was) or three (neither was),
// f64 through its own.
//
// Inside a step of 8 along the inner dimension the instruction's index t (0..3) stands for 2t, and t + 4 for 2t + 1, on
// both sides. So a block of sums is a left fragment as it is, and a lane reads neighbours.
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

// Distance of rows, in elements, for rows of `width` numbers that lanes read without bank conflicts.
DEVICE constexpr int wide_row(int width) { return (width + 31) / 32 * 32 + 8; }

// Left operand [rows × inner].
template <class Math>
struct WideLeftRows {
    typename Math::Tile tile;

    DEVICE typename Math::Left fragment(int m, int k) const {
        auto block = tile.from(16 * m + ptx::lane() / 4, k + 2 * (ptx::lane() % 4));
        return Math::left({block.at(0, 0), block.at(0, 1), block.at(8, 0), block.at(8, 1)});
    }
};

// Left operand stored as its transpose [inner × rows].
template <class Math>
struct WideLeftTransposed {
    typename Math::Tile tile;

    DEVICE typename Math::Left fragment(int m, int k) const {
        auto block = tile.from(k + 2 * (ptx::lane() % 4), 16 * m + ptx::lane() / 4);
        return Math::left({block.at(0, 0), block.at(1, 0), block.at(0, 8), block.at(1, 8)});
    }
};

// Left operand in registers.
template <class Math, int M, int N>
struct WideLeftRegisters {
    const Accumulator<typename Math::Real, M, N>& sums;

    DEVICE typename Math::Left fragment(int m, int k) const { return Math::left(sums.value[m][k / 8]); }
};

// Right operand [inner × columns].
template <class Math>
struct WideRightRows {
    typename Math::Tile tile;

    DEVICE void fragments(int n, int k, typename Math::Right (&pair)[2]) const {
        auto block = tile.from(k + 2 * (ptx::lane() % 4), 8 * n + ptx::lane() / 4);
        pair[0] = Math::right({block.at(0, 0), block.at(1, 0)});
        pair[1] = Math::right({block.at(0, 8), block.at(1, 8)});
    }
};

// Right operand stored as its transpose [columns × inner].
template <class Math>
struct WideRightTransposed {
    typename Math::Tile tile;

    DEVICE void fragments(int n, int k, typename Math::Right (&pair)[2]) const {
        auto block = tile.from(8 * n + ptx::lane() / 4, k + 2 * (ptx::lane() % 4));
        pair[0] = Math::right({block.at(0, 0), block.at(0, 1)});
        pair[1] = Math::right({block.at(8, 0), block.at(8, 1)});
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
    using LeftRows = WideLeftRows<Wide>;
    using LeftTransposed = WideLeftTransposed<Wide>;
    template <int M, int N>
    using LeftRegisters = WideLeftRegisters<Wide, M, N>;
    using RightRows = WideRightRows<Wide>;
    using RightTransposed = WideRightTransposed<Wide>;
    using Left = Split<4>;
    using Right = Split<2>;

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
