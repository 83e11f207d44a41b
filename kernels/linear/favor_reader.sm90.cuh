// What queries with FAVOR+ features read of S, on two warpgroups: S rounded in shared memory, the queries' features, and the
// ends of rows, which the warpgroups add up, 32 rows each.
#pragma once

#include "favor_state.sm90.cuh"
#include "outputs.sm90.cuh"

namespace attn::linear {

template <class Config>
struct FavorReader : FavorState<Config> {
    using Base = FavorState<Config>;
    using typename Base::Element;
    using typename Base::Projections;
    using typename Base::Values;
    using Base::own, Base::p, Base::shared, Base::stabilizer, Base::state, Base::tiles, Base::z;
    using Base::chunk_row, Base::feature, Base::features, Base::first_feature;
    static constexpr bool kScales = !ptx::is_bf16<Element>;
    using Sums = tile::WarpgroupSums<64>;

    using Base::Base;

    // S, z and the stabiliser before the first queries.
    DEVICE void enter() {
        const Place& place = tiles.place;
        EnteringSums from(p, place);
        if (from.s) {
            float units = 1.0f / this->unit();
            this->each_of_state([&](int f, int column, float& x) { x = from.s[f * from.row + column] * units; });
            int f = feature();
            if (f < features()) z = from.z[first_feature() + f] * units;
        }
        if (is_stabilized(p) && (p.segments > 1 || is_full(p))) {
            int64_t slot = place.slot(p, is_full(p) ? p.segments : place.segment);
            stabilizer = static_cast<const float*>(p.entering_stabilizer)[slot];
        } else if (is_stabilized(p) && p.state_stabilizer) {
            stabilizer = *place.template given<float>(p.state_stabilizer, p.state_stabilizer_strides);
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
        tile::round_to<Element>(queries);
        const float* before = shared.favor->z + first_feature();
        Values norm = Values::filled(0.0f);
        queries.each_indexed([&](int m, int i, int, int f, float& x) { norm.value[m][i / 2] += x * before[f]; });
        return norm.fold_lanes([](float a, float b) { return a + b; });
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

    // Adds up rows of the warpgroups, divides and stores them. Between, at a barrier of all, the chunk's stage is free.
    DEVICE void end_rows(Range chunk, Sums& out, Values& norm) {
        if (!finishes()) hand_over(out, norm);
        this->barrier_of_all();
        shared.pipeline.release(this->turn);
        if (!finishes()) return;
        take_over(out, norm);
        finish(chunk, out, norm);
    }

    // The state behind the last segment.
    DEVICE void hand_out_state(Range segment) {
        if (!p.final_s || segment.end < p.positions) return;
        int64_t head = tiles.place.state_head(p);
        auto* final_stabilizer = static_cast<float*>(p.final_stabilizer);
        this->store(static_cast<float*>(p.final_s) + head * p.features * p.value_width,
                    static_cast<float*>(p.final_z) + head * p.features,
                    final_stabilizer ? final_stabilizer + head : nullptr);
    }
};

}  // namespace attn::linear
