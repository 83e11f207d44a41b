// Outputs of the linear engine, tile by tile: the part inside the tile by its weights, the part before it by the
// carried sums.
//
//   o_i = finish(e^{G_i} φ(q_i) S + Σ_{j ≤ i} e^{G_i − G_j} ⟨φ(q_i), φ(k_j)⟩ v_j)
//   S ← e^{G_C} S + Σ_j e^{G_C − G_j} φ(k_j)ᵀ v_j
//
// One block: a segment of the positions of a state head, for a tile of value columns and all output heads that read it.
// Pieces: rows, z, S [D′ × columns], φ(k) and φ(q) [32 × D′], values and sums [32 × columns], weights [32 × 32], for
// FAVOR+ x [32 × D]. All warps work on the same step; a barrier ends each.
#include "finish.cuh"
#include "state.cuh"

namespace attn::linear {

template <class Memory>
struct Outputs {
    using Element = typename Memory::Element;
    using Real = typename Memory::Real;

    const LinearParams& p;
    Tiles<Memory> tiles;
    KeyState<Memory> state;
    WideTile<Real> sums;

    DEVICE explicit Outputs(const LinearParams& params)
        : p(params), tiles(params), state(params), sums(tile_piece<Memory>(params, kPieceSums, params.values_row)) {}

    DEVICE void read(Range tile) {
        for (int64_t reader = 0; reader < tiles.readers(); ++reader) {
            tiles.load_queries(reader, tile);
            if (is_inclusive(p)) {
                tiles.score();
                ptx::barrier_sync();
            }
            sum();
            ptx::barrier_sync();
            each_row([&](int r) {
                if (!tiles.has_query(tile, r)) return;
                finish_row<Element>(
                    p, tiles.place, tiles.reader_head(reader), tiles.query_at(tile, r), tile.start + r,
                    [&] { return norm(r); }, [&](int c) { return sums.at(r, c); });
            });
            ptx::barrier_sync();
        }
    }

    // e^{G} φ(q) S + weights · v
    DEVICE void sum() {
        using Math = typename Arithmetic<Element>::Math;
        bool is_decayed = is_inclusive(p) && decays(p);
        auto queries = left_rows<Math>(tiles.query_phi), weights = left_rows<Math>(tiles.weights);
        auto before = right_rows<Math>(state.s), inside = right_rows<Math>(tiles.values);
        each_block<1, 4>(kTile, p.value_tile, [&](int row, int column) {
            auto block = Accumulator<Real, 1, 4>::zero();
            accumulate<Math>(block, queries(row), before(column), p.features_padded);
            if (is_decayed) block.each([&](int r, int, Real& x) { x *= tiles.rows->from_start[row + r]; });
            if (is_inclusive(p)) accumulate<Math>(block, weights(row), inside(column), kTile);
            block.put([&](int r, int c, Real x) { sums.at(row + r, column + c) = x; });
        });
    }

    // ⟨φ(q), z⟩ of all keys seen, by a warp.
    DEVICE Real norm(int r) const {
        Real before = row_sum<Real>(p.features, [&](int f) { return tiles.query_phi.at(r, f) * state.z[f]; });
        if (!is_inclusive(p)) return before;
        Real inside = row_sum<Real>(kTile, [&](int j) { return tiles.weights.at(r, j); });
        return (decays(p) ? before * tiles.rows->from_start[r] : before) + inside;
    }

    DEVICE void visit(Range tile, bool reads, bool absorbs) {
        if (absorbs) tiles.load_keys(tile);
        if (reads) read(tile);
        if (absorbs) state.absorb_keys(tiles);
    }

    DEVICE void run() {
        state.enter(tiles);
        each_visit(p, tiles.place.positions(p), false, *this);
        if (tiles.place.is_last(p)) state.store_final(tiles);
    }
};

template <class Memory>
DEVICE void outputs(const LinearParams& p) {
    Outputs<Memory>(p).run();
}

ATTN_KERNEL(linear_outputs_f32, outputs<InShared<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_outputs_f64, outputs<InShared<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_outputs_f16, outputs<InShared<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_outputs_bf16, outputs<InShared<ptx::bf16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_outputs_spilled_f32, outputs<Spilled<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_outputs_spilled_f64, outputs<Spilled<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_outputs_spilled_f16, outputs<Spilled<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_outputs_spilled_bf16, outputs<Spilled<ptx::bf16>>, LinearParams, kThreads)

}  // namespace attn::linear
