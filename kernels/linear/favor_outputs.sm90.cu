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
//     rows, scratch      favor.sm90.cuh                           the copying warp, the warpgroups
//
// The products of a chunk: projections of k and q; k̃ᵀv on top of S; q̃k̃ᵀ and q̃S; weights · v.
#include "favor.sm90.cuh"
#include "outputs.sm90.cuh"

namespace attn::linear {

template <class Config>
struct FavorOutputs : FavorState<Config> {
    using Base = FavorState<Config>;
    using typename Base::Element;
    using typename Base::Projections;
    using typename Base::Values;
    using Base::kBlocks, Base::own, Base::p, Base::params, Base::shared, Base::stabilizer, Base::state, Base::tiles;
    using Base::turn, Base::z, Base::barrier_of_all, Base::barrier_of_one, Base::chunk_row, Base::feature, Base::features;
    using Base::first_feature;
    static constexpr bool kScales = !ptx::is_bf16<Element>;
    // Whether there are registers for projections of queries beside the keys' features.
    static constexpr bool kIsNarrow = kBlocks == 1;

    using Sums = tile::WarpgroupSums<64>;

    using Base::Base;

    // S, z and the stabiliser of the keys before the segment.
    DEVICE void enter() {
        const Place& place = tiles.place;
        EnteringSums from(p, place);
        if (from.s) {
            float units = 1.0f / this->unit();
            this->each_of_state([&](int f, int column, float& x) { x = from.s[f * from.row + column] * units; });
            int f = feature();
            if (f < features()) z = from.z[first_feature() + f] * units;
        }
        if (is_stabilized(p) && p.segments > 1) {
            stabilizer = static_cast<const float*>(p.entering_stabilizer)[place.slot(p, place.segment)];
        } else if (is_stabilized(p) && p.state_stabilizer) {
            const auto& strides = p.state_stabilizer_strides;
            int64_t at = place.batch * strides.batch + place.head * strides.head;
            stabilizer = static_cast<const float*>(p.state_stabilizer)[at];
        }
        publish_state();
    }

    // S, rounded, and z, to where the next queries read them.
    DEVICE void publish_state() {
        FavorScratch& scratch = *shared.favor;
        float scale = publish(state, shared.state_of(own), scratch.largest_sum + 4 * own, kBarrierOfOne + own);
        ptx::fence_proxy_async();
        int f = feature();
        if (kScales && f == 0) scratch.state_scale[own] = scale;
        if (f < Config::kOwn) scratch.z[first_feature() + f] = z;
    }

    // Queries become features, rounded; what they read of z.
    DEVICE Values map_queries(Projections& queries) {
        this->map(queries, 1);
        queries.each([](int, int, float& x) { x = ptx::to_float(ptx::from_float<Element>(x)); });
        const float* before = shared.favor->z + first_feature();
        Values norm = Values::filled(0.0f);
        queries.each_indexed([&](int m, int i, int, int f, float& x) { norm.value[m][i / 2] += x * before[f]; });
        return norm.fold_lanes([](float a, float b) { return a + b; });
    }

    // Scores become weights; their sums per row, and what rows were scaled by.
    DEVICE void weigh(Sums& scores, Values& sum, Values& scale) {
        const Stabilizers& at = shared.favor->stabilizers[own];
        scores.each([&](int row, int j, float& x) {
            if (j > chunk_row(row)) x = 0.0f;
        });
        if (is_stabilized(p)) {
            scores.each([&](int row, int j, float& x) {
                if (j <= chunk_row(row)) x *= relative(at.own[j], at.now[chunk_row(row)]);
            });
        }
        if constexpr (kScales) {
            scale = scores.fold_rows(scale, [](float a, float b) { return ptx::max(ptx::abs(a), ptx::abs(b)); });
            // Not so much that what is read of S leaves the range of f32.
            scale.each([](int, float& x) { x = ptx::min(fitting_scale(x), 0x1p60f); });
            scores.scale_rows(scale);
        }
        // Of what is multiplied with the values: else a common error of all would not cancel.
        scores.each([](int, int, float& x) { x = ptx::to_float(ptx::from_float<Element>(x)); });
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

    // Whether this warp finishes its rows.
    DEVICE bool finishes() const { return ptx::warp() % 4 / 2 == own; }

    // Rows of sums to the warpgroup that finishes them, or from the other one.
    DEVICE float* handed_over(int warpgroup, int n) const {
        auto* tile = reinterpret_cast<float*>(shared.features_of(warpgroup).data);
        return tile + (n * 64 + tile::thread_here() % 64) * 4;
    }

    DEVICE void hand_over(const Sums& out, const Values& norm) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            ptx::Vector<float, 4> x;
#pragma unroll
            for (int i = 0; i < 4; ++i) x.value[i] = out.value[0][n][i];
            ptx::store_vector(handed_over(own, n), x);
        }
        Values given = norm;
        given.each_once([&](int row, float x) { shared.favor->norm[chunk_row(row)] = x; });
    }

    DEVICE void take_over(Sums& out, Values& norm) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            auto x = ptx::load_vector<float, 4>(handed_over(1 - own, n));
#pragma unroll
            for (int i = 0; i < 4; ++i) out.value[0][n][i] += x.value[i];
        }
        norm.each([&](int row, float& x) { x += shared.favor->norm[chunk_row(row)]; });
    }

    // Divides the rows and stores them, and their divisors.
    DEVICE void finish(Range chunk, Sums& out, Values& norm) {
        float unit = this->unit() * this->unit();
        norm.each([&](int, float& x) { x = x * unit + float(p.epsilon); });
        Values factor = norm;
        factor.each([&](int, float& x) { x = unit * inverse(x); });
        out.scale_rows(factor);
        OutputRows<Element> rows{tiles};
        int first = tile::first_row_of_warp();
        rows.store(out, chunk, shared.out_tile(), first, tiles.place.first_column(p));
        if (!p.statistic || tiles.place.value_tile != 0) return;
        norm.each_once([&](int row, float x) {
            int64_t query = tiles.query_at(chunk, chunk_row(row));
            if (query >= 0 && query < p.queries) static_cast<float*>(p.statistic)[rows.first() + query] = x;
        });
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
        Values norm = map_queries(queries);
        Sums out;
        multiply(queries, out, norm);
        project_next(keys, is_last);
        if (!finishes()) hand_over(out, norm);
        barrier_of_all();
        shared.pipeline.release(turn);
        if (finishes()) {
            take_over(out, norm);
            finish(chunk, out, norm);
        }
        publish_state();
        turn.advance();
    }

    DEVICE void run() {
        this->load_omega();
        enter();
        Range segment = tiles.place.positions(p);
        Projections keys;
        shared.pipeline.wait(turn);
        this->project(keys, shared.keys(turn.stage));
        each_chunk(segment, [&](Range chunk) { step(chunk, chunk.end == segment.end, keys); });
        tile::wait_products<0>(keys);
        if (!p.final_s || segment.end < p.positions) return;
        int64_t head = tiles.place.state_head(p);
        auto* final_stabilizer = static_cast<float*>(p.final_stabilizer);
        this->store(static_cast<float*>(p.final_s) + head * p.features * p.value_width,
                    static_cast<float*>(p.final_z) + head * p.features,
                    final_stabilizer ? final_stabilizer + head : nullptr);
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
