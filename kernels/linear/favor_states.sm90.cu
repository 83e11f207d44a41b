// Sums of the keys of each segment as states.cu, for FAVOR+ features, on warpgroups: chunks of 64 positions, S in registers.
//
// Block, warps and memory as in favor_outputs.sm90.cu, without queries, the rounded S and outputs.
#include "favor_state.sm90.cuh"

namespace attn::linear {

template <class Config>
struct FavorStates : FavorState<Config> {
    using Base = FavorState<Config>;
    using typename Base::Projections;
    using Base::Base, Base::p, Base::shared, Base::tiles, Base::turn;

    DEVICE void step() {
        const ChunkRows& rows = shared.rows[turn.stage];
        // Scratch of the chunk before is free.
        this->barrier_of_all();
        shared.pipeline.wait(turn);
        Projections keys;
        this->project(keys, shared.keys(turn.stage));
        this->project_keys(keys, rows);
        this->barrier_of_all();
        this->map_keys(keys, rows);
        this->add_term(keys, rows, 0);
        this->add_rest(keys, rows);
        shared.pipeline.release(turn);
        turn.advance();
    }

    DEVICE void run() {
        this->load_omega();
        const Place& place = tiles.place;
        each_chunk(place.positions(p), [&](Range) { step(); });
        int64_t slot = place.slot(p, place.segment);
        this->store(static_cast<float*>(p.segment_s) + slot * p.features * p.value_width,
                    static_cast<float*>(p.segment_z) + slot * p.features, static_cast<float*>(p.segment_stabilizer) + slot);
        if (place.value_tile == 0 && ptx::thread() == 0) static_cast<double*>(p.segment_log_decay)[slot] = 0.0;
    }
};

template <class Config>
DEVICE void favor_states(const LinearMappedParams& params) {
    run_block<Config, FavorStates<Config>>(params);
}

using ptx::bf16;
using ptx::f16;

template <class E, int Width, int Features>
using Of = FavorConfig<E, Width, Features, 1>;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_favor_states_sm90_bf16_64_128, favor_states<Of<bf16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_states_sm90_bf16_64_256, favor_states<Of<bf16, 64, 256>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_states_sm90_f16_64_128, favor_states<Of<f16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_states_sm90_f16_64_256, favor_states<Of<f16, 64, 256>>, LinearMappedParams, 384)
