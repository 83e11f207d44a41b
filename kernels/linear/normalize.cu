// The RMS norm where no block has the whole row: over the heads of a token, or over more value columns than a block
// takes.
//
//   r = √(mean t² + ε)    o = t / r
//
// One block: a row, which is that of one head or those of all heads of a token. Grid x counts rows.
#include "../tile/norm.cuh"
#include "block.cuh"

namespace attn::linear {

template <class Element>
DEVICE void normalize(const LinearParams& p) {
    using Real = typename Arithmetic<Element>::Real;
    bool is_joint = p.finish == kRmsNormAllHeads;
    int64_t parts = is_joint ? p.heads : 1, row = ptx::block_x();
    int64_t outer = row / p.queries, query = row % p.queries;
    // Element c of part h.
    auto at = [&](int64_t h, int c) { return ((outer * parts + h) * p.queries + query) * p.value_width + c; };
    auto raw = static_cast<const Real*>(p.raw);
    auto each = [&](auto f) {
        for (int64_t h = 0; h < parts; ++h) {
            for (int c = ptx::thread(); c < p.value_width; c += kThreads) f(raw[at(h, c)]);
        }
    };
    Real largest = Real(0), square = Real(0);
    each([&](Real x) { largest = ptx::max(largest, ptx::abs(x)); });
    // Each warp has a scale of its own.
    Real scale = tile::scale_of_squares(warp_max(largest));
    each([&](Real x) { square += x * scale * (x * scale); });
    Real norm = tile::norm_of(warp_sum(square), scale);
    Real* partial = ptx::shared_memory<Real>();
    if (ptx::lane() == 0) partial[ptx::warp()] = norm;
    ptx::barrier_sync();
    norm = Real(0);
    for (int w = 0; w < warps(); ++w) norm = tile::norm_of_both(norm, partial[w]);
    Real divisor = tile::root_mean_square(norm, parts * p.value_width, p.epsilon), factor = inverse(divisor);
    if (p.statistic && ptx::thread() == 0) static_cast<Real*>(p.statistic)[row] = divisor;
    for (int64_t h = 0; h < parts; ++h) {
        for (int c = ptx::thread(); c < p.value_width; c += kThreads) {
            store_as<Element>(p.out, at(h, c), raw[at(h, c)] * factor, p.is_out_wide);
        }
    }
}

ATTN_KERNEL(linear_normalize_f32, normalize<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_normalize_f64, normalize<double>, LinearParams, kThreads)
ATTN_KERNEL(linear_normalize_f16, normalize<ptx::f16>, LinearParams, kThreads)
ATTN_KERNEL(linear_normalize_bf16, normalize<ptx::bf16>, LinearParams, kThreads)

}  // namespace attn::linear
