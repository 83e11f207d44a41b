// Gradients of S and z at the start of each segment from its own queries, for sequences that are cut into segments.
//
// One block: a segment of the positions of a state head, for a tile of value columns. Pieces: rows, z and S for r and R
// [D′ × columns], φ(q) [32 × D′], dT [32 × columns], for FAVOR+ x [32 × D], for stabilised keys φ(k) and values.
#include "state.cuh"
#include "d_sums.cuh"

namespace attn::linear {

template <class Memory>
DEVICE void d_states(const LinearParams& p) {
    using Real = typename Memory::Real;
    Tiles<Memory> tiles(p);
    State<Memory> d_state(p);
    SumsTile<Memory> sums(p);
    d_state.clear();
    ptx::barrier_sync();
    Range segment = tiles.place.positions(p);
    int64_t count = (segment.end - segment.start + kTile - 1) / kTile;
    for (int64_t index = count - 1; index >= 0; --index) {
        int64_t start = segment.start + index * kTile;
        Range tile{start, ptx::min(start + kTile, segment.end)};
        if (is_inclusive(p) && decays(p)) {
            load_stabilizer(tiles, tile);
            tiles.load_decays(tile);
        }
        for (int64_t reader = 0; reader < tiles.readers(); ++reader) {
            tiles.load_queries(reader, tile);
            sums.load(tiles, reader, tile);
            absorb_queries(tiles, d_state, sums, reader == 0 ? tile_decay(tiles) : Real(1));
        }
    }
    d_state.store_slot(p.segment_d_s, p.segment_d_z, tiles.place.slot(p, tiles.place.segment), tiles.place);
}

ATTN_KERNEL(linear_d_states_f32, d_states<InShared<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_states_f64, d_states<InShared<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_states_f16, d_states<InShared<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_states_bf16, d_states<InShared<ptx::bf16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_states_spilled_f32, d_states<Spilled<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_states_spilled_f64, d_states<Spilled<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_states_spilled_f16, d_states<Spilled<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_states_spilled_bf16, d_states<Spilled<ptx::bf16>>, LinearParams, kThreads)

}  // namespace attn::linear
