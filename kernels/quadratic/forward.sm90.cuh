// What forward.sm90.cu has of its own in shared memory, and its copies.
//
//     shared memory      size                      filled by copies, and released
//     q                  kRows × kWidth            behind the next block's first k; after the last scores
//     k                  2 stages kKeys × kWidth   a tile ahead; after its scores
//     v                  2 stages kKeys × kValues  a step behind k; after its product
//     mbarriers          full and empty for q and for each stage
//
// Columns past the widths are zeros that the copy engine fills in; so are rows past the end.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/packed.cuh"
#include "../tile/pipeline.cuh"
#include "logits.cuh"
#include "schedule.sm90.cuh"
#include "weight.sm90.cuh"

namespace attn::quadratic {

constexpr int kStages = 2;

// Where tiles can be that only some rows see: at the end of the keys, or anywhere.
struct EdgeAtEnd {};
struct EdgesAnywhere {};

// Columns of queries and keys, and of values; keys of a tile.
template <int Columns, int ValueColumns, int Rows>
struct ForwardTile {
    static constexpr int kWidth = Columns, kValues = ValueColumns, kKeys = Rows;
};

template <class E, class RowWeights, class Tile, class WhereEdges>
struct ForwardConfig : Tile {
    using Element = E;
    using Weight = RowWeights;
    using Params = QuadraticMappedParams<E>;
    using Edges = WhereEdges;
    static constexpr int kRows = 64 * kReaders;
    using Tile::kKeys, Tile::kValues, Tile::kWidth;
    // Whether the warpgroups take turns: one multiplies while the other has exponentials to do.
    static constexpr bool kTakesTurns = kValues <= 128;
    // Whether values may be more than a block has columns for: then they are cut into as many tiles as they need, which are
    // heads of their own with queries and keys in common.
    static constexpr bool kCutsValues = kValues > kWidth;
    // Elements of tiles.
    static constexpr int kOwn = kRows * kWidth, kOfKeys = kKeys * kWidth, kOfValues = kKeys * kValues;
    using Scores = tile::WarpgroupSums<kKeys>;
    using SumsTile = tile::WarpgroupSums<kValues>;
    using Weights = tile::PackedRows<E, kKeys>;

    DEVICE static int value_tiles(const QuadraticParams<E>& problem) {
        return kCutsValues ? (problem.value_width + kValues - 1) / kValues : 1;
    }
};

template <class Config>
struct ForwardShared {
    using Element = typename Config::Element;
    using Stages = tile::Pipeline<kStages>;
    using Single = tile::Pipeline<1>;
    Element *q, *k, *v;
    Single q_stage;
    Stages k_stages, v_stages;

    DEVICE static ForwardShared of_block() {
        Element* q = ptx::shared_memory<Element>();
        Element* k = q + Config::kOwn;
        Element* v = k + kStages * Config::kOfKeys;
        auto* barriers = reinterpret_cast<ptx::Mbarrier*>(v + kStages * Config::kOfValues);
        auto* of_keys = barriers + Single::kBarriers;
        return {q, k, v, {barriers}, {of_keys}, {of_keys + Stages::kBarriers}};
    }

    DEVICE void initialise() const {
        tile::initialise_barriers([&] {
            q_stage.initialise(kReaders);
            k_stages.initialise(kReaders);
            v_stages.initialise(kReaders);
        });
    }

    DEVICE Element* k_tile(int stage) const { return k + stage * Config::kOfKeys; }
    DEVICE Element* v_tile(int stage) const { return v + stage * Config::kOfValues; }
};

// The tiles of keys that some row of a block sees: those of this part, if keys are divided among blocks along z.
template <class Config>
DEVICE OtherTiles tiles_of(const typename Config::Params& params, const RowBlock& block) {
    auto tiles = OtherTiles::of_queries(params.problem, block.first, Config::kRows, Config::kKeys);
    return tiles.part(int(ptx::block_z()), params.problem.splits);
}

// The query head and the first value column of a block.
template <class Config>
struct HeadColumns {
    int head, column;

    DEVICE static HeadColumns of(const QuadraticParams<typename Config::Element>& problem, const RowBlock& block) {
        int tiles = Config::value_tiles(problem);
        return {block.head / tiles, block.head % tiles * Config::kValues};
    }
};

// What fills the stages, by one thread.
template <class Config>
struct ForwardCopies {
    using Tile = tile::SwizzledTile<typename Config::Element>;
    static constexpr int kSize = sizeof(typename Config::Element);
    const typename Config::Params& params;
    const ForwardShared<Config>& shared;
    tile::Turn<1> q_turn;
    tile::Turn<kStages> k_turn, v_turn;

    DEVICE void load_queries(const RowBlock& block) {
        auto* full = shared.q_stage.fill(q_turn, kSize * Config::kOwn);
        tile::load_panels(Tile{shared.q, Config::kRows}, Config::kWidth / tile::kPanelColumns, params.q_map, block.first,
                          place(block).head, block.batch, full);
        q_turn.advance();
    }

    DEVICE void load_keys(const RowBlock& block, int tile) {
        auto* full = shared.k_stages.fill(k_turn, kSize * Config::kOfKeys);
        tile::load_panels(Tile{shared.k_tile(k_turn.stage), Config::kKeys}, Config::kWidth / tile::kPanelColumns,
                          params.k_map, tile * Config::kKeys, key_head(block), block.batch, full);
        k_turn.advance();
    }

    DEVICE void load_values(const RowBlock& block, int tile) {
        auto* full = shared.v_stages.fill(v_turn, kSize * Config::kOfValues);
        tile::load_panels(Tile{shared.v_tile(v_turn.stage), Config::kKeys}, Config::kValues / tile::kPanelColumns,
                          params.v_map, tile * Config::kKeys, key_head(block), block.batch, full, place(block).column);
        v_turn.advance();
    }

    DEVICE auto place(const RowBlock& block) const { return HeadColumns<Config>::of(params.problem, block); }
    DEVICE int key_head(const RowBlock& block) const { return place(block).head / params.problem.group(); }

    // A stage for keys is free before q is.
    DEVICE void load(const RowBlock& block) {
        auto tiles = tiles_of<Config>(params, block);
        if (tiles.first >= tiles.end) return;
        int tile = tiles.end - 1;
        load_keys(block, tile);
        load_queries(block);
        while (--tile >= tiles.first) {
            load_keys(block, tile);
            load_values(block, tile + 1);
        }
        load_values(block, tiles.first);
    }
};

}  // namespace attn::quadratic
