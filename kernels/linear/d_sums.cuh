// The gradient of a tile's unfinished sums: dT of numerators or unnormalised rows, and dn of ⟨φ(q), z⟩.
#pragma once

#include "state.cuh"

namespace attn::linear {

template <class Memory>
struct SumsTile {
    using Element = typename Memory::Element;
    using Real = typename Memory::Real;

    const LinearParams& p;
    WideTile<Real> d_sums;

    DEVICE explicit SumsTile(const LinearParams& params)
        : p(params), d_sums(tile_piece<Memory>(params, kPieceSums, params.values_row)) {}

    // Loads this block's columns of a reader's rows; zeros where there is no query. Between barriers.
    DEVICE void load(const Tiles<Memory>& tiles, int64_t reader, Range tile) const {
        const Place& place = tiles.place;
        int64_t head = tiles.reader_head(reader);
        if (sizeof(Element) < sizeof(Real) && p.is_out_wide) {
            load_rows<Real>(tiles, head, tile);
        } else {
            load_rows<Element>(tiles, head, tile);
        }
        ptx::barrier_sync();
        int64_t out = place.batch * p.out_strides.batch + head * p.out_strides.head + place.first_column(p);
        each_row([&](int r) { unfinish_row(tiles, head, tile, r, out); });
        ptx::barrier_sync();
    }

    // The rows of d_out, whose elements are of type Stored.
    template <class Stored>
    DEVICE void load_rows(const Tiles<Memory>& tiles, int64_t head, Range tile) const {
        const Place& place = tiles.place;
        auto keep = [&](int64_t query) { return query < tile.end - p.first_query; };
        auto from = tile::rows_of_head(static_cast<const Stored*>(p.d_out), p.d_out_strides, place.batch, head, p.queries,
                                       place.columns(p));
        from.data += place.first_column(p);
        tile::load(d_sums, from, tiles.query_at(tile, 0), kTile, p.value_tile, keep);
    }

    // A row of d_out becomes that of dT, by a warp. `out` is the offset of the head's first output.
    DEVICE void unfinish_row(const Tiles<Memory>& tiles, int64_t head, Range tile, int r, int64_t out) const {
        if (ptx::lane() == 0) tiles.rows->d_norm[r] = Real(0);
        if (!tiles.has_query(tile, r) || p.finish == kNone) return;
        int columns = tiles.place.columns(p);
        int64_t query = tiles.query_at(tile, r);
        Real* row = &d_sums.at(r, 0);
        if (p.finish == kChunkNorm) {
            Real factor = chunk_norm<Real>(p, tiles.place.batch, tile.start + r);
            return each_column(columns, [&](int c) { row[c] *= factor; });
        }
        bool is_joint = p.finish == kRmsNormAllHeads;
        int64_t delta_row = is_joint ? tiles.place.batch * p.queries + query
                                     : (tiles.place.batch * p.heads + head) * p.queries + query;
        Real delta = static_cast<const Real*>(p.deltas)[delta_row];
        Real divisor = static_cast<const Real*>(p.statistic)[tiles.place.batch * p.statistic_strides.batch +
                                                             head * p.statistic_strides.head +
                                                             query * p.statistic_strides.row];
        if (p.finish == kNormalize) {
            Real factor = inverse(divisor);
            each_column(columns, [&](int c) { row[c] *= factor; });
            if (ptx::lane() == 0) tiles.rows->d_norm[r] = -delta * factor;
            return;
        }
        // dT = (dO − O·mean(O ⊙ dO))/r
        Real mean = delta / Real((is_joint ? p.heads : 1) * p.value_width);
        int64_t o = out + query * p.out_strides.row;
        each_column(columns, [&](int c) {
            row[c] = (row[c] - load_as<Element, Real>(p.out, o + c, p.is_out_wide) * mean) / divisor;
        });
    }
};

// V_ij = ⟨dT_i, v_j⟩ + dn_i and its decay, the gradients of the weights inside the tile.
template <class Memory>
DEVICE void weight_gradients(const Tiles<Memory>& tiles, const SumsTile<Memory>& sums) {
    using Real = typename Memory::Real;
    const LinearParams& p = tiles.p;
    with_math<typename Memory::Element>(p, [&](auto math) {
        using Math = decltype(math);
        product<Math, 1, 2>(
            kTile, kTile, p.value_tile, left_rows<Math>(sums.d_sums), right_transposed<Math>(tiles.values),
            [&](int i, int) { return tiles.rows->d_norm[i]; },
            [&](int i, int j, Real x) { tiles.store_weight(i, j, x); });
    });
}

// Adds ⟨φ, dφ⟩ of the tile's rows to what they have of it.
template <class Memory>
DEVICE void multiply_rows(const Tiles<Memory>& tiles, const WideTile<typename Memory::Real>& phi,
                          const WideTile<typename Memory::Real>& d_phi) {
    using Real = typename Memory::Real;
    each_row([&](int r) {
        Real sum = row_sum<Real>(tiles.p.features, [&](int f) { return phi.at(r, f) * d_phi.at(r, f); });
        if (ptx::lane() == 0) tiles.rows->d_log[r] += double(sum);
    });
}

// The stabiliser of the keys before a tile, as the queries' sweep left it. A barrier follows.
template <class Memory>
DEVICE void load_stabilizer(const Tiles<Memory>& tiles, Range tile) {
    using Real = typename Memory::Real;
    const LinearParams& p = tiles.p;
    if (is_stabilized(p) && ptx::thread() == 0) {
        int64_t count = (p.positions + kTile - 1) / kTile;
        int64_t index = tiles.place.state_head(p) * count + tile.start / kTile;
        tiles.rows->stabilizer = static_cast<const Real*>(p.tile_stabilizers)[index];
    }
    ptx::barrier_sync();
}

// R = Σ φ(q)ᵀ dT and r = Σ φ(q) dn of the queries after the block's segment, or of all of them.
template <class Memory>
DEVICE void absorb_queries(const Tiles<Memory>& tiles, State<Memory>& d_state, const SumsTile<Memory>& sums,
                           typename Memory::Real decay) {
    const LinearParams& p = tiles.p;
    if (is_inclusive(p) && decays(p)) {
        tiles.scale_features(tiles.query_phi, tiles.rows->from_start);
        ptx::barrier_sync();
    }
    with_math<typename Memory::Element>(p, [&](auto math) {
        d_state.template absorb<decltype(math)>(tiles.query_phi, sums.d_sums, tiles.rows->d_norm, decay);
    });
    ptx::barrier_sync();
}

// What is left of R at the start of the loaded tile.
template <class Memory>
DEVICE auto tile_decay(const Tiles<Memory>& tiles) {
    using Real = typename Memory::Real;
    return is_inclusive(tiles.p) && decays(tiles.p) ? tiles.rows->decay : Real(1);
}

}  // namespace attn::linear
