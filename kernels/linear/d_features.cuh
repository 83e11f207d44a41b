// From dφ of a tile's rows to the gradient of the rows themselves, stored.
#pragma once

#include "tiles.cuh"

namespace attn::linear {

// Rows of a gradient: [heads, rows, width] of batch entries, in elements or in the type of sums.
struct Sink {
    void* data;
    bool is_wide;
    int64_t head;
    int64_t count;
    int width;

    template <class Element, class Real>
    DEVICE void store(int64_t row, int column, Real x) const {
        store_as<Element>(data, (head * count + row) * width + column, x, is_wide);
    }
};

// Gradient of rows x(r) of the tile, for which keep(r), from dφ, which is used up, into row row_of(r) of the sink.
// Between barriers.
template <class Element, class Real, class Keep, class RowOf>
DEVICE void store_gradient(const LinearParams& p, const Rows<const Element>& x, const WideTile<Real>& phi,
                           const WideTile<Real>& d_phi, const WideTile<Real>& projected, const Sink& sink, Keep keep,
                           RowOf row_of) {
    auto element = [&](int r, int c) { return tile::widen<Real>(x.row(row_of(r))[c]); };
    if (is_elementwise(p)) {
        each_element(kTile, p.width, [&](int r, int c) {
            if (!keep(r)) return;
            Real slope = p.map == kIdentity ? Real(1) : map_slope(p.map, element(r, c), phi.at(r, c));
            sink.store<Element>(row_of(r), c, d_phi.at(r, c) * slope);
        });
        return;
    }
    if (!is_favor(p)) {
        each_row([&](int r) {
            if (!keep(r)) return;
            const Real *features = &phi.at(r, 0), *d_features = &d_phi.at(r, 0);
            auto own = [&](int c) { return element(r, c); };
            auto store = [&](int c, Real d) { sink.store<Element>(row_of(r), c, d); };
            if (p.map == kSoftmax) softmax_gradient(p, features, d_features, store);
            if (p.map == kCosine) cosine_gradient(p, features, d_features, own, store);
            if (p.map == kTaylor) taylor_gradient(p, features, d_features, store);
        });
        return;
    }
    each_row([&](int r) {
        Real sum = projection_gradient(p, &phi.at(r, 0), &d_phi.at(r, 0));
        if (ptx::lane() == 0) projected.at(r, 0) = sum;
    });
    ptx::barrier_sync();
    using Math = typename Arithmetic<Element>::Math;
    WideTile<Real> directions{static_cast<Real*>(p.directions), p.width_row};
    int inner = (p.directions_count + kTile - 1) / kTile * kTile;
    Real factor = Real(-1) / ptx::sqrt(Real(p.width));
    product<Math, 1, 2>(
        kTile, p.width_padded, inner, left_rows<Math>(d_phi), right_rows<Math>(directions),
        [&](int r, int c) {
            bool is_inside = c < p.width && keep(r);
            return is_inside ? factor * projected.at(r, 0) * element(r, c) : Real(0);
        },
        [&](int r, int c, Real d) {
            if (c < p.width && keep(r)) sink.store<Element>(row_of(r), c, d);
        });
}

}  // namespace attn::linear
