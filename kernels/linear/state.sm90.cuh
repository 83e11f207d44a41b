// S and z of the keys so far, on warpgroups: S in registers, each of them 64 value columns.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/packed.cuh"
#include "chunk.sm90.cuh"

namespace attn::linear {

// φ of a vector, for the elementwise maps; one choice for all of it. To a few ulp of f32, without branches.
DEVICE void map_vector(int map, float (&x)[8]) {
    auto each = [&](auto phi) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = phi(x[i]);
    };
    auto exp = [](float x) { return ptx::exp2(x * float(kLog2E)); };
    switch (map) {
        case kEluPlusOne: return each([exp](float x) { return x >= 0.0f ? x + 1.0f : exp(x); });
        case kRelu: return each([](float x) { return map_element(kRelu, x); });
        case kReluSquared: return each([](float x) { return map_element(kReluSquared, x); });
        case kSilu: return each([exp](float x) { return x * ptx::reciprocal(1.0f + exp(-x)); });
        case kExp: return each(exp);
    }
}

// What brings numbers of this size to 2¹⁴, well inside f16.
DEVICE float fitting_scale(float largest) { return ptx::scale_to(largest, 14); }

template <class Config>
struct StateOfWarpgroup {
    using Element = typename Config::Element;
    using Shared = ChunkShared<Config>;
    using Sums = tile::WarpgroupSums<64>;
    static constexpr int kBlocks = Config::kWidth / 64;

    const LinearMappedParams& params;
    const LinearParams& p;
    const Shared& shared;
    Tiles<InShared<Element>> tiles;
    int own;
    tile::Turn<kStages> turn;
    Sums state[kBlocks];
    // Of the features of this thread's vectors.
    float z[8];

    DEVICE StateOfWarpgroup(const LinearMappedParams& params, const Shared& shared)
        : params(params), p(params.problem), shared(shared), tiles(params.problem), own(ptx::warpgroup()) {}

    DEVICE void barrier_of_all() const { ptx::barrier_sync(kBarrierOfAll, Config::kMappers); }
    DEVICE void barrier_of_one() const { ptx::barrier_sync(kBarrierOfOne + own, 128); }
    DEVICE int vector() const { return ptx::thread() % Config::kVectors; }
    DEVICE int first_column() const { return tiles.place.first_column(p) + 64 * own; }
    // Row of the chunk of a row of this warp.
    DEVICE int chunk_row(int row) const { return tile::first_row_of_warp() + row; }

    // f(feature, column of all value columns, number of S) for those that exist.
    template <class F>
    DEVICE void each_of_state(F f) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
            state[m].each([&](int row, int column, float& x) {
                int feature = 64 * m + chunk_row(row), at = first_column() + column;
                if (feature < p.features && at < p.value_width) f(feature, at, x);
            });
        }
    }

    // φ of this thread's vectors of the keys, what they add to S, and sums of that over its rows.
    DEVICE void map_keys(const typename Shared::Tile& keys, const ChunkRows& rows) {
        float sums[8] = {};
        int thread = tile::thread_here();
        bool is_mapped = p.map != kIdentity || !rows.is_whole;
#pragma unroll 2
        for (int i = 0; i < Config::kRows; ++i) {
            int r = thread / Config::kVectors + i * Config::kStep, column = thread % Config::kVectors * 8;
            Element* at = keys.chunk(r, column);
            auto x = ptx::load_vector<Element, 8>(at);
            float to_end = p.decay == kNoDecay ? 1.0f : rows.to_end[r], rest[8];
            int there = rows.present[r] ? p.features - column : 0;
            tile::widen_vector(x, rest);
            map_vector(p.map, rest);
#pragma unroll
            for (int j = 0; j < 8; ++j) rest[j] = j < there ? rest[j] : 0.0f;
            if (is_mapped) ptx::store_vector(at, tile::narrow_vector<Element>(rest));
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                rest[j] *= to_end;
                sums[j] += rest[j];
            }
#pragma unroll 1
            for (int term = 0; term < params.key_terms; ++term) {
                float rounded[8];
                x = tile::narrow_vector<Element>(rest);
                ptx::store_vector(shared.term(term).chunk(r, column), x);
                tile::widen_vector(x, rounded);
#pragma unroll
                for (int j = 0; j < 8; ++j) rest[j] -= rounded[j];
            }
        }
        if (!has_features()) return;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int mask = Config::kVectors; mask < 32; mask *= 2) sums[j] += ptx::shuffle_xor(sums[j], mask);
            if (ptx::lane() < Config::kVectors) z_of(ptx::warp(), j) = sums[j];
        }
    }

    // A warp's sum of this thread's j-th feature; those of neighbours lie side by side.
    DEVICE float& z_of(int warp, int j) const {
        return shared.scratch->z[warp * Config::kWidth + j * Config::kVectors + vector()];
    }

    // Values of rows without a key become zeros, whatever they were.
    DEVICE void clear_values(const typename Shared::Tile& values, const ChunkRows& rows) const {
        constexpr int kAcross = Config::kColumns / 8;
        for (int i = ptx::thread(); i < kChunk * kAcross; i += Config::kMappers) {
            if (!rows.present[i / kAcross]) {
                ptx::store_vector(values.chunk(i / kAcross, i % kAcross * 8), ptx::Vector<Element, 8>{});
            }
        }
    }

    // Whether anybody asks for z.
    DEVICE bool has_features() const { return p.finish == kNormalize || p.final_z; }

    // Adds the warps' sums of the chunk's features to z.
    DEVICE void add_features(const ChunkRows& rows) {
        if (!has_features()) return;
        float decay = p.decay == kNoDecay ? 1.0f : rows.decay;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float sum = decay * z[j];
            for (int warp = 0; warp < 4 * Config::kReaders; ++warp) sum += z_of(warp, j);
            z[j] = sum;
        }
    }

    DEVICE void shrink_state(const ChunkRows& rows) {
        if (p.decay == kNoDecay) return;
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) state[m].each([&](int, int, float& x) { x *= rows.decay; });
    }

    DEVICE tile::AlongRows<Element, kChunk> own_values() const {
        return tile::AlongRows<Element, kChunk>(shared.values(turn.stage).data + own * kChunk * 64);
    }

    // S += k̃ᵀ v; waits for all products.
    DEVICE void add_keys() {
        auto add = [&](const Element* keys) {
#pragma unroll
            for (int m = 0; m < kBlocks; ++m) {
                tile::AlongRows<Element, kChunk> left(keys, 64 * m);
                tile::multiply_beside<kChunk>(state[m], left, own_values(), true);
            }
            wait_for_state();
        };
        add(params.key_terms == 0 ? shared.keys(turn.stage).data : shared.term(0).data);
#pragma unroll 1
        for (int term = 1; term < params.key_terms; ++term) add(shared.term(term).data);
    }

    DEVICE void wait_for_state() {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) tile::wait_products<0>(state[m]);
    }

    DEVICE void clear() {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) state[m] = Sums::zero();
#pragma unroll
        for (int i = 0; i < 8; ++i) z[i] = 0.0f;
    }

    // Writes S at rows of `value_width`, and z by the first of the value tiles.
    DEVICE void store(float* to_s, float* to_z) {
        each_of_state([&](int feature, int column, float& x) { to_s[int64_t(feature) * p.value_width + column] = x; });
        if (tiles.place.value_tile != 0 || ptx::thread() >= Config::kVectors) return;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (8 * vector() + i < p.features) to_z[8 * vector() + i] = z[i];
        }
    }
};

}  // namespace attn::linear
