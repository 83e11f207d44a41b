// Adds up the parts of rows whose keys were divided among blocks, and finishes them. A warp per row; parts in order.
//
//     m = max m_s;   o = Σ_s 2^{m_s − m} o_s;   weights likewise;   then as a single block would
//
// Also finishes rows whose norm needs more columns than one block has.

#include "weight.cuh"

namespace attn::quadratic {

template <class Element>
struct Combine {
    using Real = typename Sums<Element>::Real;
    const QuadraticParams<Element>& params;
    int64_t row, rows;

    DEVICE Real part_maximum(int part) const { return params.partial_weights[2 * (part * rows + row)]; }
    DEVICE Real part_weight(int part) const { return params.partial_weights[2 * (part * rows + row) + 1]; }
    DEVICE Real part_sum(int part, int column) const {
        return params.partial_sums[(part * rows + row) * params.value_width + column];
    }

    DEVICE Real maximum() const {
        Real largest = part_maximum(0);
        for (int part = 1; part < params.splits; ++part) largest = ptx::max(largest, part_maximum(part));
        return largest;
    }

    DEVICE Real factor(int part, Real maximum) const {
        return ptx::exp2(part_maximum(part) - Softmax::shift(maximum));
    }

    DEVICE Real weight(Real maximum) const {
        Real sum = 0;
        for (int part = 0; part < params.splits; ++part) sum += factor(part, maximum) * part_weight(part);
        return sum;
    }

    DEVICE Real sum(int column, Real maximum) const {
        Real sum = 0;
        for (int part = 0; part < params.splits; ++part) sum += factor(part, maximum) * part_sum(part, column);
        return sum;
    }

    // √(Σ x²) over the row, on all lanes.
    DEVICE Real norm(Real maximum) const {
        Real largest = 0, squares = 0;
        for (int column = ptx::lane(); column < params.value_width; column += 32) {
            largest = ptx::max(largest, ptx::abs(sum(column, maximum)));
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            largest = ptx::max(largest, ptx::shuffle_xor(largest, distance));
        }
        Real scale = tile::scale_of_squares(largest);
        for (int column = ptx::lane(); column < params.value_width; column += 32) {
            Real x = sum(column, maximum) * scale;
            squares += x * x;
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) squares += ptx::shuffle_xor(squares, distance);
        return tile::norm_of(squares, scale);
    }
};

template <class Element>
DEVICE void combine(const QuadraticParams<Element>& params) {
    using Real = typename Sums<Element>::Real;
    int64_t rows = params.row(params.batch, 0, 0);
    int64_t row = ptx::block_x() * kWarps + ptx::warp();
    if (row >= rows) return;
    Combine<Element> parts{params, row, rows};
    Real maximum = parts.maximum();
    Real norm = params.finish == kRmsNorm ? parts.norm(maximum) : Real(0);
    int64_t query = row % params.queries, head = row / params.queries % params.heads;
    int64_t batch = row / params.queries / params.heads;
    auto finish = Finish<Real>::of(params, batch, maximum, parts.weight(maximum), norm);
    const tile::Strides& strides = params.out_strides;
    int64_t out = batch * strides.batch + head * strides.head + query * strides.row;
    for (int column = ptx::lane(); column < params.value_width; column += 32) {
        Real x = parts.sum(column, maximum) * finish.factor;
        if (params.is_out_wide) {
            static_cast<Real*>(params.out)[out + column] = x;
        } else {
            static_cast<Element*>(params.out)[out + column] = tile::narrow<Element>(x);
        }
    }
    if (params.statistic != nullptr && ptx::lane() == 0) *params.statistic_of(batch, head, query) = finish.statistic;
}

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_combine_bf16, combine<attn::ptx::bf16>, QuadraticParams<attn::ptx::bf16>, kThreads)
ATTN_KERNEL(quadratic_combine_f16, combine<attn::ptx::f16>, QuadraticParams<attn::ptx::f16>, kThreads)
ATTN_KERNEL(quadratic_combine_f32, combine<float>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_combine_f64, combine<double>, QuadraticParams<double>, kThreads)
