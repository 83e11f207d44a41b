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
#include "state.sm90.cuh"

namespace attn::linear {

template <class Config>
struct OutputsOfWarpgroup : StateOfWarpgroup<Config> {
    using Base = StateOfWarpgroup<Config>;
    using typename Base::Element;
    using typename Base::Shared;
    using Base::kBlocks, Base::own, Base::p, Base::params, Base::shared, Base::state, Base::tiles, Base::turn, Base::z;
    using Base::barrier_of_all, Base::barrier_of_one, Base::chunk_row, Base::first_column, Base::vector;
    using Values = tile::RowValues<float, 1>;
    static constexpr int kVectors = Config::kVectors;
    // Whether numbers must be brought into the range of the elements.
    static constexpr bool kScales = !ptx::is_bf16<Element>;
    // Whether there are registers for scores and q̃S at once.
    static constexpr bool kIsNarrow = kBlocks <= 2;

    tile::WarpgroupSums<64> scores, out;
    tile::PackedRows<Element, 64> weights;
    // 1 over that of S in shared memory.
    float state_scale = 1.0f;

    using Base::Base;

    // S and z of the keys before the segment.
    DEVICE void enter() {
        this->clear();
        const float *from_s = nullptr, *from_z = nullptr;
        int64_t row = p.value_width;
        const Place& place = tiles.place;
        if (p.segments > 1) {
            int64_t slot = place.slot(p, place.segment);
            from_s = static_cast<const float*>(p.segment_s) + slot * p.features * p.value_width;
            from_z = static_cast<const float*>(p.segment_z) + slot * p.features;
        } else if (p.state_s) {
            const auto &s = p.state_s_strides, &z = p.state_z_strides;
            from_s = static_cast<const float*>(p.state_s) + place.batch * s.batch + place.head * s.head;
            from_z = static_cast<const float*>(p.state_z) + place.batch * z.batch + place.head * z.head;
            row = s.row;
        }
        if (from_s) {
            this->each_of_state([&](int feature, int column, float& x) { x = from_s[feature * row + column]; });
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (8 * vector() + i < p.features) z[i] = from_z[8 * vector() + i];
            }
        }
        publish_state();
    }

    // S, rounded, to where the next products read it.
    DEVICE void publish_state() {
        float scale = 1.0f;
        if constexpr (kScales) {
            float largest = 0.0f;
#pragma unroll
            for (int m = 0; m < kBlocks; ++m) {
                state[m].each([&](int, int, float& x) { largest = ptx::max(largest, ptx::abs(x)); });
            }
            largest = warp_max(largest);
            float* all = shared.scratch->largest + 4 * own;
            if (ptx::lane() == 0) all[ptx::warp() % 4] = largest;
            barrier_of_one();
            scale = fitting_scale(ptx::max(ptx::max(all[0], all[1]), ptx::max(all[2], all[3])));
            state_scale = 1.0f / scale;
        }
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
            tile::PackedRows<Element, 64> packed;
            if constexpr (kScales) {
                auto scaled = state[m];
                scaled.each([&](int, int, float& x) { x *= scale; });
                packed.set(scaled);
            } else {
                packed.set(state[m]);
            }
            tile::store(shared.state_of(own), 64 * m + tile::first_row_of_warp(), packed);
        }
        ptx::fence_proxy_async();
        barrier_of_one();
    }

    // φ of this thread's vectors of the queries, and what they read of z.
    DEVICE void map_queries(const typename Shared::Tile& queries) {
        if (p.map == kIdentity && p.finish != kNormalize) return;
        int thread = tile::thread_here();
#pragma unroll 2
        for (int i = 0; i < Config::kRows; ++i) {
            int r = thread / kVectors + i * Config::kStep;
            Element* at = queries.chunk(r, thread % kVectors * 8);
            auto x = ptx::load_vector<Element, 8>(at);
            float phi[8], norm = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) phi[j] = ptx::to_float(x.value[j]);
            map_vector(p.map, phi);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x.value[j] = ptx::from_float<Element>(phi[j]);
                norm += ptx::to_float(x.value[j]) * z[j];
            }
            if (p.map != kIdentity) ptx::store_vector(at, x);
            if (p.finish != kNormalize) continue;
