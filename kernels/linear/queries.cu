// Gradients of the queries, in a sweep forward in time that rebuilds S.
//
//   V_ij = (⟨dT_i, v_j⟩ + dn_i) e^{G_i − G_j} for j ≤ i
//   dφ(q) = e^G (dT Sᵀ + dn zᵀ) + V φ(k)                    S ← e^{G_C} S + (φ(k) e^{G_C−G})ᵀ v
//
// and, for the gradient of a log-decay, the sum of the rows' pairs with keys of earlier tiles, their part of
// ⟨φ(q_i), dφ(q_i)⟩, and the sum of the tile's own pairs on both sides of each key.
//
// One block: a segment of the positions of a state head, and all output heads that read it. Pieces: rows, z, S [D′ ×
// E], φ(k), φ(q), dφ(q) [32 × D′], values and dT [32 × E], V [32 × 32], for FAVOR+ x [32 × D], for the gradient of a
// log-decay pairs [32 × 32]. All warps work on the same step; a barrier ends each.
#include "d_features.cuh"
#include "state.cuh"
#include "d_sums.cuh"

namespace attn::linear {

template <class Memory>
struct Queries {
    using Element = typename Memory::Element;
    using Real = typename Memory::Real;

    const LinearParams& p;
    Tiles<Memory> tiles;
    KeyState<Memory> state;
    SumsTile<Memory> sums;
    WideTile<Real> d_phi;

    DEVICE explicit Queries(const LinearParams& params)
        : p(params),
          tiles(params),
          state(params),
          sums(params),
          d_phi(tile_piece<Memory>(params, kPieceDPhi, params.features_row)) {}

    // The keys sweep visits tiles in the other direction and needs their stabilisers.
    DEVICE void keep_stabilizer(Range tile) {
        if (!is_stabilized(p) || ptx::thread() != 0) return;
        int64_t count = (p.positions + kTile - 1) / kTile;
        int64_t index = tiles.place.state_head(p) * count + tile.start / kTile;
        static_cast<Real*>(p.tile_stabilizers)[index] = tiles.rows->stabilizer;
    }

    DEVICE void read(Range tile) {
        for (int r = ptx::thread(); r < kTile; r += ptx::threads()) tiles.rows->d_log[r] = 0.0;
        for (int64_t reader = 0; reader < tiles.readers(); ++reader) {
            tiles.load_queries(reader, tile);
            sums.load(tiles, reader, tile);
            if (is_inclusive(p)) {
                weight_gradients(tiles, sums);
                ptx::barrier_sync();
            }
            with_math<Element>(p, [&](auto math) {
                using Math = decltype(math);
                if (!p.d_log) return gradient<Math>(true, is_inclusive(p));
                gradient<Math>(true, false);
                ptx::barrier_sync();
                multiply_rows(tiles, tiles.query_phi, d_phi);
                add_crossing<Math>(tile, reader);
                ptx::barrier_sync();
                gradient<Math>(false, true);
            });
            ptx::barrier_sync();
            int64_t head = p.is_d_q_wide ? tiles.place.batch * p.heads + tiles.reader_head(reader)
                                         : tiles.place.batch * p.query_heads + tiles.query_head(reader);
            Sink sink{p.d_q, p.is_d_q_wide != 0, head, p.queries, p.width};
            store_gradient<Element>(
                p, tiles.query_rows(reader), tiles.query_phi, d_phi, tiles.x, sink,
                [&](int r) { return tiles.has_query(tile, r); }, [&](int r) { return tiles.query_at(tile, r); });
            ptx::barrier_sync();
        }
        store_log(tile);
    }

