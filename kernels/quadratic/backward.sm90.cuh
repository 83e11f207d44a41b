// What the two kernels of the backward pass on warpgroups share: own rows of a block against tiles of the other side's
// rows, with the products
//
//     scores    = own first · (other first)ᵀ        d_weights = own second · (other second)ᵀ
//
// of each of the two warpgroups of 64 own rows (SharedRows: the same 64). Sides are those of sides.cuh. Warpgroup 0 fills
// shared memory:
//
//     own first, second     kRows × kWidth            once
//     other first, second   kStages of kOthers × kWidth each
//     factors               kStages of kOthers        RowFactors of the other side's rows, if those are queries
//     mbarriers             own, and full and empty for each stage
//
// Columns past the widths are zeros that the copy engine fills in; so are rows past the end.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/pipeline.cuh"
#include "../tile/warpgroup.cuh"
#include "logits.cuh"
#include "schedule.sm90.cuh"
#include "weight.sm90.cuh"

namespace attn::quadratic {

template <class E, int Columns, int OtherRows, int StageCount>
struct BackwardTile {
    using Element = E;
    static constexpr int kWidth = Columns, kOthers = OtherRows, kStages = StageCount, kRows = 64 * kReaders;
};

// The same where both warpgroups have the same own rows.
template <class Tile>
struct SharedRows : Tile {
    static constexpr int kRows = 64;
};

template <class Tile, class Gradients = SoftmaxGradients>
struct BackwardConfig : Tile {
    using E = typename Tile::Element;
    using Weight = Gradients;
    using Params = QuadraticMappedParams<E>;
    using Problem = QuadraticParams<E>;
    using Tile::kOthers, Tile::kRows, Tile::kStages, Tile::kWidth;
    static constexpr int kPanels = kWidth / tile::kPanelColumns;
    // Elements.
    static constexpr int kOwn = kRows * kWidth, kOther = kOthers * kWidth;
    using Scores = tile::WarpgroupSums<kOthers>;
    using SumsTile = tile::WarpgroupSums<kWidth>;
    using Packed = tile::PackedRows<E, kOthers>;
    using Turn = tile::Turn<kStages>;
};

template <class Config>
struct BackwardShared {
    using Element = typename Config::Element;
    using Stages = tile::Pipeline<Config::kStages>;
    using Factors = RowFactors<float>;
    Element *own_first, *own_second, *others;
    Factors* factors;
    ptx::Mbarrier* own_full;
    Stages stages;

    DEVICE static BackwardShared of_block() {
        Element* own = ptx::shared_memory<Element>();
        Element* others = own + 2 * Config::kOwn;
        auto* factors = reinterpret_cast<Factors*>(others + Config::kStages * 2 * Config::kOther);
        auto* barriers = reinterpret_cast<ptx::Mbarrier*>(factors + Config::kStages * Config::kOthers);
        return {own, own + Config::kOwn, others, factors, barriers, {barriers + 1}};
    }

    DEVICE void initialise() const {
        tile::initialise_barriers([&] {
            ptx::mbarrier_init(own_full, 1);
            stages.initialise(kReaders);
        });
    }

