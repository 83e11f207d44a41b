// Sums become outputs.
#pragma once

#include "../tile/norm.cuh"
#include "features.cuh"

namespace attn::linear {

// Stores the row of a query, at `position` of the line, of an output head: sum(column) of this block's value columns,
// divided as the finish asks; norm() is ⟨φ(q), z⟩. By a warp.
template <class Element, class Real = typename Arithmetic<Element>::Real, class Norm, class Sum>
DEVICE void finish_row(const LinearParams& p, const Place& place, int64_t head, int64_t query, int64_t position,
                       Norm norm, Sum sum) {
    int columns = place.columns(p);
    Real factor = Real(1), divisor = Real(1);
    if (p.finish == kNormalize) {
        divisor = norm() + Real(p.epsilon);
        factor = inverse(divisor);
    }
    if (p.finish == kRmsNorm) {
        Real scale = tile::scale_of_squares(row_max<Real>(columns, [&](int c) { return ptx::abs(sum(c)); }));
        Real square = row_sum<Real>(columns, [&](int c) { return sum(c) * scale * (sum(c) * scale); });
        divisor = tile::root_mean_square(tile::norm_of(square, scale), columns, p.epsilon);
        factor = inverse(divisor);
    }
    if (p.finish == kChunkNorm) factor = chunk_norm<Real>(p, place.batch, position);
    int64_t row = (place.batch * p.heads + head) * p.queries + query;
    bool is_raw = p.finish == kRaw;
    void* to = is_raw ? p.raw : p.out;
    int64_t first = row * p.value_width + place.first_column(p);
    each_column(columns, [&](int c) { store_as<Element>(to, first + c, sum(c) * factor, is_raw || p.is_out_wide); });
    bool has_statistic = p.statistic && (p.finish == kNormalize || p.finish == kRmsNorm);
    if (has_statistic && place.value_tile == 0 && ptx::lane() == 0) static_cast<Real*>(p.statistic)[row] = divisor;
}

}  // namespace attn::linear