#pragma unroll
            for (int mask = kVectors / 2; mask > 0; mask /= 2) norm += ptx::shuffle_xor(norm, mask);
            if (vector() == 0) shared.scratch->norm[r] = norm;
        }
    }

    DEVICE void map(const ChunkRows& rows) {
        map_queries(shared.queries(turn.stage));
        this->map_keys(shared.keys(turn.stage), rows);
        if (!rows.is_whole) this->clear_values(shared.values(turn.stage), rows);
        ptx::fence_proxy_async();
        barrier_of_all();
        this->add_features(rows);
    }

    // Scores become weights; their sums per row, and what rows were scaled by.
    DEVICE void weigh(const ChunkRows& rows, Values& sum, Values& scale) {
        scores.each([&](int row, int j, float& x) {
            if (j > chunk_row(row)) x = 0.0f;
        });
        if (p.decay != kNoDecay) {
            scores.each([&](int row, int j, float& x) {
                if (j <= chunk_row(row)) x *= rows.decay_between(chunk_row(row), j);
            });
        }
        if constexpr (kScales) {
            scale = scores.fold_rows(scale, [](float a, float b) { return ptx::max(ptx::abs(a), ptx::abs(b)); });
            scale.each([](int, float& x) { x = fitting_scale(x); });
            scores.scale_rows(scale);
        }
        // Of what is multiplied with the values: else a common error of all would not cancel.
        scores.each([](int, int, float& x) { x = ptx::to_float(ptx::from_float<Element>(x)); });
        sum = scores.row_sums(sum);
        weights.set(scores);
    }

    // The weights' product with the values on top of q̃ S, beside S ← e^{G_C} S + k̃ᵀ v.
    DEVICE void multiply_values(const ChunkRows& rows) {
        this->shrink_state(rows);
        tile::multiply_beside(out, weights, this->own_values(), true);
        this->add_keys();
        tile::wait_products<0>(out);
    }

    DEVICE void read_state() {
        tile::AlongColumns<Element, kChunk> queries(shared.queries(turn.stage).data);
        tile::AlongRows<Element, Config::kWidth> before(shared.state_of(own).data);
        tile::multiply_beside<Config::kWidth>(out, queries, before, false);
    }

    // Σ o² of the rows over all columns of the block.
    DEVICE Values squares() {
        auto squared = out;
        squared.each([](int, int, float& x) { x *= x; });
        auto sum = squared.row_sums(Values::filled(0.0f));
        if constexpr (Config::kReaders == 1) return sum;
        auto& all = shared.scratch->squares;
        sum.each_once([&](int row, float x) { all[own][chunk_row(row)] = x; });
        barrier_of_all();
        sum.each([&](int row, float& x) { x = all[0][chunk_row(row)] + all[1][chunk_row(row)]; });
        return sum;
    }

    // Divides the rows, whose weights sum up to `sum`, and stores the divisors.
    DEVICE void finish(Range chunk, const ChunkRows& rows, const Values& sum, const Values& scale) {
        Values factor = scale, divisor = Values::filled(1.0f);
        if constexpr (kScales) factor.each([](int, float& x) { x = 1.0f / x; });
        if (p.finish == kNormalize) {
            divisor = sum;
            divisor.with(factor, [](float& x, float unit) { x *= unit; });
            divisor.each([&](int row, float& x) {
                int i = chunk_row(row);
                float before = shared.scratch->norm[i];
                x += (p.decay == kNoDecay ? before : before * rows.from_start[i]) + float(p.epsilon);
            });
            factor.with(divisor, [](float& x, float y) { x *= inverse(y); });
        } else if (p.finish == kRmsNorm) {
            if constexpr (kScales) out.scale_rows(factor);
            divisor = squares();
            divisor.each([&](int, float& x) { x = ptx::sqrt(x / float(p.value_width) + float(p.epsilon)); });
            factor = divisor;
            factor.each([](int, float& x) { x = 1.0f / x; });
        }
        out.scale_rows(factor);
        bool has_statistic = p.statistic && (p.finish == kNormalize || p.finish == kRmsNorm);
        if (!has_statistic || own != 0 || tiles.place.value_tile != 0) return;
        divisor.each_once([&](int row, float x) {
            int64_t query = tiles.query_at(chunk, chunk_row(row));
            if (query >= 0 && query < p.queries) static_cast<float*>(p.statistic)[head_row() + query] = x;
        });
    }

    // First of the output's rows of this head.
    DEVICE int64_t head_row() const { return (tiles.place.batch * p.heads + tiles.reader_head(0)) * p.queries; }

    template <class T>
    DEVICE tile::Rows<T> out_rows(void* to) const {
        return {static_cast<T*>(to) + head_row() * p.value_width, p.value_width, p.queries, p.value_width};
    }

    DEVICE void store_outputs(Range chunk) {
        int64_t first = tiles.query_at(chunk, tile::first_row_of_warp());
        if (p.finish == kRaw || p.is_out_wide) {
            return tile::store(out, out_rows<float>(p.finish == kRaw ? p.raw : p.out), first, first_column());
        }
        tile::PackedRows<Element, 64> packed;
        packed.set(out);
        auto own_tile = shared.out_of(own);
        tile::store(own_tile, tile::first_row_of_warp(), packed);
        ptx::warp_sync();
        tile::copy_out(own_tile, tile::first_row_of_warp(), out_rows<Element>(p.out), first, first_column());
        ptx::warp_sync();
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
        if constexpr (kIsNarrow) read_state();
        tile::wait_products<kIsNarrow>(scores);
        Values sum = Values::filled(0.0f), scale = Values::filled(kScales ? 0.0f : 1.0f);
        weigh(rows, sum, scale);
        if constexpr (!kIsNarrow) read_state();
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
        store_outputs(chunk);
        publish_state();
        shared.pipeline.release(turn);
        turn.advance();
    }

    DEVICE void run() {
        enter();
        Range segment = tiles.place.positions(p);
        each_chunk(segment, [&](Range chunk) { step(chunk); });
        if (!p.final_s || segment.end < p.positions) return;
        int64_t head = tiles.place.state_head(p);
        Base::store(static_cast<float*>(p.final_s) + head * p.features * p.value_width,
                    static_cast<float*>(p.final_z) + head * p.features);
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
