// Causal outputs as outputs.cu, for elementwise maps, on warpgroups: chunks of 64 positions, S in registers.
//
// Block: as there, one output head for each state head. Each warpgroup has 64 value columns of the block and S for them;
// they map queries and keys together, in place. One more warp copies the next chunk meanwhile and sums its decays.
//
//     shared memory      size                                     written by, and read until
//     q, k, v            2 stages 64 × (2 D′ + columns)           copies; S is updated
//     S                  D′ × 64 for each warpgroup, rounded      its warpgroup; its next q̃ S
//     outputs            64 × 64 for each warpgroup               its warps, on their way out
//     rows, scratch      chunk.sm90.cuh                           the copying warp, the warpgroups
//     terms              64 × D′, what keys add to S              the warpgroups; S is updated
//
// The products of a chunk: q̃k̃ᵀ and q̃S; weights · v, and k̃ᵀv on top of S.
#include "reader.sm90.cuh"

namespace attn::linear {

template <class Config>
struct OutputsOfWarpgroup : ReaderOfWarpgroup<Config> {
    using Base = ReaderOfWarpgroup<Config>;
    using typename Base::Element;
    using typename Base::Values;
    using Base::Base, Base::kBlocks, Base::kScales, Base::out, Base::p, Base::shared, Base::state_scale, Base::tiles;
    using Base::turn, Base::barrier_of_all, Base::chunk_row;
    // Whether there are registers for scores and q̃S at once.
    static constexpr bool kIsNarrow = kBlocks <= 2;

    tile::WarpgroupSums<64> scores;
    tile::PackedRows<Element, 64> weights;

    DEVICE void map(const ChunkRows& rows) {
        this->map_queries(shared.queries(turn.stage));
        this->map_keys(shared.keys(turn.stage), rows);
        if (!rows.is_whole) this->clear_values(shared.values(turn.stage), rows);
        ptx::fence_proxy_async();
        barrier_of_all();
        this->add_features(rows);
    }

    // Scores become weights; their sums per row, and what rows were scaled by.
    DEVICE void weigh(const ChunkRows& rows, Values& sum, Values& scale) {
        if (p.decay == kNoDecay) {
            scores.each([&](int row, int j, float& x) { x = j <= chunk_row(row) ? x : 0.0f; });
        } else {
            // Without branches: what later rows come to is thrown away.
            scores.each([&](int row, int j, float& x) {
                float weight = x * rows.decay_between(chunk_row(row), j);
                x = j <= chunk_row(row) && j >= rows.cut[chunk_row(row)] ? weight : 0.0f;
            });
        }
        if constexpr (kScales) {
            scale = scores.fold_rows(scale, [](float a, float b) { return ptx::max(ptx::abs(a), ptx::abs(b)); });
            scale.each([](int, float& x) { x = fitting_scale(x); });
            scores.scale_rows(scale);
        }
        weights.set(scores);
        // Of what is multiplied with the values: else a common error of all would not cancel.
        if (p.finish == kNormalize) sum = weights.widened().row_sums(sum);
    }

    // The weights' product with the values on top of q̃ S, beside S ← e^{G_C} S + k̃ᵀ v.
    DEVICE void multiply_values(const ChunkRows& rows) {
        this->shrink_state(rows);
        tile::multiply_beside(out, weights, this->own_values(), true);
        this->add_keys();
        tile::wait_products<0>(out);
    }

    // Rows whose weights sum up to `sum`, all of which was multiplied by `scale`.
    DEVICE void finish(Range chunk, const ChunkRows& rows, Values& sum, Values& scale) {
        if constexpr (kScales) scale.each([](int, float& x) { x = 1.0f / x; });
        if (p.finish == kNormalize) {
            sum.with(scale, [](float& x, float unit) { x *= unit; });
            sum.each([&](int row, float& x) {
                float before = shared.scratch->norm[chunk_row(row)];
                x += p.decay == kNoDecay ? before : before * rows.from_start[chunk_row(row)];
            });
        }
        Base::finish(chunk, scale, sum);
    }

    DEVICE void step(Range chunk) {
        const ChunkRows& rows = shared.rows[turn.stage];
        // Scratch and terms of the chunk before are free.
        barrier_of_all();
        shared.pipeline.wait(turn);
        map(rows);
        tile::AlongColumns<Element, kChunk> queries(shared.queries(turn.stage).data);
        tile::AlongColumns<Element, kChunk> keys(shared.keys(turn.stage).data);
        tile::multiply_beside<Config::kWidth>(scores, queries, keys, false);
        if constexpr (kIsNarrow) this->read_state();
        tile::wait_products<kIsNarrow>(scores);
        Values sum = Values::filled(0.0f), scale = Values::filled(kScales ? 0.0f : 1.0f);
        weigh(rows, sum, scale);
        if constexpr (!kIsNarrow) this->read_state();
        tile::wait_products<0>(out);
        if (kScales || p.decay != kNoDecay) {
            Values left = scale;
            left.each([&](int row, float& x) {
                x *= p.decay == kNoDecay ? state_scale : state_scale * rows.from_start[chunk_row(row)];
            });
            out.scale_rows(left);
        }
        multiply_values(rows);
        finish(chunk, rows, sum, scale);
        this->publish_state();
        shared.pipeline.release(turn);
        turn.advance();
    }

    DEVICE void run() {
        this->walk([&](Range chunk) { step(chunk); });
    }
};

template <class Config>
DEVICE void outputs(const LinearMappedParams& params) {
    run_block<Config, OutputsOfWarpgroup<Config>>(params);
}

using ptx::bf16;
using ptx::f16;

template <class E, int Width, int Columns>
using Of = ChunkConfig<E, Width, Columns, 2>;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_outputs_sm90_bf16_64_64, outputs<Of<bf16, 64, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_outputs_sm90_bf16_64_128, outputs<Of<bf16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_outputs_sm90_bf16_128_64, outputs<Of<bf16, 128, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_outputs_sm90_bf16_128_128, outputs<Of<bf16, 128, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_outputs_sm90_bf16_256_64, outputs<Of<bf16, 256, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_outputs_sm90_f16_64_64, outputs<Of<f16, 64, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_outputs_sm90_f16_64_128, outputs<Of<f16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_outputs_sm90_f16_128_64, outputs<Of<f16, 128, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_outputs_sm90_f16_128_128, outputs<Of<f16, 128, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_outputs_sm90_f16_256_64, outputs<Of<f16, 256, 64>>, LinearMappedParams, 160)
