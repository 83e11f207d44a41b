// Gradients of the queries as queries.cu, for elementwise maps, on warpgroups: chunks of 64 positions, S in registers.
//
// One block: a segment of the positions of a state head, and a tile of the features, 64 for each of its warpgroups, which
// own these rows of S. One more warp copies the next chunk meanwhile, and weighs its rows.
//
//     shared memory      size                             written by, and read until
//     dT, v, k, q        2 stages 64 × 2 (E + features)   copies; S is updated, dq has left from where q was
//     S                  features × E, rounded            its warpgroups; their next dT Sᵀ
//     terms              64 × features, what k adds       the warpgroups; S is updated
//     scratch, rows      sweep.sm90.cuh                   the warpgroups, the copying warp
//
// The products of a chunk: dT vᵀ and dT Sᵀ; their weights · φ(k), and φ(k)ᵀ v on top of S.
#include "gradient.sm90.cuh"

namespace attn::linear {

template <class Config>
DEVICE void queries(const LinearSweepParams& params) {
    constexpr Gradient kOf = Gradient::d_queries;
    int first = Place::of_block(params.problem).value_tile * Config::kOuter;
    divide_block<Config>([&](const auto& shared) { copy_chunks<kOf>(params, shared, first); },
                         [&](const auto& shared) { run_sweep<kOf>(params, shared, first); });
}

using ptx::bf16;
using ptx::f16;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_queries_sm90_bf16_64, queries<SweepConfig<bf16, 64, 64>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_queries_sm90_bf16_128, queries<SweepConfig<bf16, 128, 128>>, LinearSweepParams, 384)
ATTN_KERNEL(linear_queries_sm90_bf16_256, queries<SweepConfig<bf16, 64, 256>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_queries_sm90_f16_64, queries<SweepConfig<f16, 64, 64>>, LinearSweepParams, 160)
ATTN_KERNEL(linear_queries_sm90_f16_128, queries<SweepConfig<f16, 128, 128>>, LinearSweepParams, 384)
ATTN_KERNEL(linear_queries_sm90_f16_256, queries<SweepConfig<f16, 64, 256>>, LinearSweepParams, 160)
