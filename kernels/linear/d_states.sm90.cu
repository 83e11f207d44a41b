// Gradients of S and z of each segment as d_states.cu, for elementwise maps, on warpgroups: R in registers.
//
// Block, warps and memory as for dk in keys.sm90.cu, without v, k and the rounded R.
#include "sweep_state.sm90.cuh"

namespace attn::linear {

template <class Config>
struct DStatesOfWarpgroup : StateOfSweep<Config, Gradient::d_states> {
    using Base = StateOfSweep<Config, Gradient::d_states>;
    using Base::Base, Base::p, Base::shared, Base::tiles, Base::turn;

    DEVICE void step() {
        const SweepRows& rows = shared.rows[turn.stage];
        shared.pipeline.wait(turn);
        this->map(rows);
        this->add_to_state(rows);
        tile::wait_products<0>(this->state);
        // Whoever reads scratch, terms or the stage has done so.
        this->barrier_of_all();
        shared.pipeline.release(turn);
        turn.advance();
        this->before ^= 1;
    }

    DEVICE void run() {
        this->clear();
        const Place& place = tiles.place;
        each_chunk_of_sweep<true>(place.positions(p), [&](Range) { step(); });
        int64_t slot = place.slot(p, place.segment);
        auto* to_s = static_cast<float*>(p.segment_d_s) + slot * p.features * p.value_width;
        auto* to_z = static_cast<float*>(p.segment_d_z) + slot * p.features;
        float factor = 1.0f / this->unit;
        this->each_of_state([&](int f, int c, float& x) { to_s[int64_t(f) * p.value_width + c] = x * factor; });
        int f = ptx::thread();
        if (f < Config::kOuter && this->first + f < p.features) {
            to_z[this->first + f] = shared.scratch->z[this->before][f];
        }
    }
};

template <class Config>
DEVICE void d_states(const LinearSweepParams& params) {
    int first = Place::of_block(params.problem).value_tile * Config::kOuter;
    divide_block<Config>([&](const auto& shared) { copy_chunks<Gradient::d_states>(params, shared, first); },
                         [&](const auto& shared) { DStatesOfWarpgroup<Config>(params, shared, first).run(); });
}

using ptx::bf16;
using ptx::f16;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_d_states_sm90_bf16_64, d_states<SweepConfig<bf16, 64, 64>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_d_states_sm90_bf16_128, d_states<SweepConfig<bf16, 128, 128>>, LinearSweepParams, 384)
ATTN_KERNEL(linear_d_states_sm90_bf16_256, d_states<SweepConfig<bf16, 64, 256>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_d_states_sm90_f16_64, d_states<SweepConfig<f16, 64, 64>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_d_states_sm90_f16_128, d_states<SweepConfig<f16, 128, 128>>, LinearSweepParams, 384)
ATTN_KERNEL(linear_d_states_sm90_f16_256, d_states<SweepConfig<f16, 64, 256>>, LinearSweepParams, 160)
