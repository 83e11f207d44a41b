// From products of queries and keys to logits: scale, soft-cap, bias, key mask, and what a row sees of a tile.
#pragma once

#include "config.cuh"

namespace attn::quadratic {

// A tile of scores whose rows are queries and whose columns are keys.
template <class Params>
struct QueriesByKeys {
    const Params& params;
    int64_t first_query, first_key;

    DEVICE int64_t query(int row, int) const { return first_query + row; }
    DEVICE int64_t key(int, int column) const { return first_key + column; }

    // Columns that a row sees, from the first of the tile on.
    DEVICE Range visible(int row) const {
        int64_t i = first_query + row;
        if (i >= params.queries) return {0, 0};
        Range keys = params.visible_keys(i);
        return {keys.low - first_key, keys.high - first_key};
    }
};

// A tile of scores whose rows are keys and whose columns are queries.
template <class Params>
struct KeysByQueries {
    const Params& params;
    int64_t first_query, first_key;

    DEVICE int64_t query(int, int column) const { return first_query + column; }
    DEVICE int64_t key(int row, int) const { return first_key + row; }

    DEVICE Range visible(int row) const {
        int64_t j = first_key + row;
        if (j >= params.keys) return {0, 0};
        Range queries = params.seeing_queries(j);
        return {queries.low - first_query, queries.high - first_query};
    }
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
                Range visible = place.visible(row + 16 * m + tile::block_row(2 * half)).clipped(0, columns);
                bounds.low.value[m][half] = int(visible.low);
                bounds.high.value[m][half] = int(visible.high);
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
    // 0: none
    Real cap;
    // Of the key after the query's position by no key; null: none.
    const Element* bias;
    const uint8_t* mask;

    DEVICE Logits(const Params& params, double unit, int64_t batch, int64_t head)
        : scale(Real(params.scale)), unit(Real(unit)), cap(Real(params.soft_cap)), bias(params.bias),
          mask(params.mask_of(batch)) {
        if (bias != nullptr) bias += head * params.bias_stride + params.bias_radius - params.offset();
    }

    // Whether logits are products times a positive factor.
    DEVICE bool are_plain() const { return cap == Real(0) && bias == nullptr && mask == nullptr && scale > Real(0); }

    DEVICE Real factor() const { return scale * unit; }

    // tanh(scale x / cap)
    DEVICE Real squashed(Real x) const { return ptx::tanh(x * (scale / cap)); }

    // The logit of a visible pair, from a score with scale and soft-cap; -inf if the key is masked.
    DEVICE Real finished(Real x, int64_t query, int64_t key) const {
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
};

}  // namespace attn::quadratic
