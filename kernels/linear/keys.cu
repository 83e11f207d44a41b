// Gradients of keys and values, in a sweep backward in time that carries R and r, the gradients of S and z.
//
//   W_ij = ⟨φ(q_i), φ(k_j)⟩ e^{G_i − G_j}, V_ij = (⟨dT_i, v_j⟩ + dn_i) e^{G_i − G_j} for j ≤ i
//   dφ(k) = e^{G_C−G} (v Rᵀ + r) + Vᵀ φ(q)                 dv = e^{G_C−G} φ(k) R + Wᵀ dT
//   R ← e^{G_C} R + (φ(q) e^G)ᵀ dT                         r ← e^{G_C} r + (φ(q) e^G)ᵀ dn
//
// and, for the gradient of a log-decay, less the sum of the keys' pairs with queries of later tiles, their part of
// ⟨φ(k_j), dφ(k_j)⟩.
//
// One block: a segment of the positions of a state head, and all output heads that read it. Pieces: rows, z and S for r
// and R [D′ × E], φ(k), φ(q), dφ(k) [32 × D′], values, dT and dv [32 × E], W or V [32 × 32], for FAVOR+ x [32 × D]. All
// warps work on the same step; a barrier ends each.
#include "d_features.cuh"
#include "state.cuh"
#include "d_sums.cuh"

namespace attn::linear {

template <class Memory>
struct Keys {
    using Element = typename Memory::Element;
    using Real = typename Memory::Real;
    using Math = typename Arithmetic<Element>::Math;

    const LinearParams& p;
    Tiles<Memory> tiles;
    State<Memory> d_state;
    SumsTile<Memory> sums;
    WideTile<Real> d_phi, d_values;

    DEVICE explicit Keys(const LinearParams& params)
        : p(params),
          tiles(params),
          d_state(params),
          sums(params),
          d_phi(tile_piece<Memory>(params, kPieceDPhi, params.features_row)),
          d_values(tile_piece<Memory>(params, kPieceDValues, params.values_row)) {}

    DEVICE void enter() {
        if (p.segments == 1) {
            d_state.clear();
            return ptx::barrier_sync();
        }
        int64_t slot = tiles.place.slot(p, is_full(p) ? p.segments : tiles.place.segment);
        d_state.load_slot(p.segment_d_s, p.segment_d_z, slot, tiles.place);
        ptx::barrier_sync();
    }

    DEVICE void visit(Range tile, bool reads, bool absorbs) {
        if (reads) {
            load_stabilizer(tiles, tile);
            tiles.load_keys(tile);
            gradient_from_later();
            ptx::barrier_sync();
            if (p.d_log) {
                for (int r = ptx::thread(); r < kTile; r += ptx::threads()) tiles.rows->d_log[r] = 0.0;
                ptx::barrier_sync();
                multiply_rows(tiles, tiles.key_phi, d_phi);
                ptx::barrier_sync();
            }
        }
        for (int64_t reader = 0; absorbs && reader < tiles.readers(); ++reader) {
            tiles.load_queries(reader, tile);
            sums.load(tiles, reader, tile);
            if (is_inclusive(p)) gradient_from_tile();
            absorb_queries(tiles, d_state, sums, reader == 0 ? tile_decay(tiles) : Real(1));
        }
        if (reads) store(tile);
    }

    // dv = e^{G_C−G} φ(k) R and dφ(k) = e^{G_C−G} (v Rᵀ + r)
    DEVICE void gradient_from_later() {
        bool is_decayed = is_inclusive(p) && decays(p);
        const TileRows<Real>& rows = *tiles.rows;
        auto left = [&](int r) { return is_decayed ? rows.to_end[r] : Real(1); };
        product<Math, 1, Memory::kBlocks>(
            kTile, p.value_tile, p.features_padded, left_rows<Math>(tiles.key_phi), right_rows<Math>(d_state.s),
            [](int, int) { return Real(0); }, [&](int r, int c, Real x) { d_values.at(r, c) = x * left(r); });
        with_math<Element>(p, [&](auto math) {
            using Math = decltype(math);
            product<Math, 1, Memory::kBlocks>(
                kTile, p.features_padded, p.value_tile, left_rows<Math>(tiles.values),
                right_transposed<Math>(d_state.s),
                [&](int, int f) { return d_state.z[f]; }, [&](int r, int f, Real x) { d_phi.at(r, f) = x * left(r); });
        });
    }

