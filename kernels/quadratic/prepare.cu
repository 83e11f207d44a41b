// What the backward pass needs of each row besides q and d_out, from out, d_out and the statistic; a warp per row.
//
//     softmax    d_score = w (⟨d_out, v⟩ − δ),                  δ = ⟨d_out, out⟩ − d_statistic
//     scale      d_score = c w′ ⟨d_out, v⟩
//     row sum    d_score = w′ (⟨d_out, v⟩ − δ) / r,             δ = ⟨d_out, out⟩
//     RMS norm   d_score = w′ ⟨d_out − out mean, v⟩ / r,        mean = ⟨d_out, out⟩ / E

#include "weight.cuh"

namespace attn::quadratic {

// ⟨d_out, out⟩ of a row, on all lanes.
template <class Real, class Params, class Stored>
DEVICE Real row_product(const Params& params, int64_t batch, int64_t head, int64_t query, const Stored* out,
                        const Stored* d_out) {
    const Stored* x = tile::rows_of_head(out, params.out_strides, batch, head, params.queries, 0).row(query);
    const Stored* y = tile::rows_of_head(d_out, params.d_out_strides, batch, head, params.queries, 0).row(query);
    Real product = 0;
    for (int column = ptx::lane(); column < params.value_width; column += 32) {
        product += tile::widen<Real>(x[column]) * tile::widen<Real>(y[column]);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) product += ptx::shuffle_xor(product, distance);
    return product;
}

template <class Params, class Real>
DEVICE RowFactors<Real> factors_of(const Params& params, int64_t batch, Real product, Real statistic, Real d_statistic) {
    if (params.weight == kSoftmax) {
        // Rows without a key have no weights.
        bool is_empty = statistic == -Real(__builtin_huge_val());
        return {is_empty ? -statistic : statistic * Real(kLog2E), product - d_statistic, Real(0), Real(0)};
    }
    if (params.finish == kScale) return {Real(params.constant_of(batch)), Real(0), Real(0), Real(0)};
    if (params.finish == kRowSum) return {inverse(statistic), product, Real(0), Real(0)};
    if (params.finish == kRmsNorm) return {Real(1) / statistic, Real(0), product / Real(params.value_width), Real(0)};
    return {Real(1), Real(0), Real(0), Real(0)};
}

template <class Element>
DEVICE void prepare(const QuadraticParams<Element>& params) {
    using Real = typename Sums<Element>::Real;
    int64_t row = ptx::block_x() * kWarps + ptx::warp();
    if (row >= params.row(params.batch, 0, 0)) return;
    int64_t query = row % params.queries, head = row / params.queries % params.heads;
    int64_t batch = row / params.queries / params.heads;
    Real product = 0;
    if (params.is_out_wide) {
        product = row_product<Real>(params, batch, head, query, static_cast<const Real*>(params.out),
                                    static_cast<const Real*>(params.d_out));
    } else {
        product = row_product<Real>(params, batch, head, query, static_cast<const Element*>(params.out),
                                    static_cast<const Element*>(params.d_out));
    }
    const tile::Strides& strides = params.d_statistic_strides;
    int64_t at = batch * strides.batch + head * strides.head + query * strides.row;
    Real d_statistic = params.d_statistic == nullptr ? Real(0) : params.d_statistic[at];
    if (ptx::lane() == 0) {
        params.factors[row] = factors_of(params, batch, product, *params.statistic_of(batch, head, query), d_statistic);
    }
}

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_prepare_bf16, prepare<attn::ptx::bf16>, QuadraticParams<attn::ptx::bf16>, kThreads)
ATTN_KERNEL(quadratic_prepare_f16, prepare<attn::ptx::f16>, QuadraticParams<attn::ptx::f16>, kThreads)
ATTN_KERNEL(quadratic_prepare_f32, prepare<float>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_prepare_f64, prepare<double>, QuadraticParams<double>, kThreads)
