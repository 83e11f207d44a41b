// Causal outputs as outputs.cu, for FAVOR+ features, on warpgroups: chunks of 64 positions, S in registers.
//
// Block: as there, one output head for each state head and 64 value columns. Its two warpgroups have half of the features
// each: of ω, of S, and of what queries, keys and scores sum up. Scores become weights by factors, so each turns its own
// part into weights; outputs and divisors are added up at the end, rows 0 … 31 by the first. One more warp copies the next
// chunk meanwhile.
//
//     shared memory      size                                     written by, and read until
//     q, k, v            2 stages 64 × (2 D + 64)                 copies; weights · v
//     S                  D′ × 64, rounded                         its warpgroup; its next q̃S
//     features           64 × D′: what keys add to S, keys, and   its warpgroup; S is updated, scores; the other
//                        outputs handed over                      warpgroup adds them up
//     outputs            64 × 64                                  warps, on their way out
//     ω                  D′ × D for each term                     all, once
//     rows, scratch      favor_chunk.sm90.cuh                     the copying warp, the warpgroups
//
// The products of a chunk: projections of k and q; k̃ᵀv on top of S; q̃k̃ᵀ and q̃S; weights · v.
#include "favor_reader.sm90.cuh"

namespace attn::linear {

template <class Config>
struct FavorOutputs : FavorReader<Config> {
    using Base = FavorReader<Config>;
    using typename Base::Element;
    using typename Base::Projections;
    using typename Base::Sums;
    using typename Base::Values;
    using Base::Base, Base::kBlocks, Base::kScales, Base::own, Base::p, Base::shared, Base::tiles, Base::turn;
    using Base::barrier_of_all, Base::chunk_row;
    // Whether there are registers for projections of queries beside the keys' features.
    static constexpr bool kIsNarrow = kBlocks == 1;

    // Scores become weights; their sums per row, and what rows were scaled by.
    DEVICE void weigh(Sums& scores, Values& sum, Values& scale) {
        const Stabilizers& at = shared.favor->stabilizers[own];
        if (is_stabilized(p)) {
            // Without branches: what later rows come to is thrown away.
            scores.each([&](int row, int j, float& x) {
                float weight = x * relative(at.own[j], at.now[chunk_row(row)]);
                x = j <= chunk_row(row) ? weight : 0.0f;
            });
        } else {
            scores.each([&](int row, int j, float& x) { x = j <= chunk_row(row) ? x : 0.0f; });
        }
        if constexpr (kScales) {
            scale = scores.fold_rows(scale, [](float a, float b) { return ptx::max(ptx::abs(a), ptx::abs(b)); });
            // Not so much that what is read of S leaves the range of f32.
            scale.each([](int, float& x) { x = ptx::min(fitting_scale(x), 0x1p60f); });
            scores.scale_rows(scale);
        }
        // Of what is multiplied with the values: else a common error of all would not cancel.
        tile::round_to<Element>(scores);
        sum = scores.row_sums(sum);
    }

    // e^{c − c_i} of the rows, c entering the chunk.
    DEVICE Values from_start() const {
        Values left = Values::filled(1.0f);
        if (!is_stabilized(p)) return left;
        const Stabilizers& at = shared.favor->stabilizers[own];
        left.each([&](int row, float& x) { x = relative(at.entering, at.now[chunk_row(row)]); });
        return left;
    }

    // q̃S and weights · v of this warpgroup's features into `out`, and what they add to the divisors into `norm`.
    DEVICE void multiply(const Projections& queries, Sums& out, Values& norm) {
        tile::PackedRows<Element, Config::kOwn> left;
        left.set(queries);
        Sums scores;
        tile::AlongColumns<Element, kChunk> right(shared.features_of(own).data);
        tile::multiply_beside(scores, left, right, false);
        tile::AlongRows<Element, Config::kOwn> before(shared.state_of(own).data);
        tile::multiply_beside(out, left, before, false);
        tile::wait_products<1>(scores);
        Values sum = Values::filled(0.0f), scale = Values::filled(kScales ? 0.0f : 1.0f), entered = from_start();
        weigh(scores, sum, scale);
        norm.with(entered, [](float& x, float left) { x *= left; });
        if constexpr (kScales) {
            float of_state = shared.favor->state_scale[own];
            entered.with(scale, [of_state](float& x, float scale) { x *= scale * of_state; });
        }
        tile::wait_products<0>(out);
        out.scale_rows(entered);
        tile::PackedRows<Element, 64> weights;
        weights.set(scores);
        tile::multiply_beside(out, weights, tile::AlongRows<Element, kChunk>(shared.values(turn.stage).data), true);
        scale.each([](int, float& x) { x = 1.0f / x; });
        sum.with(scale, [](float& x, float unit) { x *= unit; });
        norm.with(sum, [](float& x, float more) { x += more; });
        tile::wait_products<0>(out);
        if constexpr (kScales) out.scale_rows(scale);
    }

    // Projections of the next chunk's keys, beside the end of this one; of nothing behind the last.
    DEVICE void project_next(Projections& keys, bool is_last) {
        auto next = turn;
        next.advance();
        if (!is_last) shared.pipeline.wait(next);
        this->project(keys, shared.keys(next.stage));
    }

    DEVICE void step(Range chunk, bool is_last, Projections& keys) {
        const ChunkRows& rows = shared.rows[turn.stage];
        // Of this chunk alone, else registers would be held around the loop.
        Projections queries;
        this->project_keys(keys, rows);
        if constexpr (kIsNarrow) this->project(queries, shared.queries(turn.stage));
        barrier_of_all();
        this->map_keys(keys, rows);
        this->add_term(keys, rows, 0);
        this->add_rest(keys, rows);
        this->store_keys(keys, Values::filled(1.0f), 0);
        if constexpr (!kIsNarrow) this->project(queries, shared.queries(turn.stage));
        tile::wait_products<0>(queries);
        this->tell_largest(queries, 1);
        barrier_of_all();
        Values norm = this->map_queries(queries);
        Sums out;
        multiply(queries, out, norm);
        project_next(keys, is_last);
        // The other warps have read the keys' features, in whose place rows are handed over.
        this->barrier_of_one();
        this->end_rows(chunk, out, norm);
        this->publish_state();
        turn.advance();
    }

    DEVICE void run() {
        this->load_omega();
        this->enter();
        Range segment = tiles.place.positions(p);
        Projections keys;
        shared.pipeline.wait(turn);
        this->project(keys, shared.keys(turn.stage));
        each_chunk(segment, [&](Range chunk) { step(chunk, chunk.end == segment.end, keys); });
        tile::wait_products<0>(keys);
        this->hand_out_state(segment);
    }
};

template <class Config>
DEVICE void favor_outputs(const LinearMappedParams& params) {
    run_block<Config, FavorOutputs<Config>>(params);
}

using ptx::bf16;
using ptx::f16;

template <class E, int Width, int Features>
using Of = FavorConfig<E, Width, Features, 2>;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_favor_outputs_sm90_bf16_64_128, favor_outputs<Of<bf16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_outputs_sm90_bf16_64_256, favor_outputs<Of<bf16, 64, 256>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_outputs_sm90_f16_64_128, favor_outputs<Of<f16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_outputs_sm90_f16_64_256, favor_outputs<Of<f16, 64, 256>>, LinearMappedParams, 384)
