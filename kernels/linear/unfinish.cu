// Gradients of sums before their RMS norm, but for the division by its divisor, so that they can be copied like operands.
//
//   u = dO − O · mean(O ⊙ dO)
//
// One warp: a row of a head. The mean is over the row, or, for a norm over all heads, over those of a token, from `deltas`.
#include "features.cuh"

namespace attn::linear {

template <class Element>
DEVICE void unfinish(const LinearParams& p) {
    int64_t row = ptx::block_x() * warps() + ptx::warp();
    if (row >= p.batch * p.heads * p.queries) return;
    int64_t query = row % p.queries, head = row / p.queries % p.heads, batch = row / p.queries / p.heads;
    auto row_of = [&](const void* data, const tile::Strides& strides) {
        return static_cast<const Element*>(data) + batch * strides.batch + head * strides.head + query * strides.row;
    };
    const Element *out = row_of(p.out, p.out_strides), *d_out = row_of(p.d_out, p.d_out_strides);
    float mean = row_sum<float>(p.value_width, [&](int c) { return ptx::to_float(out[c]) * ptx::to_float(d_out[c]); });
    int64_t count = p.value_width;
    if (p.finish == kRmsNormAllHeads) {
        mean = static_cast<const float*>(p.deltas)[batch * p.queries + query];
        count *= p.heads;
    }
    mean /= float(count);
    auto to = static_cast<Element*>(p.d_sums) + row * ((p.value_width + 7) / 8 * 8);
    each_column(p.value_width, [&](int c) {
        to[c] = ptx::from_float<Element>(ptx::to_float(d_out[c]) - ptx::to_float(out[c]) * mean);
    });
}

ATTN_KERNEL(linear_unfinish_f16, unfinish<ptx::f16>, LinearParams, kThreads)
ATTN_KERNEL(linear_unfinish_bf16, unfinish<ptx::bf16>, LinearParams, kThreads)

}  // namespace attn::linear
