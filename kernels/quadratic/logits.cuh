// From products of queries and keys to logits: scale, soft-cap, bias, key mask, and what a row sees of a tile.
#pragma once

#include "config.cuh"

namespace attn::quadratic {

// A tile of scores whose rows are queries and whose columns are keys.
template <class Params>
struct QueriesByKeys {
    const Params& params;
    int first_query, first_key;

    DEVICE int query(int row, int) const { return first_query + row; }
    DEVICE int key(int, int column) const { return first_key + column; }

    // Columns that a row sees, from the first of the tile on.
    DEVICE Range visible(int row) const {
        int i = first_query + row;
        if (i >= params.queries) return {0, 0};
        Range keys = params.visible_keys(i);
        return {keys.low - first_key, keys.high - first_key};
    }
};

// A tile of scores whose rows are keys and whose columns are queries.
template <class Params>
struct KeysByQueries {
    const Params& params;
    int first_query, first_key;

    DEVICE int query(int, int column) const { return first_query + column; }
    DEVICE int key(int row, int) const { return first_key + row; }

    DEVICE Range visible(int row) const {
        int j = first_key + row;
        if (j >= params.keys) return {0, 0};
        Range queries = params.seeing_queries(j);
        return {queries.low - first_query, queries.high - first_query};
    }
};

// The tiles of `size` columns that some row of a block sees, and the columns that all its rows see.
struct OtherTiles {
    int first, end;
    // Empty if a row is missing.
    Range common;

    // Of what the first and the last row see.
    DEVICE static OtherTiles of(const Range& upper, const Range& lower, bool is_full, int size) {
        int first = upper.low / size, end = (lower.high + size - 1) / size;
        return {first, ptx::max(first, end), is_full ? Range{lower.low, upper.high} : Range{0, 0}};
    }

    template <class Params>
    DEVICE static OtherTiles of_queries(const Params& params, int first, int rows, int size) {
        int last = ptx::min(first + rows, int(params.queries)) - 1;
        return of(params.visible_keys(first), params.visible_keys(last), first + rows <= params.queries, size);
    }

    template <class Params>
    DEVICE static OtherTiles of_keys(const Params& params, int first, int rows, int size) {
        int last = ptx::min(first + rows, int(params.keys)) - 1;
        return of(params.seeing_queries(first), params.seeing_queries(last), first + rows <= params.keys, size);
    }

    DEVICE OtherTiles part(int index, int parts) const {
        int64_t count = end - first;
        return {first + int(count * index / parts), first + int(count * (index + 1) / parts), common};
    }

    // Those of which rows see every column; `upper` and `lower` are what the first and the last of them see.
    DEVICE Range whole(const Range& upper, const Range& lower, int size) const {
        int start = ptx::max((lower.low + size - 1) / size, first);
        return {start, ptx::max(ptx::min(upper.high / size, end), start)};
    }

    DEVICE bool is_whole(int column, int size) const { return column >= common.low && column + size <= common.high; }
};

// The visible columns of each row of a warp.
template <int M>
struct Bounds {
    tile::RowValues<int, M> low, high;

    // `row` is the warp's first; all columns of all rows if the tile is `whole`.
    template <class Place>
    DEVICE static Bounds of(const Place& place, int row, int columns, bool whole) {
        Bounds bounds{tile::RowValues<int, M>::filled(0), tile::RowValues<int, M>::filled(columns)};
        if (whole) return bounds;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Range visible = place.visible(row + 16 * m + tile::block_row(2 * half));
                bounds.low.value[m][half] = ptx::max(visible.low, 0);
                bounds.high.value[m][half] = ptx::min(visible.high, columns);
            }
        }
        return bounds;
    }

    DEVICE bool contains(int m, int i, int column) const {
        return column >= low.at(m, i) && column < high.at(m, i);
    }
};

template <class Real>
DEVICE Real infinity() {
    return Real(__builtin_huge_val());
}

// The logits of one query head, times `unit`.
template <class Config>
struct Logits {
    using Real = typename Config::Real;
    using Element = typename Config::Element;
    using Params = typename Config::Params;

