// What queries read of S, on warpgroups: S rounded in shared memory, features of queries, and the ends of rows.
#pragma once

#include "../tile/norm.cuh"
#include "outputs.sm90.cuh"
#include "state.sm90.cuh"

namespace attn::linear {

template <class Config>
struct ReaderOfWarpgroup : StateOfWarpgroup<Config> {
    using Base = StateOfWarpgroup<Config>;
    using typename Base::Element;
    using typename Base::Shared;
    using Base::kBlocks, Base::own, Base::p, Base::params, Base::shared, Base::state, Base::tiles, Base::turn, Base::z;
    using Base::barrier_of_all, Base::barrier_of_one, Base::chunk_row, Base::first_column, Base::vector;
    using Values = tile::RowValues<float, 1>;
    static constexpr int kVectors = Config::kVectors;
    // Whether numbers must be brought into the range of the elements.
    static constexpr bool kScales = !ptx::is_bf16<Element>;

    tile::WarpgroupSums<64> out;
    // 1 over that of S in shared memory.
    float state_scale = 1.0f;

    using Base::Base;

    // S and z before the first queries.
    DEVICE void enter(const EnteringSums& from) {
        this->clear();
        if (from.s) {
            this->each_of_state([&](int feature, int column, float& x) { x = from.s[feature * from.row + column]; });
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (8 * vector() + i < p.features) z[i] = from.z[8 * vector() + i];
            }
        }
        publish_state();
    }

    // S, rounded, to where the next products read it.
    DEVICE void publish_state() {
        state_scale = publish(state, shared.state_of(own), shared.scratch->largest + 4 * own, kBarrierOfOne + own);
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
            tile::widen_vector(x, phi);
            map_vector(p.map, phi);
            x = tile::narrow_vector<Element>(phi);
            if (p.map != kIdentity) ptx::store_vector(at, x);
            if (p.finish != kNormalize) continue;
            tile::widen_vector(x, phi);
#pragma unroll
            for (int j = 0; j < 8; ++j) norm += phi[j] * z[j];
#pragma unroll
            for (int mask = kVectors / 2; mask > 0; mask /= 2) norm += ptx::shuffle_xor(norm, mask);
            if (vector() == 0) shared.scratch->norm[r] = norm;
        }
    }

    DEVICE void read_state() {
        tile::AlongColumns<Element, kChunk> queries(shared.queries(turn.stage).data);
        tile::AlongRows<Element, Config::kWidth> before(shared.state_of(own).data);
        tile::multiply_beside<Config::kWidth>(out, queries, before, false);
    }

    // √(Σ o²) of the rows over all columns of the block.
    DEVICE Values norms() {
        auto norms = Values::filled(0.0f);
        auto scales = out.fold_rows(norms, [](float a, float b) { return ptx::max(ptx::abs(a), ptx::abs(b)); });
        scales.each([](int, float& x) { x = tile::scale_of_squares(x); });
        auto squared = out;
        squared.scale_rows(scales);
        squared.each([](int, int, float& x) { x *= x; });
        norms = squared.row_sums(norms);
        norms.with(scales, [](float& x, float scale) { x = tile::norm_of(x, scale); });
        if constexpr (Config::kReaders == 1) return norms;
        auto& all = shared.scratch->norms;
        norms.each_once([&](int row, float x) { all[own][chunk_row(row)] = x; });
        barrier_of_all();
        norms.each([&](int row, float& x) { x = tile::norm_of_both(all[0][chunk_row(row)], all[1][chunk_row(row)]); });
        return norms;
    }

    DEVICE OutputRows<Element> rows_out() const { return {tiles}; }

    // Divides the rows, which `factor` brings to their size, and stores them and their divisors; `weights` are those of
    // the keys that they have read.
    DEVICE void finish(Range chunk, Values factor, const Values& weights) {
        Values divisor = Values::filled(1.0f);
        if (p.finish == kNormalize) {
            divisor = weights;
            divisor.each([&](int, float& x) { x += float(p.epsilon); });
            factor.with(divisor, [](float& x, float y) { x *= inverse(y); });
        } else if (p.finish == kRmsNorm) {
            if constexpr (kScales) out.scale_rows(factor);
            divisor = norms();
            divisor.each([&](int, float& x) { x = tile::root_mean_square(x, p.value_width, p.epsilon); });
            factor = divisor;
            factor.each([](int, float& x) { x = inverse(x); });
        }
        out.scale_rows(factor);
        rows_out().store(out, chunk, shared.out_of(own), tile::first_row_of_warp(), first_column());
        bool has_statistic = p.statistic && (p.finish == kNormalize || p.finish == kRmsNorm);
        if (!has_statistic || own != 0 || tiles.place.value_tile != 0) return;
        divisor.each_once([&](int row, float x) {
            int64_t query = tiles.query_at(chunk, chunk_row(row));
            if (query >= 0 && query < p.queries) static_cast<float*>(p.statistic)[rows_out().first() + query] = x;
        });
    }

    // step(chunk) for the chunks of the block's segment, in order; hands out the state behind the last segment.
    template <class F>
    DEVICE void walk(F step) {
        enter(EnteringSums(p, tiles.place));
        Range segment = tiles.place.positions(p);
        each_chunk(segment, step);
        if (!p.final_s || segment.end < p.positions) return;
        int64_t head = tiles.place.state_head(p);
        this->store(static_cast<float*>(p.final_s) + head * p.features * p.value_width,
                    static_cast<float*>(p.final_z) + head * p.features);
    }
};

}  // namespace attn::linear
