// Weights of a warpgroup's rows on their way through the keys: what weight.cuh has for a warp, for operands that are rounded
// to 16 bits. Rows have a maximum, a sum of this lane's weights, and sums of weighted values, all up to a factor that
// changes on the way.
#pragma once

#include "weight.cuh"

namespace attn::quadratic {

// As Softmax; its factor is that of the largest logit.
struct SoftmaxOfRows : Softmax {
    using Softmax::Softmax;
    // Of scores that a row does not see.
    static constexpr float kHidden = -__builtin_huge_valf();
    static constexpr bool kHasNorm = false, kScales = false;

    // What the sum has to be multiplied by in the end.
    DEVICE float unit(float) const { return 1.0f; }
};

// As Relu. f16 has no range for squares: there the factor is a power of two that brings the largest weight close to 2¹⁴.
template <class Element>
struct ReluOfRows : Relu {
    using Relu::Relu;
    static constexpr float kHidden = 0.0f;
    static constexpr bool kHasNorm = true;
    static constexpr bool kScales = !ptx::is_bf16<Element>;

    // What scores are multiplied by, of a row with this largest one.
    DEVICE float scale(float maximum) const { return ptx::scale_to(maximum, is_squared ? 6 : 13); }

    DEVICE float power(float x) const { return is_squared ? x * x : x; }

    DEVICE float unit(float maximum) const { return kScales ? 1.0f / power(scale(maximum)) : 1.0f; }

    // scores: products → weights; what brings earlier sums to the new factor.
    template <int N>
    DEVICE tile::RowValues<float, 1> weigh(tile::Accumulator<float, 1, N>& scores, float factor,
                                           tile::RowValues<float, 1>& maximum, tile::RowValues<float, 1>& sum) const {
        scores.each([factor](int, int, float& x) { x = positive(x * factor); });
        auto rescale = tile::RowValues<float, 1>::filled(1.0f);
        if constexpr (kScales) {
            auto scales = scores.row_maxima(maximum);
            rescale = maximum;
            maximum = scales;
            scales.each([this](int, float& x) { x = scale(x); });
            rescale.with(scales, [this](float& x, float now) { x = power(now / scale(x)); });
            scores.scale_rows(scales);
            sum.with(rescale, [](float& x, float by) { x *= by; });
        }
        if (is_squared) scores.each([](int, int, float& x) { x *= x; });
        sum.with(scores.fold_lane([](float a, float b) { return a + b; }), [](float& x, float more) { x += more; });
        return rescale;
    }
};

// Scores and gradients of weights in the backward pass, with the statistic and δ of RowFactors: what is kept of a score
// until the gradient of its weight has come (0 where hidden), the gradient of the score, and the weight.
struct SoftmaxGradients : Softmax {
    using Softmax::Softmax;
    // Of rows that are not there.
    static constexpr float kNoStatistic = __builtin_huge_valf();
    static constexpr bool kHasExponentials = true;

    DEVICE float kept(float product, float factor, float statistic) const {
        return Softmax::weight(product, factor, statistic);
    }
    DEVICE float d_score(float kept, float d_weight, float delta, float) const { return kept * (d_weight - delta); }
    DEVICE float weight_of(float kept, float) const { return kept; }
};

struct SquaredReluGradients {
    static constexpr double kUnit = 1;
    static constexpr float kNoStatistic = 0.0f;
    static constexpr bool kHasExponentials = false;

    template <class Params>
    DEVICE explicit SquaredReluGradients(const Params&) {}

    DEVICE float kept(float product, float factor, float) const { return positive(product * factor); }
    DEVICE float d_score(float kept, float d_weight, float delta, float of_row) const {
        return (kept + kept) * (d_weight - delta) * of_row;
    }
    DEVICE float weight_of(float kept, float of_row) const { return kept * kept * of_row; }
};

}  // namespace attn::quadratic
