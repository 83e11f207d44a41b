// sums += left · right, for one warp.
#pragma once

#include "native.cuh"
#include "wide.cuh"

namespace attn::tile {

// One step of the inner dimension, at k.
template <class Math, int M, int N, class Left, class Right>
DEVICE void multiply_step(Accumulator<typename Math::Real, M, N>& sums, const Left& left, const Right& right, int k) {
    static_assert(N % 2 == 0, "right fragments come in pairs");
    constexpr Inner kInner = Math::template kInner<Left, Right>;
    typename Math::Left a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = left.template fragment<kInner>(m, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        typename Math::Right b[2];
        right.template fragments<kInner>(n, k, b);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            Math::multiply(sums.value[m][n], a[m], b[0]);
            Math::multiply(sums.value[m][n + 1], a[m], b[1]);
        }
    }
}

// `inner` is a multiple of Math::kStep (8 or 16); operands are zero where they are padded.
template <class Math, int M, int N, class Left, class Right>
DEVICE void multiply(Accumulator<typename Math::Real, M, N>& sums, const Left& left, const Right& right, int inner) {
#pragma unroll 1
    for (int k = 0; k < inner; k += Math::kStep) multiply_step<Math>(sums, left, right, k);
}

// sums += x · right, the inner dimension running over the columns of x, which stay in registers.
template <class Math, int M, int K, int N, class Right>
DEVICE void multiply_registers(Accumulator<typename Math::Real, M, N>& sums,
                               const Accumulator<typename Math::Real, M, K>& x, const Right& right) {
    typename Math::template LeftRegisters<M, K> left{x};
#pragma unroll
    for (int k = 0; k < 8 * K; k += Math::kStep) multiply_step<Math>(sums, left, right, k);
}

}  // namespace attn::tile
