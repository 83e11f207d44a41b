// Norms of numbers of any size, whose squares may have no place in the range of their type.
#pragma once

#include "../ptx/math.cuh"

namespace attn::tile {

// What numbers are multiplied by before they are squared, if this is the largest of them.
template <class Real>
DEVICE Real scale_of_squares(Real largest) {
    return ptx::scale_to(largest, 0);
}

// √(Σ x²) from Σ (scale x)².
template <class Real>
DEVICE Real norm_of(Real squares, Real scale) {
    return ptx::sqrt(squares) / scale;
}

// The norm of two parts together, from theirs.
template <class Real>
DEVICE Real norm_of_both(Real a, Real b) {
    Real scale = scale_of_squares(ptx::max(a, b));
    a *= scale, b *= scale;
    return norm_of(a * a + b * b, scale);
}

// √(norm²/count + ε)
template <class Real>
DEVICE Real root_mean_square(Real norm, int64_t count, double epsilon) {
    Real root = Real(ptx::sqrt(epsilon)), scale = scale_of_squares(ptx::max(norm, root));
    norm *= scale, root *= scale;
    return norm_of(norm * norm / Real(count) + root * root, scale);
}

}  // namespace attn::tile