    // dφ(q) of the loaded reader: what is read of S, or what is there so far, and what the tile adds.
    template <class Math>
    DEVICE void gradient(bool reads, bool adds_tile) {
        bool is_decayed = is_inclusive(p) && decays(p);
        const TileRows<Real>& rows = *tiles.rows;
        auto d_sums = left_rows<Math>(sums.d_sums), weights = left_rows<Math>(tiles.weights);
        auto before = right_transposed<Math>(state.s);
        auto inside = right_rows<Math>(tiles.key_phi);
        each_block<1, 4>(kTile, p.features_padded, [&](int row, int column) {
            Accumulator<Real, 1, 4> block;
            block.take([&](int r, int c) {
                return reads ? rows.d_norm[row + r] * state.z[column + c] : d_phi.at(row + r, column + c);
            });
            if (reads) accumulate<Math>(block, d_sums(row), before(column), p.value_tile);
            if (reads && is_decayed) block.each([&](int r, int, Real& x) { x *= rows.from_start[row + r]; });
            if (adds_tile) accumulate<Math>(block, weights(row), inside(column), kTile);
            block.put([&](int r, int c, Real x) { d_phi.at(row + r, column + c) = x; });
        });
    }

    // Σ V_ij ⟨φ(q_i), φ(k_j)⟩ over the pairs j < t ≤ i of the loaded reader and the tile, for its keys t. As differences of
    // sums over i and over j they would leave roundings behind where decay is strong.
    template <class Math>
    DEVICE void add_crossing(Range tile, int64_t reader) {
        auto pairs = tile_piece<Memory>(p, kPiecePairs, p.weights_row);
        product<Math, 1, 2>(
            kTile, kTile, p.features_padded, left_rows<Math>(tiles.query_phi), right_transposed<Math>(tiles.key_phi),
            [](int, int) { return Real(0); },
            [&](int i, int j, Real x) { pairs.at(i, j) = j < i ? tiles.weights.at(i, j) * x : Real(0); });
        ptx::barrier_sync();
        int lane = ptx::lane();
        // Over i, for the lane's j; and for its t, by one of the warps.
        Real later = Real(0), crossing = Real(0);
        for (int t = kTile - 1; t >= 0; --t) {
            later += pairs.at(t, lane);
            if (t % warps() != ptx::warp()) continue;
            Real sum = warp_sum(lane < t ? later : Real(0));
            if (lane == t) crossing = sum;
        }
        if (lane % warps() != ptx::warp() || !tiles.has_key(tile, lane)) return;
        Real& all = static_cast<Real*>(p.crossing)[tiles.place.state_head(p) * p.keys + tiles.key_at(tile, lane)];
        all = reader == 0 ? crossing : all + crossing;
    }

    DEVICE void store_log(Range tile) {
        if (!p.d_log) return;
        auto d_log = static_cast<double*>(p.d_log) + tiles.place.state_head(p) * p.keys;
        for (int r = ptx::thread(); r < kTile; r += ptx::threads()) {
            if (tiles.has_key(tile, r)) d_log[tiles.key_at(tile, r)] = tiles.rows->d_log[r];
        }
        ptx::barrier_sync();
    }

    DEVICE void visit(Range tile, bool reads, bool absorbs) {
        if (reads) keep_stabilizer(tile);
        if (absorbs) {
            ptx::barrier_sync();
            tiles.load_keys(tile);
        }
        if (reads) read(tile);
        if (absorbs) state.absorb_keys(tiles);
    }

    DEVICE void run() {
        state.enter(tiles);
        each_visit(p, tiles.place.positions(p), false, *this);
    }
};

template <class Memory>
DEVICE void queries(const LinearParams& p) {
    Queries<Memory>(p).run();
}

ATTN_KERNEL(linear_queries_f32, queries<InShared<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_queries_f64, queries<InShared<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_queries_f16, queries<InShared<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_queries_bf16, queries<InShared<ptx::bf16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_queries_spilled_f32, queries<Spilled<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_queries_spilled_f64, queries<Spilled<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_queries_spilled_f16, queries<Spilled<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_queries_spilled_bf16, queries<Spilled<ptx::bf16>>, LinearParams, kThreads)

}  // namespace attn::linear