    // dv += Wᵀ dT and dφ(k) += Vᵀ φ(q) of the loaded reader.
    DEVICE void gradient_from_tile() {
        tiles.score();
        ptx::barrier_sync();
        product<Math, 1, Memory::kBlocks>(
            kTile, p.value_tile, kTile, left_transposed<Math>(tiles.weights), right_rows<Math>(sums.d_sums),
            [&](int r, int c) { return d_values.at(r, c); }, [&](int r, int c, Real x) { d_values.at(r, c) = x; });
        ptx::barrier_sync();
        weight_gradients(tiles, sums);
        ptx::barrier_sync();
        with_math<Element>(p, [&](auto math) {
            using Math = decltype(math);
            product<Math, 1, Memory::kBlocks>(
                kTile, p.features_padded, kTile, left_transposed<Math>(tiles.weights),
                right_rows<Math>(tiles.query_phi),
                [&](int r, int f) { return d_phi.at(r, f); }, [&](int r, int f, Real x) { d_phi.at(r, f) = x; });
        });
        ptx::barrier_sync();
    }

    // dv and, from dφ(k), dk of the rows that have a key; zeros where it is masked.
    DEVICE void store(Range tile) {
        int64_t value_head = p.is_d_v_wide ? tiles.place.state_head(p)
                                           : tiles.place.batch * p.value_heads + tiles.value_head();
        Sink value_sink{p.d_v, p.is_d_v_wide != 0, value_head, p.keys, p.value_width};
        const int* present = tiles.rows->present;
        each_element(kTile, p.value_width, [&](int r, int c) {
            Real d = present[r] ? d_values.at(r, c) : Real(0);
            if (tiles.has_key(tile, r)) value_sink.store<Element>(tiles.key_at(tile, r), c, d);
        });
        if (p.d_log) subtract_log(tile);
        int64_t head = p.is_d_k_wide ? tiles.place.state_head(p) : tiles.place.batch * p.key_heads + tiles.key_head();
        Sink sink{p.d_k, p.is_d_k_wide != 0, head, p.keys, p.width};
        each_element(kTile, p.width, [&](int r, int c) {
            bool is_masked = tiles.has_key(tile, r) && !present[r];
            if (is_masked) sink.store<Element>(tiles.key_at(tile, r), c, Real(0));
        });
        store_gradient<Element>(
            p, tiles.key_rows(), tiles.key_phi, d_phi, tiles.x, sink, [&](int r) { return present[r] != 0; },
            [&](int r) { return tiles.key_at(tile, r); });
        ptx::barrier_sync();
    }

    // What the queries' sweep has stored becomes the difference.
    DEVICE void subtract_log(Range tile) {
        auto d_log = static_cast<double*>(p.d_log) + tiles.place.state_head(p) * p.keys;
        for (int r = ptx::thread(); r < kTile; r += ptx::threads()) {
            if (tiles.rows->present[r]) d_log[tiles.key_at(tile, r)] -= tiles.rows->d_log[r];
        }
    }

    DEVICE void run() {
        enter();
        each_visit(p, tiles.place.positions(p), true, *this);
    }
};

template <class Memory>
DEVICE void keys(const LinearParams& p) {
    Keys<Memory>(p).run();
}

ATTN_KERNEL(linear_keys_f32, keys<InShared<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_keys_f64, keys<InShared<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_keys_f16, keys<InShared<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_keys_bf16, keys<InShared<ptx::bf16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_keys_spilled_f32, keys<Spilled<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_keys_spilled_f64, keys<Spilled<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_keys_spilled_f16, keys<Spilled<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_keys_spilled_bf16, keys<Spilled<ptx::bf16>>, LinearParams, kThreads)

}  // namespace attn::linear
