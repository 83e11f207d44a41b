// What the backward pass needs of each row besides q and d_out, from out, d_out and the statistic; a warp per row.
//
//     softmax    d_score = w (⟨d_out, v⟩ − δ),                  δ = ⟨d_out, out⟩ − d_statistic
//     scale      d_score = c w′ ⟨d_out, v⟩
//     row sum    d_score = w′ (⟨d_out, v⟩ − δ) / r,             δ = ⟨d_out, out⟩
//     RMS norm   d_score = w′ ⟨d_out − out mean, v⟩ / r,        mean = ⟨d_out, out⟩ / E
//
// Where a row sees few keys, ⟨d_out, out⟩ of softmax and row sum is summed up over these instead: few do not average over
// the error of a rounded output.

#include "weight.cuh"

namespace attn::quadratic {

// Σ f(column) over the columns below `count`, on all lanes.
template <class Real, class F>
DEVICE Real sum_of_columns(int count, F f) {
    Real sum = 0;
    for (int column = ptx::lane(); column < count; column += 32) sum += f(column);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += ptx::shuffle_xor(sum, distance);
    return sum;
}

// ⟨d_out, out⟩ of a row, on all lanes.
template <class Real, class Params, class Stored>
DEVICE Real row_product(const Params& params, int64_t batch, int64_t head, int64_t query, const Stored* out,
                        const Stored* d_out) {
    const Stored* x = tile::rows_of_head(out, params.out_strides, batch, head, params.queries, 0).row(query);
    const Stored* y = tile::rows_of_head(d_out, params.d_out_strides, batch, head, params.queries, 0).row(query);
    return sum_of_columns<Real>(params.value_width, [&](int column) {
        return tile::widen<Real>(x[column]) * tile::widen<Real>(y[column]);
    });
}

// Most keys of such a row.
constexpr int kFew = 16;

// The weight of a score, up to the divisor of a row sum.
template <class Params, class Real>
DEVICE Real weight_of(const Params& params, Real score, Real statistic) {
    if (params.weight == kSoftmax) return ptx::exp2((score - statistic) * Real(kLog2E));
    score = positive(score);
    return params.weight == kReluSquared ? score * score : score;
}

// Σ_j w_j ⟨d_out, v_j⟩ / (Σ_j w_j + ε) over the `keys` of a row, on all lanes.
template <class Real, class Element, class Stored>
DEVICE Real mean_gradient(const QuadraticParams<Element>& params, int64_t batch, int64_t head, int64_t query,
                          const Range& keys, Real statistic, const Stored* d_out) {
    const Stored* d_row = tile::rows_of_head(d_out, params.d_out_strides, batch, head, params.queries, 0).row(query);
    const Element* q = query_rows(params, batch, head).row(query);
    auto k = key_rows(params, batch, head / params.group()), v = value_rows(params, batch, head / params.group());
    KeptKeys kept{params.mask_of(batch)};
    Real sum = params.weight == kSoftmax ? Real(0) : Real(params.constant), mean = 0;
    for (int key = keys.low; key < keys.high; ++key) {
        if (!kept(key)) continue;
        const Element *k_row = k.row(key), *v_row = v.row(key);
        Real score = sum_of_columns<Real>(params.width, [&](int column) {
            return tile::widen<Real>(q[column]) * tile::widen<Real>(k_row[column]);
        });
        Real gradient = sum_of_columns<Real>(params.value_width, [&](int column) {
            return tile::widen<Real>(d_row[column]) * tile::widen<Real>(v_row[column]);
        });
        score *= Real(params.scale_of(batch));
        if (params.soft_cap != 0) score = Real(params.soft_cap) * ptx::tanh(score / Real(params.soft_cap));
        if (params.bias != nullptr) {
            int64_t distance = key - query - params.offset();
            score += tile::widen<Real>(params.bias[head * params.bias_stride + params.bias_radius + distance]);
        }
        Real weight = weight_of(params, score, statistic);
        sum += weight, mean += weight * gradient;
    }
    return mean * inverse(sum);
}

// ⟨d_out, out⟩ of a row, on all lanes, whose elements are of type Stored.
template <class Real, class Element, class Stored>
DEVICE Real product_of(const QuadraticParams<Element>& params, int64_t batch, int64_t head, int64_t query,
                       Real statistic, const Stored* out, const Stored* d_out) {
    Range keys = params.visible_keys(int(query));
    bool takes_mean = params.weight == kSoftmax || params.finish == kRowSum;
    if (params.weight == kSoftmax && statistic == -Real(__builtin_huge_val())) return Real(0);
    if (takes_mean && keys.high - keys.low <= kFew) {
        return mean_gradient<Real>(params, batch, head, query, keys, statistic, d_out);
    }
    return row_product<Real>(params, batch, head, query, out, d_out);
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
    Real product = 0, statistic = *params.statistic_of(batch, head, query);
    if (params.is_out_wide) {
        product = product_of<Real>(params, batch, head, query, statistic, static_cast<const Real*>(params.out),
                                   static_cast<const Real*>(params.d_out));
    } else {
        product = product_of<Real>(params, batch, head, query, statistic, static_cast<const Element*>(params.out),
                                   static_cast<const Element*>(params.d_out));
    }
    const tile::Strides& strides = params.d_statistic_strides;
    int64_t at = batch * strides.batch + head * strides.head + query * strides.row;
    Real d_statistic = params.d_statistic == nullptr ? Real(0) : params.d_statistic[at];
    if (ptx::lane() == 0) {
        params.factors[row] = factors_of(params, batch, product, statistic, d_statistic);
    }
}

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_prepare_bf16, prepare<attn::ptx::bf16>, QuadraticParams<attn::ptx::bf16>, kThreads)
ATTN_KERNEL(quadratic_prepare_f16, prepare<attn::ptx::f16>, QuadraticParams<attn::ptx::f16>, kThreads)
ATTN_KERNEL(quadratic_prepare_f32, prepare<float>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_prepare_f64, prepare<double>, QuadraticParams<double>, kThreads)
