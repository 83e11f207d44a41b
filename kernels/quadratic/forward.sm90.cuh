// What forward.sm90.cu has of its own in shared memory, and its copies.
//
//     shared memory      size                      filled by copies, and released
//     q                  kRows × kWidth            behind the next block's first k; after the last scores
//     k                  2 stages kKeys × kWidth   a tile ahead; after its scores
//     v                  2 stages kKeys × kWidth   a step behind k; after its product
//     mbarriers          full and empty for q and for each stage
//
// Columns past the widths are zeros that the copy engine fills in; so are rows past the end.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/packed.cuh"
#include "../tile/pipeline.cuh"
#include "logits.cuh"
#include "schedule.sm90.cuh"
#include "weight.cuh"

namespace attn::quadratic {

constexpr int kStages = 2;

// Where tiles can be that only some rows see: at the end of the keys, or anywhere.
struct EdgeAtEnd {};
struct EdgesAnywhere {};

template <class E, int Width, int Keys, class WhereEdges>
struct WarpgroupConfig {
    using Element = E;
    using Params = QuadraticMappedParams<E>;
    using Edges = WhereEdges;
    static constexpr int kRows = 64 * kReaders;
    static constexpr int kWidth = Width;
    static constexpr int kKeys = Keys;
    static constexpr int kPanels = Width / tile::kPanelColumns;
    // Whether the warpgroups take turns: one multiplies while the other has exponentials to do.
    static constexpr bool kTakesTurns = Width <= 128;
    // Elements, and bytes of a copy.
    static constexpr int kOwn = kRows * Width, kOther = Keys * Width;
    using Scores = tile::WarpgroupSums<Keys>;
    using SumsTile = tile::WarpgroupSums<Width>;
    using Weights = tile::PackedRows<E, Keys>;
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
        Element* v = k + kStages * Config::kOther;
        auto* barriers = reinterpret_cast<ptx::Mbarrier*>(v + kStages * Config::kOther);
        auto* of_keys = barriers + Single::kBarriers;
        return {q, k, v, {barriers}, {of_keys}, {of_keys + Stages::kBarriers}};
    }

    DEVICE void initialise() const {
        if (ptx::thread() == 0) {
            q_stage.initialise(kReaders);
            k_stages.initialise(kReaders);
            v_stages.initialise(kReaders);
            ptx::fence_mbarrier_init();
        }
        ptx::barrier_sync();
    }

    DEVICE Element* k_tile(int stage) const { return k + stage * Config::kOther; }
    DEVICE Element* v_tile(int stage) const { return v + stage * Config::kOther; }
};

// The tiles of keys that some row of a block sees.
template <class Config>
DEVICE OtherTiles tiles_of(const typename Config::Params& params, const RowBlock& block) {
    return OtherTiles::of_queries(params.problem, block.first, Config::kRows, Config::kKeys);
}

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
        tile::load_panels(Tile{shared.q, Config::kRows}, Config::kPanels, params.q_map, block.first, block.head,
                          block.batch, full);
        q_turn.advance();
    }

    DEVICE void load_keys(const RowBlock& block, int tile) {
        auto* full = shared.k_stages.fill(k_turn, kSize * Config::kOther);
        tile::load_panels(Tile{shared.k_tile(k_turn.stage), Config::kKeys}, Config::kPanels, params.k_map,
                          tile * Config::kKeys, key_head(block), block.batch, full);
        k_turn.advance();
    }

    DEVICE void load_values(const RowBlock& block, int tile) {
        auto* full = shared.v_stages.fill(v_turn, kSize * Config::kOther);
        tile::load_panels(Tile{shared.v_tile(v_turn.stage), Config::kKeys}, Config::kPanels, params.v_map,
                          tile * Config::kKeys, key_head(block), block.batch, full);
        v_turn.advance();
    }

    DEVICE int key_head(const RowBlock& block) const { return block.head / params.problem.group(); }

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