    Real scale, unit;
    // 0: none; scale / cap
    Real cap, cap_scale;
    // Of the key after the query's position by no key; null: none.
    const Element* bias;
    const uint8_t* mask;

    DEVICE Logits(const Params& params, double unit, int64_t batch, int64_t head)
        : scale(Real(params.scale_of(batch))), unit(Real(unit)), cap(Real(params.soft_cap)), cap_scale(Real(params.cap_scale)),
          bias(params.bias), mask(params.mask_of(batch)) {
        if (bias != nullptr) bias += head * params.bias_stride + params.bias_radius - params.offset();
    }

    // Whether logits are products times a positive factor.
    DEVICE bool are_plain() const { return cap == Real(0) && bias == nullptr && mask == nullptr && scale > Real(0); }

    DEVICE Real factor() const { return scale * unit; }

    // tanh(scale x / cap)
    DEVICE Real squashed(Real x) const { return ptx::tanh(x * cap_scale); }

    // The logit of a visible pair, from a score with scale and soft-cap; -inf if the key is masked.
    DEVICE Real finished(Real x, int query, int key) const {
        if (bias != nullptr) x += tile::widen<Real>(bias[key - query]);
        if (mask != nullptr && mask[key] == 0) x = -infinity<Real>();
        return x * unit;
    }

    // Turns products into logits up to the factor that is returned, -inf where hidden.
    template <class Place>
    DEVICE Real apply(typename Config::Scores& scores, const Place& place, int row, bool whole) const {
        bool plain = are_plain();
        if (plain && whole) return factor();
        auto bounds = Bounds<Config::kBlocks>::of(place, row, Config::kOthers, whole);
        if (plain) {
            scores.each_indexed([&](int m, int i, int, int column, Real& x) {
                if (!bounds.contains(m, i, column)) x = -infinity<Real>();
            });
            return factor();
        }
        if (cap != Real(0)) {
            scores.each([&](int, int, Real& x) { x = cap * squashed(x); });
        } else {
            scores.each([&](int, int, Real& x) { x *= scale; });
        }
        scores.each_indexed([&](int m, int i, int r, int column, Real& x) {
            bool is_visible = bounds.contains(m, i, column);
            x = is_visible ? finished(x, place.query(row + r, column), place.key(row + r, column)) : -infinity<Real>();
        });
        return Real(1);
    }

    // Turns products and gradients of weights into weights, or into gradients of logits if the `weights` are not
    // wanted, and into gradients of the products up to the scale. values(m, i, column): statistic and δ of the query.
    template <class Place, class Weight, class Values>
    DEVICE void gradients(typename Config::Scores& scores, typename Config::Scores& d_scores, const Place& place,
                          int row, bool whole, const Weight& weight, Values values, bool weights) const {
        if (whole && are_plain()) {
            scores.with_indexed(d_scores, [&](int m, int i, int, int column, Real& x, Real& d) {
                auto [statistic, delta] = values(m, i, column);
                auto result = weight.gradient(x, factor(), d, statistic, delta);
                x = weights ? result.weight : result.d_score, d = result.d_score;
            });
            return;
        }
        bool is_capped = cap != Real(0);
        if (is_capped) scores.each([&](int, int, Real& x) { x = squashed(x); });
        auto bounds = Bounds<Config::kBlocks>::of(place, row, Config::kOthers, whole);
        scores.with_indexed(d_scores, [&](int m, int i, int r, int column, Real& x, Real& d) {
            auto [statistic, delta] = values(m, i, column);
            Real logit = x * (is_capped ? cap : scale), slope = is_capped ? Real(1) - x * x : Real(1);
            bool is_visible = bounds.contains(m, i, column);
            if (is_visible) logit = finished(logit, place.query(row + r, column), place.key(row + r, column));
            is_visible = is_visible && logit != -infinity<Real>();
            auto result = weight.gradient(logit, Real(1), d, statistic, delta);
            Real d_logit = is_visible ? result.d_score : Real(0);
            x = !weights ? d_logit : is_visible ? result.weight : Real(0);
            d = d_logit * slope;
        });
    }
};

}  // namespace attn::quadratic
