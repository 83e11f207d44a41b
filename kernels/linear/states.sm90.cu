// Sums of the keys of each segment as states.cu, for elementwise maps, on warpgroups: chunks of 64 positions, S in registers.
//
// Block, warps and memory as in outputs.sm90.cu, without queries, the rounded S and outputs.
#include "state.cuh"
#include "state.sm90.cuh"

namespace attn::linear {

template <class Config>
struct StatesOfWarpgroup : StateOfWarpgroup<Config> {
    using Base = StateOfWarpgroup<Config>;
    using Base::Base, Base::p, Base::shared, Base::tiles, Base::turn;

    DEVICE void step() {
        const ChunkRows& rows = shared.rows[turn.stage];
        // Scratch and terms of the chunk before are free.
        this->barrier_of_all();
        shared.pipeline.wait(turn);
        this->map_keys(shared.keys(turn.stage), rows);
        if (!rows.is_whole) this->clear_values(shared.values(turn.stage), rows);
        ptx::fence_proxy_async();
        this->barrier_of_all();
        this->add_features(rows);
        this->shrink_state(rows);
        this->add_keys();
        shared.pipeline.release(turn);
        turn.advance();
    }

    DEVICE void run() {
        this->clear();
        const Place& place = tiles.place;
        each_chunk(place.positions(p), [&](Range) { step(); });
        int64_t slot = place.slot(p, place.segment);
        this->store(static_cast<float*>(p.segment_s) + slot * p.features * p.value_width,
                    static_cast<float*>(p.segment_z) + slot * p.features);
        if (ptx::warp() != 0 || place.value_tile != 0) return;
        double log_decay = p.decay == kNoDecay ? 0.0 : segment_log_decay(tiles);
        if (ptx::lane() != 0) return;
        static_cast<float*>(p.segment_stabilizer)[slot] = negative_infinity<float>();
        static_cast<double*>(p.segment_log_decay)[slot] = log_decay;
    }
};

template <class Config>
DEVICE void states(const LinearMappedParams& params) {
    run_block<Config, StatesOfWarpgroup<Config>>(params);
}

using ptx::bf16;
using ptx::f16;

template <class E, int Width, int Columns>
using Of = ChunkConfig<E, Width, Columns, 1>;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_states_sm90_bf16_64_64, states<Of<bf16, 64, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_states_sm90_bf16_64_128, states<Of<bf16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_states_sm90_bf16_128_64, states<Of<bf16, 128, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_states_sm90_bf16_128_128, states<Of<bf16, 128, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_states_sm90_bf16_256_64, states<Of<bf16, 256, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_states_sm90_f16_64_64, states<Of<f16, 64, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_states_sm90_f16_64_128, states<Of<f16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_states_sm90_f16_128_64, states<Of<f16, 128, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_states_sm90_f16_128_128, states<Of<f16, 128, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_states_sm90_f16_256_64, states<Of<f16, 256, 64>>, LinearMappedParams, 160)
