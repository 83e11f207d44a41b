// A tile's keys and queries with their features.
#pragma once

#include "features.cuh"

namespace attn::linear {

// What a kernel keeps per row of a tile, always in shared memory.
template <class Real>
struct TileRows {
    // Keys. Rows without a key, or whose key is masked, have zero features and values.
    int present[kTile];
    // Last row up to each at which all that is before it is cut off; −1 if there is none.
    int cut[kTile];
    // G, the log-decay summed from the tile's start through each row, cuts aside, as the sum of two numbers.
    Real high[kTile], low[kTile];
    // e^{G}: what is left at each row of the sums entering the tile; e^{G_C − G}: what is left of each row at its end.
    // 0 behind the first cut, and before the last one.
    Real from_start[kTile], to_end[kTile];
    // Largest exponent of each row, then its stabiliser.
    Real shift[kTile], half_square[kTile];
    // What is left at the tile's end of the sums entering it.
    Real decay;
    // Stabiliser of the keys so far.
    Real stabilizer;
    // Gradients of ⟨φ(q), z⟩.
    Real d_norm[kTile];
    // Σ over pairs of a row with those of other tiles, by which the log-decays between them count.
    double d_log[kTile];

    // What is left at row i of what row j ≤ i adds.
    DEVICE Real decay_between(int i, int j) const {
        return j < cut[i] ? Real(0) : ptx::exp((high[i] - high[j]) + (low[i] - low[j]));
    }
};

// What the plan sets aside for it, in numbers.
constexpr int kRowsSize = 384;
static_assert(sizeof(TileRows<float>) <= kRowsSize * sizeof(float), "rows of f32");
static_assert(sizeof(TileRows<double>) <= kRowsSize * sizeof(double), "rows of f64");

// A sum in twice the precision: differences of long sums of decays count, however large the sums.
struct DoubledSum {
    double high, low;

    DEVICE void add(const DoubledSum& other) {
        double sum = high + other.high, part = sum - high;
        low += other.low + ((high - (sum - part)) + (other.high - part));
        high = sum;
    }
};

// Whether nothing is left of sums after a step of this log-decay. In a sum of log-decays, one as large would swallow the
// others.
template <class Real>
DEVICE bool cuts_off(double log_decay) {
    return log_decay < (sizeof(Real) == sizeof(double) ? -746.0 : -104.0);
}

// The last of the lanes up to each for which it holds; −1 if there is none.
DEVICE int last_lane(bool holds) {
    int last = holds ? ptx::lane() : -1;
    for (int delta = 1; delta < 32; delta *= 2) last = ptx::max(last, ptx::shuffle_up(last, delta));
    return last;
}

template <class Memory>
struct Tiles {
    using Element = typename Memory::Element;
    using Real = typename Memory::Real;

    const LinearParams& p;
    Place place;
    TileRows<Real>* rows;
    WideTile<Real> key_phi, query_phi, x, values, weights;

    DEVICE explicit Tiles(const LinearParams& params)
        : p(params),
          place(Place::of_block(params)),
          rows(piece<Memory, TileRows<Real>>(params, kPieceRows)),
          key_phi(tile_piece<Memory>(params, kPieceKeyPhi, params.features_row)),
          query_phi(tile_piece<Memory>(params, kPieceQueryPhi, params.features_row)),
          x(tile_piece<Memory>(params, kPieceX, params.width_row)),
          values(tile_piece<Memory>(params, kPieceValues, params.values_row)),
          weights(tile_piece<Memory>(params, kPieceWeights, params.weights_row)) {}

    DEVICE Rows<const Element> head_rows(const void* data, const tile::Strides& strides, int64_t head, int64_t count,
                                         int width) const {
        return tile::rows_of_head(static_cast<const Element*>(data), strides, place.batch, head, count, width);
    }

    // Output head of a reader of this state head, by index.
    DEVICE int64_t reader_head(int64_t reader) const { return place.head * readers() + reader; }
    DEVICE int64_t readers() const { return p.heads / p.state_heads; }
    DEVICE int64_t key_head() const { return place.head * p.key_heads / p.state_heads; }
    DEVICE int64_t value_head() const { return place.head * p.value_heads / p.state_heads; }
    DEVICE int64_t query_head(int64_t reader) const { return reader_head(reader) * p.query_heads / p.heads; }

