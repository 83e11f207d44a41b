// Gradients of keys and values as keys.cu, for elementwise maps, on warpgroups: chunks of 64 positions from the end, R in
// registers.
//
// One block: a segment of the positions of a state head, and a tile of the features, of dk, or, behind these, of the value
// columns, of dv: 64 for each of its warpgroups, which own these rows of R or of Rᵀ. One more warp as in queries.sm90.cu.
//
//     shared memory      size                                    written by, and read until
//     v, dT, q, k        2 stages 64 × 2 (E + features), for dk  copies; R is updated, dk has left from where k was
//     k, q, dT           2 stages 64 × 2 (D′ + columns), for dv  copies; R is updated, dv has left from behind them
//     R or Rᵀ            features × E or columns × D′, rounded   its warpgroups; their next products with it
//     terms              64 × features or columns                the warpgroups; R is updated
//     scratch, rows      sweep.sm90.cuh                          the warpgroups, the copying warp
//
// The products of a chunk: for dk v dTᵀ and v Rᵀ, weights · φ(q), and φ(q)ᵀ dT on top of R; for dv φ(k) φ(q)ᵀ and φ(k) R,
// weights · dT, and dTᵀ φ(q) on top of Rᵀ.
#include "gradient.sm90.cuh"

namespace attn::linear {

template <class Config>
DEVICE void keys(const LinearSweepParams& params) {
    const LinearParams& p = params.problem;
    int index = Place::of_block(p).value_tile, of_keys = (p.features + Config::kOuter - 1) / Config::kOuter;
    bool is_of_keys = index < of_keys;
    int first = (is_of_keys ? index : index - of_keys) * Config::kOuter;
    divide_block<Config>(
        [&](const auto& shared) {
            if (is_of_keys) return copy_chunks<Gradient::d_keys>(params, shared, first);
            copy_chunks<Gradient::d_values>(params, shared, first);
        },
        [&](const auto& shared) {
            if (is_of_keys) return run_sweep<Gradient::d_keys>(params, shared, first);
            run_sweep<Gradient::d_values>(params, shared, first);
        });
}

using ptx::bf16;
using ptx::f16;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_keys_sm90_bf16_64, keys<SweepConfig<bf16, 64, 64>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_keys_sm90_bf16_128, keys<SweepConfig<bf16, 128, 128>>, LinearSweepParams, 384)
ATTN_KERNEL(linear_keys_sm90_bf16_256, keys<SweepConfig<bf16, 64, 256>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_keys_sm90_f16_64, keys<SweepConfig<f16, 64, 64>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_keys_sm90_f16_128, keys<SweepConfig<f16, 128, 128>>, LinearSweepParams, 384)
ATTN_KERNEL(linear_keys_sm90_f16_256, keys<SweepConfig<f16, 64, 256>>, LinearSweepParams, 160)
