// FAVOR+ features of a chunk on two warpgroups, and their memory: each has half of the features, for the 64 value columns of
// the block.
//
//     p_f = ⟨ω_f, x̃⟩    φ_f = √D′⁻¹ exp(p_f − ‖x̃‖²/2)    or, ReLU features, √D′⁻¹ max(p_f, 0) + κ
//
// Exponential features are relative to the largest of their row, which for a key goes into its weight: with u_j a key's
// largest exponent and c_i the largest of keys up to i, the stabiliser, key j has the weight e^{u_j − c_i} at row i. Kept are
// φ and S as multiples of `unit`, which makes the largest φ 1, or 2¹⁴ in f16.
#pragma once

#include "chunk.sm90.cuh"

namespace attn::linear {

// Width of queries and keys, and features, filled up with zeros. Sides as in ChunkConfig.
template <class E, int Width, int Features, int Sides>
struct FavorConfig {
    using Element = E;
    static constexpr int kWidth = Width, kFeatures = Features, kColumns = 64;
    // Features of a warpgroup.
    static constexpr int kOwn = Features / 2;
    static constexpr int kReaders = 2, kMappers = 256;
    static constexpr bool kReads = Sides != 1, kAbsorbs = Sides != 0, kHasDecays = false;
    // Elements of queries or keys, of values, of a warpgroup's features of a chunk, its S, and its part of ω.
    static constexpr int kSide = kChunk * Width, kValues = kChunk * 64, kPhi = kChunk * kOwn, kState = kOwn * 64;
    static constexpr int kOmega = kOwn * Width;
    static constexpr int kStage = Sides == 0 ? kSide : Sides * kSide + kValues;
    // Threads of ‖x̃‖² of a row.
    static constexpr int kSquaring = kMappers / kChunk;
};

// e^{a − b} for a ≤ b; 0 where a is −∞.
DEVICE float relative(float a, float b) {
    return a == negative_infinity<float>() ? 0.0f : ptx::exp2((a - b) * 1.44269504f);
}

// Largest exponents of the keys of a chunk, u, and up to each of its rows, c; c before the chunk.
struct Stabilizers {
    float own[kChunk], now[kChunk], entering;
};

// Between the warps.
struct FavorScratch {
    // z before the chunk, in units.
    float z[256];
    // Largest projection of a row, over the features of a warpgroup: of keys, and of queries.
    float largest[2][2][kChunk];
    // ‖x̃‖²/2 of the keys.
    float half_square[kChunk];
    // Of each warpgroup, the same.
    Stabilizers stabilizers[2];
    // What a warpgroup hands over of the divisors.
    float norm[kChunk];
    // Largest |S| of a warp's rows, and 1 over what a warpgroup's S was multiplied by.
    float largest_sum[8], state_scale[2];
};

template <class Config>
struct FavorShared : ChunkShared<Config> {
    using Element = typename Config::Element;
    using Tile = tile::SwizzledTile<Element>;
    Element *features, *omega;
    FavorScratch* favor;

    // src/gpu/linear/favor.rs adds up the same; the terms of ω come last.
    DEVICE static FavorShared of_block() {
        constexpr int kReads = Config::kReads;
        constexpr int kTiles = kStages * Config::kStage + 2 * Config::kPhi + kReads * (2 * Config::kState + kChunk * 64);
        constexpr int kSmall = sizeof(FavorScratch) + kStages * sizeof(ChunkRows) + 8 * ChunkShared<Config>::Stages::kBarriers;
        FavorShared shared;
        shared.stages = ptx::shared_memory<Element>();
        shared.features = shared.stages + kStages * Config::kStage;
        shared.state = shared.features + 2 * Config::kPhi;
        shared.out = shared.state + kReads * 2 * Config::kState;
        shared.favor = reinterpret_cast<FavorScratch*>(shared.stages + kTiles);
        shared.rows = reinterpret_cast<ChunkRows*>(shared.favor + 1);
        shared.pipeline = {reinterpret_cast<ptx::Mbarrier*>(shared.rows + kStages)};
        shared.omega = shared.stages + kTiles + (kSmall + 1023) / 1024 * 512;
        return shared;
    }

    // S, features and ω of a warpgroup.
    DEVICE Tile state_of(int warpgroup) const { return {this->state + warpgroup * Config::kState, Config::kOwn}; }
    DEVICE Tile features_of(int warpgroup) const { return {features + warpgroup * Config::kPhi, kChunk}; }
    DEVICE Tile omega_of(int term, int warpgroup) const {
        return {omega + (2 * term + warpgroup) * Config::kOmega, Config::kOwn};
    }
    DEVICE Tile out_tile() const { return {this->out, kChunk}; }
};

}  // namespace attn::linear