    DEVICE Rows<const Element> key_rows() const {
        return head_rows(p.k, p.k_strides, key_head(), p.keys, p.width);
    }
    DEVICE Rows<const Element> query_rows(int64_t reader) const {
        return head_rows(p.q, p.q_strides, query_head(reader), p.queries, p.width);
    }

    // The key or query at row r of a tile; it may lie outside of them.
    DEVICE int64_t key_at(Range tile, int r) const { return tile.start - p.first_key + r; }
    DEVICE int64_t query_at(Range tile, int r) const { return tile.start - p.first_query + r; }

    DEVICE bool has_key(Range tile, int r) const {
        int64_t key = key_at(tile, r);
        return tile.start + r < tile.end && key >= 0 && key < p.keys;
    }
    DEVICE bool has_query(Range tile, int r) const {
        int64_t query = query_at(tile, r);
        return tile.start + r < tile.end && query >= 0 && query < p.queries;
    }

    DEVICE bool keeps(int64_t key) const {
        if (!p.key_mask) return true;
        return static_cast<const uint8_t*>(p.key_mask)[place.batch * p.key_mask_stride + key] != 0;
    }

    // Log-decay of a key, the stabiliser's share aside. No time passes at one that the mask removes.
    DEVICE double log_decay(int64_t key) const {
        if (p.decay == kNoDecay || !keeps(key)) return 0.0;
        auto log_decay = static_cast<const Real*>(p.log_decay);
        if (p.decay == kDecayPerHead) return log_decay[place.head * p.log_decay_strides.head];
        return log_decay[place.batch * p.log_decay_strides.batch + place.head * p.log_decay_strides.head +
                         key * p.log_decay_strides.row];
    }

    DEVICE void set_stabilizer(Real stabilizer) const {
        if (ptx::thread() == 0) rows->stabilizer = stabilizer;
    }

    // Loads the keys and this block's columns of the values at `tile`, maps the keys and sets the rows' decays;
    // rows->stabilizer moves on. Between barriers.
    DEVICE void load_keys(Range tile) const {
        auto keep = [&](int64_t key) { return key < tile.end - p.first_key && keeps(key); };
        int64_t first = key_at(tile, 0);
        tile::load(x_tile(p, key_phi, x), key_rows(), first, kTile, x_columns(p), keep);
        auto v = head_rows(p.v, p.v_strides, value_head(), p.keys, p.value_width);
        v.data += place.first_column(p), v.width = place.columns(p);
        tile::load(values, v, first, kTile, p.value_tile, keep);
        for (int r = ptx::thread(); r < kTile; r += ptx::threads()) {
            rows->present[r] = has_key(tile, r) && keeps(key_at(tile, r));
        }
        ptx::barrier_sync();
        if (is_favor(p)) project_keys();
        if (decays(p)) {
            if (ptx::warp() == 0) sum_decays(tile);
            ptx::barrier_sync();
        }
        map_keys();
        ptx::barrier_sync();
    }

    // The same without features and values, where only the decays matter.
    DEVICE void load_decays(Range tile) const {
        if (is_stabilized(p)) return load_keys(tile);
        if (ptx::warp() == 0) sum_decays(tile);
        ptx::barrier_sync();
    }

    DEVICE void project_keys() const {
        project<Element>(p, key_phi, x);
        ptx::barrier_sync();
        if (!is_stabilized(p)) return;
        each_row([&](int r) {
            Real half = half_square(p, x, r), exponent = largest_exponent(p, &key_phi.at(r, 0));
            if (ptx::lane() == 0) rows->half_square[r] = half, rows->shift[r] = exponent - half;
        });
        ptx::barrier_sync();
    }

