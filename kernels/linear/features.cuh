// φ on a tile of rows in shared memory, and its derivative. All threads of a block take part; barriers are the caller's
// unless it says otherwise.
#pragma once

#include "block.cuh"

namespace attn::linear {

constexpr double kReluOffset = 1e-3;

template <class Real>
DEVICE Real map_element(int map, Real x) {
    switch (map) {
        case kEluPlusOne: return x >= Real(0) ? x + Real(1) : ptx::exp(x);
        case kRelu: return ptx::max(x, Real(0));
        case kReluSquared: return ptx::max(x, Real(0)) * ptx::max(x, Real(0));
        case kSilu: return x / (Real(1) + ptx::exp(-x));
        case kExp: return ptx::exp(x);
        default: return x;
    }
}

// φ′(x), given φ(x) too.
template <class Real>
DEVICE Real map_slope(int map, Real x, Real phi) {
    switch (map) {
        case kEluPlusOne: return ptx::min(phi, Real(1));
        case kRelu: return x > Real(0) ? Real(1) : Real(0);
        case kReluSquared: return Real(2) * ptx::max(x, Real(0));
        case kSilu: {
            Real sigmoid = Real(1) / (Real(1) + ptx::exp(-x));
            return sigmoid * (Real(1) + x * (Real(1) - sigmoid));
        }
        case kExp: return phi;
        default: return Real(1);
    }
}

DEVICE bool is_elementwise(const LinearParams& p) { return p.map < kSoftmax; }

// Where rows of x are loaded so that φ can be computed in place: beside the features where these begin with x, in a
// tile of its own for FAVOR+.
template <class Real>
DEVICE WideTile<Real> x_tile(const LinearParams& p, const WideTile<Real>& phi, const WideTile<Real>& x) {
    if (is_favor(p)) return x;
    return p.map == kTaylor || p.map == kCosine ? phi.from(0, 1) : phi;
}

// Columns of that tile that must be filled.
DEVICE int x_columns(const LinearParams& p) {
    if (is_favor(p)) return p.width_padded;
    return p.map == kTaylor || p.map == kCosine ? p.width : p.features_padded;
}

// Σ f(column) over the columns below `count`, by a warp.
template <class Real, class F>
DEVICE Real row_sum(int count, F f) {
    Real sum = Real(0);
    for (int c = ptx::lane(); c < count; c += 32) sum += f(c);
    return warp_sum(sum);
}

template <class Real, class F>
DEVICE Real row_max(int count, F f) {
    Real maximum = negative_infinity<Real>();
    for (int c = ptx::lane(); c < count; c += 32) maximum = ptx::max(maximum, f(c));
    return warp_max(maximum);
}

// Largest size of the numbers of a row, by which their squares neither under- nor overflow.
template <class Real, class F>
DEVICE Real largest_size(int count, F f) {
    return row_max<Real>(count, [&](int c) { return ptx::abs(f(c)); });
}

template <class F>
DEVICE void each_column(int count, F f) {
    for (int c = ptx::lane(); c < count; c += 32) f(c);
}

template <class Real>
DEVICE void softmax_row(const LinearParams& p, Real* row) {
    Real maximum = row_max<Real>(p.features, [&](int c) { return row[c]; });
    Real sum = row_sum<Real>(p.features, [&](int c) { return row[c] = ptx::exp(row[c] - maximum); });
    Real factor = inverse(sum);
    each_column(p.features, [&](int c) { row[c] *= factor; });
}

template <class Real>
DEVICE void cosine_row(const LinearParams& p, Real* row) {
    Real largest = largest_size<Real>(p.width, [&](int c) { return row[1 + c]; });
    if (largest == Real(0)) return;
    Real square = row_sum<Real>(p.width, [&](int c) { return row[1 + c] /= largest, row[1 + c] * row[1 + c]; });
    Real factor = Real(1) / ptx::sqrt(square);
    each_column(p.width, [&](int c) { row[1 + c] *= factor; });
}

template <class Real>
DEVICE void taylor_row(const LinearParams& p, Real* row) {
    each_column(p.width * p.width, [&](int c) {
        row[1 + p.width + c] = row[1 + c / p.width] * Real(0.70710678118654752440) * row[1 + c % p.width];
    });
}

// Whether each feature is that of one number: of x, or of a projection.
DEVICE bool is_by_number(const LinearParams& p) { return is_elementwise(p) || p.map == kReluFeatures; }

template <class Real>
DEVICE Real map_number(const LinearParams& p, Real x) {
    if (p.map != kReluFeatures) return map_element(p.map, x);
    return ptx::max(x, Real(0)) / ptx::sqrt(Real(ptx::max(p.directions_count, 1))) + Real(kReluOffset);
}

// φ of a row, by a warp; zeros unless kept, and in the columns past D′. x is where `x_tile` put it; not for exponential
// FAVOR+ features.
template <class Real>
DEVICE void map_row(const LinearParams& p, Real* row, bool is_kept) {
    if (is_by_number(p)) each_column(p.features, [&](int c) { row[c] = map_number(p, row[c]); });
    if (p.map == kSoftmax) softmax_row(p, row);
    if (p.map == kCosine) cosine_row(p, row);
    if (p.map == kTaylor) taylor_row(p, row);
    if ((p.map == kCosine || p.map == kTaylor) && ptx::lane() == 0) row[0] = Real(1);
    ptx::warp_sync();
    each_column(p.features_padded, [&](int c) {
        if (c >= p.features || !is_kept) row[c] = Real(0);
    });
}

// The same for the tile's rows, kept where keep(row).
template <class Real, class Keep>
DEVICE void map_rows(const LinearParams& p, const WideTile<Real>& phi, Keep keep) {
    if (!is_by_number(p)) return each_row([&](int r) { map_row(p, &phi.at(r, 0), keep(r)); });
    each_element(kTile, p.features_padded, [&](int r, int c) {
        Real y = map_number(p, phi.at(r, c));
        phi.at(r, c) = c < p.features && keep(r) ? y : Real(0);
    });
}

// ωx̃ into the first m columns of φ, zeros in the others up to whole blocks.
template <class Element, class Real = typename Arithmetic<Element>::Real>
DEVICE void project(const LinearParams& p, const WideTile<Real>& phi, const WideTile<Real>& x) {
    using Math = typename Arithmetic<Element>::ExactMath;
    WideTile<Real> directions{static_cast<Real*>(p.directions), p.width_row};
    int columns = (p.directions_count + kTile - 1) / kTile * kTile;
    product<Math, 1, 2>(
        kTile, columns, p.width_padded, left_rows<Math>(x), right_transposed<Math>(directions),
        [](int, int) { return Real(0); }, [&](int r, int c, Real sum) { phi.at(r, c) = sum; });
}

// ‖x̃‖²/2 of a row, by a warp.
template <class Real>
DEVICE Real half_square(const LinearParams& p, const WideTile<Real>& x, int r) {
    Real square = row_sum<Real>(p.width, [&](int c) { return x.at(r, c) * x.at(r, c); });
    return square * (Real(0.5) / ptx::sqrt(Real(p.width)));
}

// The largest exponent of a projected row, ‖x̃‖²/2 left out, by a warp.
template <class Real>
DEVICE Real largest_exponent(const LinearParams& p, const Real* row) {
    bool is_hyperbolic = p.map == kHyperbolic;
    return row_max<Real>(p.directions_count, [&](int c) { return is_hyperbolic ? ptx::abs(row[c]) : row[c]; });
}

// Projections of a row become exponential features relative to `shift`; zeros unless kept. By a warp.
template <class Real>
DEVICE void exponential_row(const LinearParams& p, Real* row, Real shift, bool is_kept) {
    Real factor = Real(1) / ptx::sqrt(Real(p.features));
    int count = p.directions_count;
    for (int c = ptx::lane(); c < count; c += 32) {
        Real x = row[c];
        row[c] = is_kept ? ptx::exp(x - shift) * factor : Real(0);
        if (p.map == kHyperbolic) row[count + c] = is_kept ? ptx::exp(-x - shift) * factor : Real(0);
    }
    for (int c = p.features + ptx::lane(); c < p.features_padded; c += 32) row[c] = Real(0);
}

// store(column, dx) of a row for maps of whole rows, by a warp.
template <class Real, class Store>
DEVICE void softmax_gradient(const LinearParams& p, const Real* phi, const Real* d_phi, Store store) {
    Real mean = row_sum<Real>(p.features, [&](int c) { return phi[c] * d_phi[c]; });
    each_column(p.width, [&](int c) { store(c, phi[c] * (d_phi[c] - mean)); });
}

template <class Real, class X, class Store>
DEVICE void cosine_gradient(const LinearParams& p, const Real* phi, const Real* d_phi, X x, Store store) {
    Real largest = largest_size<Real>(p.width, x);
    if (largest == Real(0)) return each_column(p.width, [&](int c) { store(c, Real(0)); });
    Real square = row_sum<Real>(p.width, [&](int c) { return x(c) / largest * (x(c) / largest); });
    Real along = row_sum<Real>(p.width, [&](int c) { return phi[1 + c] * d_phi[1 + c]; });
    Real factor = Real(1) / ptx::sqrt(square);
    each_column(p.width, [&](int c) { store(c, (d_phi[1 + c] - phi[1 + c] * along) * factor / largest); });
}

template <class Real, class Store>
DEVICE void taylor_gradient(const LinearParams& p, const Real* phi, const Real* d_phi, Store store) {
    const Real* squares = d_phi + 1 + p.width;
    each_column(p.width, [&](int i) {
        Real pairs = Real(0);
        for (int j = 0; j < p.width; ++j) pairs += (squares[i * p.width + j] + squares[j * p.width + i]) * phi[1 + j];
        store(i, d_phi[1 + i] + Real(0.70710678118654752440) * pairs);
    });
}

// dφ of FAVOR+ features becomes the gradient of ωx̃, in the first m columns, with zeros up to whole blocks; the result
// is Σ dφ φ, by which the row of x enters the gradient (0 for ReLU features). By a warp.
template <class Real>
DEVICE Real projection_gradient(const LinearParams& p, const Real* phi, Real* d_phi) {
    int count = p.directions_count, padded = (count + kTile - 1) / kTile * kTile;
    Real relu_factor = Real(1) / ptx::sqrt(Real(count)), sum = Real(0);
    for (int c = ptx::lane(); c < padded; c += 32) {
        Real d = Real(0);
        if (c < count && p.map == kReluFeatures) d = phi[c] > Real(kReluOffset) ? d_phi[c] * relu_factor : Real(0);
        if (c < count && p.map != kReluFeatures) {
            Real positive = d_phi[c] * phi[c], negative = Real(0);
            if (p.map == kHyperbolic) negative = d_phi[count + c] * phi[count + c];
            sum += positive + negative;
            d = positive - negative;
        }
        // Column c of the second half is read by the lane at c − m, which may come later.
        if (p.map == kHyperbolic) ptx::warp_sync();
        d_phi[c] = d;
    }
    return warp_sum(sum);
}

}  // namespace attn::linear
