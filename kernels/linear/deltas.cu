// ⟨d_out, out⟩ of each row of the statistic: of one head, or over the heads of a token.
//
// One warp: a row.
#include "features.cuh"

namespace attn::linear {

template <class Element>
DEVICE void deltas(const LinearParams& p) {
    using Real = typename Arithmetic<Element>::Real;
    bool is_joint = p.finish == kRmsNormAllHeads;
    int64_t row = ptx::block_x() * warps() + ptx::warp();
    if (row >= p.batch * (is_joint ? 1 : p.heads) * p.queries) return;
    int64_t outer = row / p.queries, query = row % p.queries;
    int64_t batch = is_joint ? outer : outer / p.heads, first = is_joint ? 0 : outer % p.heads;
    int64_t end = is_joint ? p.heads : first + 1;
    Real delta = Real(0);
    for (int64_t head = first; head < end; ++head) {
        auto row_of = [&](const void* data, const tile::Strides& strides) {
            int64_t at = batch * strides.batch + head * strides.head + query * strides.row;
            return static_cast<const Element*>(data) + at;
        };
        const Element *out = row_of(p.out, p.out_strides), *d_out = row_of(p.d_out, p.d_out_strides);
        delta += row_sum<Real>(p.value_width,
                               [&](int c) { return tile::widen<Real>(out[c]) * tile::widen<Real>(d_out[c]); });
    }
    if (ptx::lane() == 0) static_cast<Real*>(p.deltas)[row] = delta;
}

ATTN_KERNEL(linear_deltas_f32, deltas<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_deltas_f64, deltas<double>, LinearParams, kThreads)
ATTN_KERNEL(linear_deltas_f16, deltas<ptx::f16>, LinearParams, kThreads)
ATTN_KERNEL(linear_deltas_bf16, deltas<ptx::bf16>, LinearParams, kThreads)

}  // namespace attn::linear
