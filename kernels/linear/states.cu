// Sums of the keys of each segment, for sequences that are cut into segments: S = Σ_j e^{G_C − G_j} φ(k_j)ᵀ v_j, z
// alike.
//
// One block: a segment of the positions of a state head, for a tile of value columns. Pieces: rows, z, S [D′ ×
// columns], φ(k) [32 × D′], values [32 × columns], for FAVOR+ x [32 × D].
#include "state.cuh"

namespace attn::linear {

template <class Memory>
DEVICE void states(const LinearParams& p) {
    using Real = typename Memory::Real;
    Tiles<Memory> tiles(p);
    KeyState<Memory> state(p);
    state.empty(tiles);
    ptx::barrier_sync();
    Range segment = tiles.place.positions(p);
    for (int64_t start = segment.start; start < segment.end; start += kTile) {
        tiles.load_keys({start, ptx::min(start + kTile, segment.end)});
        state.absorb_keys(tiles);
    }
    int64_t slot = tiles.place.slot(p, tiles.place.segment);
    state.store_slot(p.segment_s, p.segment_z, slot, tiles.place);
    if (ptx::warp() != 0 || tiles.place.value_tile != 0) return;
    double log_decay = p.decay == kNoDecay ? 0.0 : segment_log_decay(tiles);
    if (ptx::lane() != 0) return;
    static_cast<Real*>(p.segment_stabilizer)[slot] = tiles.rows->stabilizer;
    static_cast<double*>(p.segment_log_decay)[slot] = log_decay;
}

ATTN_KERNEL(linear_states_f32, states<InShared<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_states_f64, states<InShared<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_states_f16, states<InShared<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_states_bf16, states<InShared<ptx::bf16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_states_spilled_f32, states<Spilled<float>>, LinearParams, kThreads)
ATTN_KERNEL(linear_states_spilled_f64, states<Spilled<double>>, LinearParams, kThreads)
ATTN_KERNEL(linear_states_spilled_f16, states<Spilled<ptx::f16>>, LinearParams, kThreads)
ATTN_KERNEL(linear_states_spilled_bf16, states<Spilled<ptx::bf16>>, LinearParams, kThreads)

}  // namespace attn::linear