    DEVICE Element* other_first(int stage) const { return others + stage * 2 * Config::kOther; }
    DEVICE Element* other_second(int stage) const { return other_first(stage) + Config::kOther; }
    DEVICE Factors* factors_of(int stage) const { return factors + stage * Config::kOthers; }
};

// Where a block's tiles come from: own rows of one head, and tiles of each of `heads` heads of the other side.
struct BackwardCopies {
    const ptx::TensorMap &own_first, &own_second, &other_first, &other_second;
    // Of the other side's rows; null if they are not wanted.
    const ptx::TensorMap* factors;
    RowBlock own;
    int other_head, heads;
    OtherTiles tiles;
};

// By one thread.
template <class Config>
DEVICE void copy_tiles(const BackwardShared<Config>& shared, const BackwardCopies& copies) {
    using Element = typename Config::Element;
    const RowBlock& own = copies.own;
    ptx::mbarrier_arrive_expect_tx(shared.own_full, 2 * sizeof(Element) * Config::kOwn);
    auto copy_own = [&](Element* into, const ptx::TensorMap& map) {
        tile::load_panels(tile::SwizzledTile<Element>{into, Config::kRows}, Config::kPanels, map, own.first, own.head,
                          own.batch, shared.own_full);
    };
    copy_own(shared.own_first, copies.own_first);
    copy_own(shared.own_second, copies.own_second);
    int bytes = 2 * sizeof(Element) * Config::kOther;
    if (copies.factors != nullptr) bytes += Config::kOthers * sizeof(RowFactors<float>);
    typename Config::Turn turn;
    for (int head = copies.other_head; head < copies.other_head + copies.heads; ++head) {
        for (int tile = copies.tiles.first; tile < copies.tiles.end; ++tile, turn.advance()) {
            auto* full = shared.stages.fill(turn, bytes);
            int row = tile * Config::kOthers;
            auto copy = [&](Element* into, const ptx::TensorMap& map) {
                tile::load_panels(tile::SwizzledTile<Element>{into, Config::kOthers}, Config::kPanels, map, row, head,
                                  own.batch, full);
            };
            copy(shared.other_first(turn.stage), copies.other_first);
            copy(shared.other_second(turn.stage), copies.other_second);
            if (copies.factors == nullptr) continue;
            ptx::tensor_load(shared.factors_of(turn.stage), *copies.factors, full, {0, row, head, own.batch});
        }
    }
}

// Takes the place of the bounds of tiles that all rows see.
struct AllVisible {};

// What a warpgroup has of its own on its way through the tiles.
template <class Config>
struct BackwardRows {
    using Element = typename Config::Element;
    using Problem = typename Config::Problem;
    template <int Rows>
    using Columns = tile::AlongColumns<Element, Rows>;
    using OtherRows = tile::AlongRows<Element, Config::kOthers>;

    const Problem& params;
    const BackwardShared<Config>& shared;
    // The warpgroup's first row in the block.
    int row;
    float factor;
    typename Config::Weight weight;
    typename Config::Turn turn;
    typename Config::Scores scores, d_weights;

    DEVICE BackwardRows(const Problem& params, const BackwardShared<Config>& shared, int row)
        : params(params), shared(shared), row(row), factor(float(params.scale) * float(Config::Weight::kUnit)),
          weight(params) {}

    // step(bounds(tile)) for the tiles in order; where all rows see all of a tile it has no bounds.
    template <class Step, class BoundsOf>
    DEVICE static void each_tile(const OtherTiles& tiles, Range whole, Step step, BoundsOf bounds) {
        int tile = tiles.first;
#pragma unroll 1
        for (; tile < whole.low; ++tile) step(bounds(tile));
#pragma unroll 1
        for (; tile < whole.high; ++tile) step(AllVisible{});
#pragma unroll 1
        for (; tile < tiles.end; ++tile) step(bounds(tile));
    }

    DEVICE void multiply_scores() {
        shared.stages.wait(turn);
        Columns<Config::kRows> own(shared.own_first, row);
        Columns<Config::kOthers> other(shared.other_first(turn.stage));
        tile::multiply_beside<Config::kWidth>(scores, own, other, false);
    }

    // Scores, of which the caller awaits all but the last group of products, and gradients of the weights.
    DEVICE void multiply() {
        multiply_scores();
        Columns<Config::kRows> own(shared.own_second, row);
        Columns<Config::kOthers> other(shared.other_second(turn.stage));
        tile::multiply_beside<Config::kWidth>(d_weights, own, other, false);
    }

    template <class Place>
    DEVICE Bounds<1> bounds(const Place& place) const {
        return Bounds<1>::of(place, row + tile::first_row_of_warp(), Config::kOthers, false);
    }

    // Zeros for the pairs that are hidden.
    DEVICE static void hide(typename Config::Scores& of, const Bounds<1>& visible) {
        of.each_indexed([&](int m, int i, int, int column, float& x) {
            if (!visible.contains(m, i, column)) x = 0;
        });
    }

    DEVICE static void hide(typename Config::Scores&, AllVisible) {}

    // Rows of a gradient [B, H, N, width] of one of its heads, times `scale`.
    DEVICE void store(typename Config::SumsTile& sums, Element* gradient, int64_t head, int64_t count, int width,
                      int block_first, float scale) const {
        sums.each([scale](int, int, float& x) { x *= scale; });
        tile::Rows<Element> rows{gradient + head * count * width, width, count, width};
        tile::store(sums, rows, block_first + row + tile::first_row_of_warp(), 0);
    }

    DEVICE OtherRows first_rows() const { return OtherRows(shared.other_first(turn.stage)); }
    DEVICE OtherRows second_rows() const { return OtherRows(shared.other_second(turn.stage)); }
};

using ptx::bf16;
using ptx::f16;

}  // namespace attn::quadratic