    DEVICE void map_keys() const {
        auto keep = [&](int r) { return rows->present[r] != 0; };
        if (!is_stabilized(p)) return map_rows(p, key_phi, keep);
        each_row([&](int r) {
            exponential_row(p, &key_phi.at(r, 0), rows->shift[r] + rows->half_square[r], keep(r));
        });
    }

    // Decays of the tile's rows, one per lane of a warp. A key that raises the stabiliser lets the sums before it
    // shrink.
    DEVICE void sum_decays(Range tile) const {
        int r = ptx::lane();
        double log = has_key(tile, r) ? log_decay(key_at(tile, r)) : 0.0;
        if (is_stabilized(p)) {
            Real carried = rows->stabilizer, own = rows->present[r] ? rows->shift[r] : negative_infinity<Real>();
            Real now = ptx::max(own, carried);
            for (int delta = 1; delta < 32; delta *= 2) now = ptx::max(now, ptx::shuffle_up(now, delta));
            Real before = ptx::shuffle_up(now, 1);
            if (r == 0) before = carried;
            if (before > negative_infinity<Real>()) log += double(before - now);
            rows->shift[r] = now;
            ptx::warp_sync();
            if (r == 31) rows->stabilizer = now;
        }
        bool is_cut = cuts_off<Real>(log);
        int cut = last_lane(is_cut), last_cut = ptx::shuffle(cut, 31);
        DoubledSum sum{is_cut ? 0.0 : log, 0.0};
        for (int delta = 1; delta < 32; delta *= 2) {
            DoubledSum earlier{ptx::shuffle_up(sum.high, delta), ptx::shuffle_up(sum.low, delta)};
            if (r >= delta) sum.add(earlier);
        }
        double later = (ptx::shuffle(sum.high, 31) - sum.high) + (ptx::shuffle(sum.low, 31) - sum.low);
        rows->cut[r] = cut;
        rows->high[r] = Real(sum.high);
        rows->low[r] = Real(sum.high - double(rows->high[r]) + sum.low);
        rows->from_start[r] = cut < 0 ? ptx::exp(Real(sum.high)) : Real(0);
        rows->to_end[r] = r < last_cut ? Real(0) : ptx::exp(Real(later));
        if (r == 31) rows->decay = rows->from_start[r];
    }

    // Loads and maps the queries of a reader at `tile`; rows without a query are zeros. Between barriers.
    DEVICE void load_queries(int64_t reader, Range tile) const {
        auto keep = [&](int64_t query) { return query < tile.end - p.first_query; };
        tile::load(x_tile(p, query_phi, x), query_rows(reader), query_at(tile, 0), kTile, x_columns(p), keep);
        ptx::barrier_sync();
        if (is_favor(p)) {
            project<Element>(p, query_phi, x);
            ptx::barrier_sync();
        }
        auto has = [&](int r) { return has_query(tile, r); };
        if (is_stabilized(p)) {
            each_row([&](int r) {
                Real* row = &query_phi.at(r, 0);
                Real largest = largest_exponent(p, row);
                exponential_row(p, row, largest, has(r));
            });
        } else {
            map_rows(p, query_phi, has);
        }
        ptx::barrier_sync();
    }

    // weight(i, j) of row i for the rows j ≤ i of the tile becomes what is left of it at i; others become 0.
    DEVICE void store_weight(int i, int j, Real weight) const {
        weights.at(i, j) = j > i ? Real(0) : decays(p) ? weight * rows->decay_between(i, j) : weight;
    }

    // Σ over the tile's keys of ⟨φ(q_i), φ(k_j)⟩ and its decay.
    DEVICE void score() const {
        using Math = typename Arithmetic<Element>::Math;
        product<Math, 1, 2>(
            kTile, kTile, p.features_padded, left_rows<Math>(query_phi), right_transposed<Math>(key_phi),
            [](int, int) { return Real(0); }, [&](int i, int j, Real x) { store_weight(i, j, x); });
    }

    // Multiplies the rows of features by factors.
    DEVICE void scale_features(const WideTile<Real>& phi, const Real* factors) const {
        each_element(kTile, p.features_padded, [&](int r, int c) { phi.at(r, c) *= factors[r]; });
    }
};

}  // namespace attn::linear
