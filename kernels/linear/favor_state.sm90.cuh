// S and z of the keys so far, with FAVOR+ features, on two warpgroups: each has half of the features, S in registers.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/packed.cuh"
#include "favor_chunk.sm90.cuh"

namespace attn::linear {

// Terms of ω: as exact as what keys add to S, and never only one, which would be another ω.
DEVICE int omega_terms(const LinearMappedParams& params) { return ptx::max(2, params.key_terms); }

template <class Config>
struct FavorState {
    using Element = typename Config::Element;
    using Shared = FavorShared<Config>;
    using Projections = tile::WarpgroupSums<Config::kOwn>;
    using Values = tile::RowValues<float, 1>;
    static constexpr int kBlocks = Config::kOwn / 64;

    const LinearMappedParams& params;
    const LinearParams& p;
    const Shared& shared;
    Tiles<InShared<Element>> tiles;
    int own;
    tile::Turn<kStages> turn;
    tile::WarpgroupSums<64> state[kBlocks];
    // z of the feature of this thread.
    float z = 0.0f;
    // Of the keys so far.
    float stabilizer;

    DEVICE FavorState(const LinearMappedParams& params, const Shared& shared)
        : params(params), p(params.problem), shared(shared), tiles(params.problem), own(ptx::warpgroup()) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) state[m] = tile::WarpgroupSums<64>::zero();
        stabilizer = is_stabilized(p) ? negative_infinity<float>() : 0.0f;
    }

    DEVICE void barrier_of_all() const { ptx::barrier_sync(kBarrierOfAll, Config::kMappers); }
    DEVICE void barrier_of_one() const { ptx::barrier_sync(kBarrierOfOne + own, 128); }
    DEVICE int chunk_row(int row) const { return tile::first_row_of_warp() + row; }
    DEVICE int first_feature() const { return own * Config::kOwn; }
    // Features of the warpgroup that there are.
    DEVICE int features() const { return ptx::min(p.features - first_feature(), Config::kOwn); }
    // Feature of this thread, if it is below `features`.
    DEVICE int feature() const { return tile::thread_here() % 128; }

    // log₂ of the largest exponential feature.
    DEVICE float range() const { return is_stabilized(p) && !ptx::is_bf16<Element> ? 14.0f : 0.0f; }
    DEVICE float unit() const { return ptx::exp2(-range()) / ptx::sqrt(float(p.features)); }

    // f(feature, column of all value columns, number of S) for those that exist.
    template <class F>
    DEVICE void each_of_state(F f) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
            state[m].each([&](int row, int column, float& x) {
                int feature = 64 * m + chunk_row(row), at = tiles.place.first_column(p) + column;
                if (feature < features() && at < p.value_width) f(first_feature() + feature, at, x);
            });
        }
    }

    // ω D^{-1/4} as the sum of elements, and for hyperbolic features −ω behind ω; by both warpgroups.
    DEVICE void load_omega() const {
        constexpr int kVectors = Config::kWidth / 8;
        float factor = 1.0f / ptx::sqrt(ptx::sqrt(float(p.width)));
#pragma unroll 1
        for (int i = ptx::thread(); i < Config::kFeatures * kVectors; i += Config::kMappers) {
            int f = i / kVectors, column = i % kVectors * 8;
            int direction = f < p.directions_count ? f : f - p.directions_count;
            auto from = static_cast<const float*>(p.omega) + direction * p.omega_stride;
            float sign = f < p.directions_count ? factor : -factor, rest[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) rest[j] = f < p.features && column + j < p.width ? from[column + j] * sign : 0.0f;
#pragma unroll 1
            for (int term = 0; term < omega_terms(params); ++term) {
                ptx::Vector<Element, 8> x;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    x.value[j] = ptx::from_float<Element>(rest[j]);
                    rest[j] -= ptx::to_float(x.value[j]);
                }
                ptx::store_vector(shared.omega_of(term, f / Config::kOwn).chunk(f % Config::kOwn, column), x);
            }
        }
        ptx::fence_proxy_async();
        barrier_of_all();
    }

    // Projections of rows on this warpgroup's directions, beside the threads; smallest terms first.
    DEVICE void project(Projections& into, const typename Shared::Tile& x) const {
        tile::AlongColumns<Element, kChunk> left(x.data);
        auto add = [&](int term) {
            tile::AlongColumns<Element, Config::kOwn> right(shared.omega_of(term, own).data);
            tile::multiply_beside<Config::kWidth>(into, left, right, true);
        };
        into = Projections::zero();
        if (omega_terms(params) > 2) {
            add(2);
            // A branch around products that are under way would serialise all.
            tile::wait_products<0>(into);
        }
        add(1);
        add(0);
    }

    // Tells the other warpgroup the largest projections of the rows; those of no direction are −∞.
    DEVICE void tell_largest(Projections& x, int side) const {
        if (!is_stabilized(p)) return;
        if (p.features < Config::kFeatures) {
            x.each([&](int, int f, float& y) { y = f < features() ? y : negative_infinity<float>(); });
        }
        auto largest = x.row_maxima(Values::filled(negative_infinity<float>()));
        largest.each_once([&](int row, float y) { shared.favor->largest[side][own][chunk_row(row)] = y; });
    }

    DEVICE float largest(int side, int r) const {
        const auto& all = shared.favor->largest[side];
        return ptx::max(all[0][r], all[1][r]);
    }

    // Projections become features, in units.
    DEVICE void map(Projections& x, int side) const {
        if (is_stabilized(p)) {
            Values most = Values::filled(0.0f);
            most.each([&](int row, float& y) { y = largest(side, chunk_row(row)); });
            float exponent = range();
            x.with_rows(most, [&](float& y, float most) { y = ptx::exp2(ptx::fma(y - most, 1.44269504f, exponent)); });
            return;
        }
        float offset = float(kReluOffset) * ptx::sqrt(float(p.features));
        x.each([&](int, int f, float& y) { y = f < features() ? ptx::max(y, 0.0f) + offset : 0.0f; });
    }

    // Up to the barrier of all warpgroups: what projections of the keys, under way, need to become features, and values.
    DEVICE void project_keys(Projections& keys, const ChunkRows& rows) {
        auto x = shared.keys(turn.stage);
        int thread = tile::thread_here(), r = thread / Config::kSquaring, quarter = thread % Config::kSquaring;
        float square = 0.0f;
#pragma unroll 1
        for (int c = 8 * quarter; c < Config::kWidth; c += 8 * Config::kSquaring) {
            auto part = ptx::load_vector<Element, 8>(x.chunk(r, c));
#pragma unroll
            for (int j = 0; j < 8; ++j) square += ptx::to_float(part.value[j]) * ptx::to_float(part.value[j]);
        }
#pragma unroll
        for (int mask = 1; mask < Config::kSquaring; mask *= 2) square += ptx::shuffle_xor(square, mask);
        if (quarter == 0) shared.favor->half_square[r] = square * (0.5f / ptx::sqrt(float(p.width)));
        if (!rows.is_whole) clear_values(rows);
        tile::wait_products<0>(keys);
        tell_largest(keys, 0);
    }

    // Values of rows without a key become zeros, whatever they were.
    DEVICE void clear_values(const ChunkRows& rows) const {
        for (int i = ptx::thread(); i < kChunk * 8; i += Config::kMappers) {
            if (!rows.present[i / 8]) {
                ptx::store_vector(shared.values(turn.stage).chunk(i / 8, i % 8 * 8), ptx::Vector<Element, 8>{});
            }
        }
        ptx::fence_proxy_async();
    }

    // u of a row.
    DEVICE float exponent(const ChunkRows& rows, int r) const {
        if (!rows.present[r]) return negative_infinity<float>();
        return is_stabilized(p) ? largest(0, r) - shared.favor->half_square[r] : 0.0f;
    }

    // S and z relative to the stabiliser, which they were to `before`.
    DEVICE void shrink_state(float before) {
        if (before == stabilizer) return;
        float left = ptx::exp(before - stabilizer);
        z *= left;
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) state[m].each([&](int, int, float& x) { x *= left; });
    }

    // Moves on by a chunk; two rows for each lane, by every warp.
    DEVICE void stabilize(const ChunkRows& rows) {
        int r = 2 * ptx::lane();
        float first = exponent(rows, r), second = exponent(rows, r + 1), all = ptx::max(first, second);
#pragma unroll
        for (int delta = 1; delta < 32; delta *= 2) all = ptx::max(all, ptx::shuffle_up(all, delta));
        float before = ptx::shuffle_up(all, 1);
        float entering = stabilizer;
        before = ptx::lane() == 0 ? entering : ptx::max(before, entering);
        stabilizer = ptx::max(entering, ptx::shuffle(all, 31));
        shrink_state(entering);
        if (ptx::warp() % 4 != 0) return;
        Stabilizers& kept = shared.favor->stabilizers[own];
        if (ptx::lane() == 0) kept.entering = entering;
        kept.own[r] = first, kept.own[r + 1] = second;
        kept.now[r] = ptx::max(before, first), kept.now[r + 1] = ptx::max(kept.now[r], second);
    }

    // Behind the barrier: the keys' features, and stabilisers.
    DEVICE void map_keys(Projections& keys, const ChunkRows& rows) {
        stabilize(rows);
        map(keys, 0);
        if (rows.is_whole) return;
        keys.each([&](int row, int, float& x) { x = rows.present[chunk_row(row)] ? x : 0.0f; });
    }

    // The keys' features times factors of their rows, less the earlier of the elements whose sum they are, rounded.
    DEVICE void store_keys(const Projections& keys, const Values& factors, int term) const {
#pragma unroll
        for (int n = 0; n < Config::kOwn / 16; ++n) {
            tile::WarpgroupSums<16> part;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                part.value[0][0][i] = keys.value[0][2 * n][i];
                part.value[0][1][i] = keys.value[0][2 * n + 1][i];
            }
            part.scale_rows(factors);
#pragma unroll 1
            for (int i = 0; i < term; ++i) {
                auto rounded = part;
                tile::round_to<Element>(rounded);
                part.with_indexed(rounded, [](int, int, int, int, float& x, float& y) { x -= y; });
            }
            tile::PackedRows<Element, 16> packed;
            packed.set(part);
            tile::store(shared.features_of(own), tile::first_row_of_warp(), packed, 16 * n);
        }
        ptx::fence_proxy_async();
        barrier_of_one();
    }

    // S += Σ_j e^{u_j − c} φ_jᵀ v_j and z alike, by one of the elements whose sum keys add. Products are under way.
    DEVICE void add_term(const Projections& keys, const ChunkRows& rows, int term) {
        Values to_end = Values::filled(0.0f);
        to_end.each([&](int row, float& x) { x = relative(exponent(rows, chunk_row(row)), stabilizer); });
        store_keys(keys, to_end, term);
        auto tile = shared.features_of(own);
        tile::AlongRows<Element, kChunk> values(shared.values(turn.stage).data);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
            tile::AlongRows<Element, kChunk> left(tile.data, 64 * m);
            tile::multiply_beside<kChunk>(state[m], left, values, true);
        }
        int f = feature();
        if (f >= Config::kOwn) return;
#pragma unroll 8
        for (int r = 0; r < kChunk; ++r) z += ptx::to_float(tile.at(r, f));
    }

    // Waits for the first of them, and adds the others; the features' tile is free then.
    DEVICE void add_rest(const Projections& keys, const ChunkRows& rows) {
        wait_for_state();
        barrier_of_one();
#pragma unroll 1
        for (int term = 1; term < params.key_terms; ++term) {
            add_term(keys, rows, term);
            wait_for_state();
            barrier_of_one();
        }
    }

    DEVICE void wait_for_state() {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) tile::wait_products<0>(state[m]);
    }

    // Writes S at rows of `value_width`, and z and the stabiliser by the first of the value tiles.
    DEVICE void store(float* to_s, float* to_z, float* to_stabilizer) {
        float in_units = unit();
        each_of_state([&](int f, int column, float& x) { to_s[int64_t(f) * p.value_width + column] = x * in_units; });
        if (tiles.place.value_tile != 0) return;
        int f = feature();
        if (f < features()) to_z[first_feature() + f] = z * in_units;
        if (to_stabilizer && ptx::thread() == 0) *to_stabilizer = is_stabilized(p) ? stabilizer : negative_infinity<float>();
    }
};

}  // namespace attn::linear
