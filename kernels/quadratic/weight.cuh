// What logits turn into: softmax, or a rectified score, squared on demand. Each has the running state of the rows of a
// warp for the forward pass, and weight and gradient of one score for the backward pass.
#pragma once

#include "../tile/norm.cuh"
#include "config.cuh"

namespace attn::quadratic {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class Real>
DEVICE Real positive(Real x) {
    // NaN stays.
    return x <= Real(0) ? Real(0) : x;
}

template <class Real>
struct Weighted {
    Real weight, d_score;
};

// Of RowFactors.
template <class Real>
struct RowPair {
    Real statistic, delta;
};

// Powers of 2 below the largest logit so far. `maximum` and `sum` are of the rows; sums are of this lane's columns until
// they are finished.
struct Softmax {
    // Logits come times this.
    static constexpr double kUnit = kLog2E;

    template <class Params>
    DEVICE explicit Softmax(const Params&) {}

    template <class Real>
    DEVICE static Real initial_maximum() {
        return -Real(__builtin_huge_val());
    }

    // Where no logit is above -inf, powers are taken of the logits themselves: 0, or NaN for NaN.
    template <class Real>
    DEVICE static Real shift(Real maximum) {
        return maximum == -Real(__builtin_huge_val()) ? Real(0) : maximum;
    }

    // scores: logits up to `factor` > 0 → weights; what brings earlier sums to the new maximum.
    template <class Real, int M, int N>
    DEVICE tile::RowValues<Real, M> weigh(tile::Accumulator<Real, M, N>& scores, Real factor,
                                          tile::RowValues<Real, M>& maximum, tile::RowValues<Real, M>& sum) const {
        auto larger = [](Real a, Real b) { return ptx::max(a, b); };
        auto largest = scores.fold_lane(larger).fold_lanes(larger);
        largest.with(maximum, [factor](Real& x, Real old) { x = ptx::max(old, x * factor); });
        auto rescale = maximum;
        rescale.with(largest, [](Real& x, Real now) { x = ptx::exp2(x - shift(now)); });
        maximum = largest;
        auto shifts = maximum;
        shifts.each([](int, Real& x) { x = shift(x); });
        scores.with_rows(shifts, [factor](Real& x, Real shift) { x = ptx::exp2(ptx::fma(x, factor, -shift)); });
        sum.with(rescale, [](Real& x, Real by) { x *= by; });
        sum.with(scores.fold_lane([](Real a, Real b) { return a + b; }), [](Real& x, Real more) { x += more; });
        return rescale;
    }

    // The same, and brings them there.
    template <class Real, int M, int N, int K>
    DEVICE void absorb(tile::Accumulator<Real, M, N>& scores, Real factor, tile::RowValues<Real, M>& maximum,
                       tile::RowValues<Real, M>& sum, tile::Accumulator<Real, M, K>& sums) const {
        sums.scale_rows(weigh(scores, factor, maximum, sum));
    }

    // Weight of a logit up to `factor`, with the statistic of RowFactors.
    template <class Real>
    DEVICE static Real weight(Real logit, Real factor, Real statistic) {
        return ptx::exp2(ptx::fma(logit, factor, -statistic));
    }

    // Weight and gradient of a score, from its logit up to `factor`, the gradient of the weight, and RowFactors.
    template <class Real>
    DEVICE Weighted<Real> gradient(Real logit, Real factor, Real d_weight, Real statistic, Real delta) const {
        Real weight = Softmax::weight(logit, factor, statistic);
        return {weight, weight * (d_weight - delta)};
    }
};

struct Relu {
    static constexpr double kUnit = 1;
    bool is_squared;

    template <class Params>
    DEVICE explicit Relu(const Params& params) : is_squared(params.weight == kReluSquared) {}

    template <class Real>
    DEVICE static Real initial_maximum() {
        return Real(0);
    }

    template <class Real, int M, int N, int K>
    DEVICE void absorb(tile::Accumulator<Real, M, N>& scores, Real factor, tile::RowValues<Real, M>&,
                       tile::RowValues<Real, M>& sum, tile::Accumulator<Real, M, K>&) const {
        scores.each([&](int, int, Real& x) {
            x = positive(x * factor);
            if (is_squared) x *= x;
        });
        sum.with(scores.fold_lane([](Real a, Real b) { return a + b; }), [](Real& x, Real more) { x += more; });
    }

    template <class Real>
    DEVICE Weighted<Real> gradient(Real logit, Real factor, Real d_weight, Real of_row, Real delta) const {
        Real score = positive(logit * factor);
        Real slope = is_squared ? score + score : Real(1);
        return {(is_squared ? score * score : score) * of_row,
                score > Real(0) ? slope * (d_weight - delta) * of_row : Real(0)};
    }
};

// 1/x, or 0 for 0.
template <class Real>
DEVICE Real inverse(Real x) {
    return x == Real(0) ? Real(0) : Real(1) / x;
}

// What a row's sum is multiplied by in the end, and the statistic that is kept: the log-sum-exp, or the divisor.
template <class Real>
struct Finish {
    Real factor, statistic;

    // Of a row of a batch entry: its largest logit, its sum of weights, and the norm √(Σ x²) of its sums x.
    template <class Params>
    DEVICE static Finish of(const Params& params, int64_t batch, Real maximum, Real sum, Real norm) {
        Real constant = Real(params.constant_of(batch));
        if (params.weight == kSoftmax) {
            Real log_sum = sum == Real(0) ? -Real(__builtin_huge_val()) : (maximum + ptx::log2(sum)) * Real(kLn2);
            return {inverse(sum), log_sum};
        }
        if (params.finish == kScale) return {constant, Real(1)};
        if (params.finish == kRowSum) return {inverse(sum + constant), sum + constant};
        if (params.finish == kRmsNorm) {
            Real divisor = tile::root_mean_square(norm, params.value_width, params.constant);
            return {inverse(divisor), divisor};
        }
        return {Real(1), Real(1)};
    }
};

}  // namespace attn::quadratic
