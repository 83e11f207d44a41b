// sums += left · right, for one warp.
//
// Tensor cores cut off what of a sum falls below its last bit, so that long sums drift. Where sums are in the type of the
// operands, each step's products are a sum of their own, which ordinary cores add to the others, to the nearest.
#pragma once

#include "native.cuh"
#include "wide.cuh"

namespace attn::tile {

// sums += a b for one block of them.
template <class Math>
DEVICE void add_product(typename Math::Real (&sums)[4], const typename Math::Left& a, const typename Math::Right& b) {
    if constexpr (Math::kAddsApart) {
        typename Math::Real step[4] = {};
        Math::multiply(step, a, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += step[i];
    } else {
        Math::multiply(sums, a, b);
    }
}

// One step of the inner dimension, at `left_k` of the left operand and `right_k` of the right one.
template <class Math, int M, int N, class Left, class Right>
DEVICE void multiply_step(Accumulator<typename Math::Real, M, N>& sums, const Left& left, int left_k, const Right& right,
                          int right_k) {
    static_assert(N % 2 == 0, "right fragments come in pairs");
    constexpr Inner kInner = Math::template kInner<Left, Right>;
    typename Math::Left a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = left.template fragment<kInner>(m, left_k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        typename Math::Right b[2];
        right.template fragments<kInner>(n, right_k, b);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            add_product<Math>(sums.value[m][n], a[m], b[0]);
            add_product<Math>(sums.value[m][n + 1], a[m], b[1]);
        }
    }
}

// `inner` is a multiple of Math::kStep (8 or 16); operands are zero where they are padded.
template <class Math, int M, int N, class Left, class Right>
DEVICE void multiply(Accumulator<typename Math::Real, M, N>& sums, const Left& left, const Right& right, int inner) {
#pragma unroll 1
    for (int k = 0; k < inner; k += Math::kStep) multiply_step<Math>(sums, left, k, right, k);
}

// sums += x · right, the inner dimension running over the columns of x, which stay in registers. Sums of steps need
// registers of their own: of more than two steps at once, others would go to memory. So x moves on under the loop.
template <class Math, int M, int K, int N, class Right>
DEVICE void multiply_registers(Accumulator<typename Math::Real, M, N>& sums,
                               const Accumulator<typename Math::Real, M, K>& x, const Right& right) {
    constexpr int kColumns = Math::kAddsApart ? 2 * Math::kStep : 8 * K;
    auto rest = x;
    typename Math::template LeftRegisters<M, K> left{rest};
#pragma unroll 1
    for (int first = 0; first < 8 * K; first += kColumns) {
#pragma unroll
        for (int k = 0; k < kColumns; k += Math::kStep) multiply_step<Math>(sums, left, k, right, first + k);
        rest.template drop<kColumns / 8>();
    }
}

}  // namespace attn::tile
