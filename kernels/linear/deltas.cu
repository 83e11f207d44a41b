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
        auto first_of = [&](const tile::Strides& strides) {
            return batch * strides.batch + head * strides.head + query * strides.row;
        };
        int64_t out = first_of(p.out_strides), d_out = first_of(p.d_out_strides);
        delta += row_sum<Real>(p.value_width, [&](int c) {
            return load_as<Element, Real>(p.out, out + c, p.is_out_wide) *
                   load_as<Element, Real>(p.d_out, d_out + c, p.is_out_wide);
        });
    }
    if (ptx::lane() == 0) static_cast<Real*>(p.deltas)[row] = delta;
}

ATTN_KERNEL(linear_deltas_f32, deltas<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_deltas_f64, deltas<double>, LinearParams, kThreads)
ATTN_KERNEL(linear_deltas_f16, deltas<ptx::f16>, LinearParams, kThreads)
ATTN_KERNEL(linear_deltas_bf16, deltas<ptx::bf16>, LinearParams, kThreads)

}  // namespace attn::linear
