// What the kernels of the backward pass on warpgroups share: a block's own 128 rows, 64 for each of two warpgroups, against
// tiles of the other side's rows that a third one copies, with the products
//
//     scores    = own first · (other first)ᵀ        over D
//     d_weights = own second · (other second)ᵀ      over E
//
// for softmax of plain scores. The sides are those of sides.cuh.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/pipeline.cuh"
#include "../tile/warpgroup.cuh"
#include "logits.cuh"
#include "params.sm90.cuh"
#include "weight.cuh"

namespace attn::quadratic {

constexpr int kReaders = 2;
constexpr int kWarpgroupThreads = 128 * (1 + kReaders);
constexpr int kStages = 2;

template <class E, int Width, int Others>
struct BackwardConfig {
    using Element = E;
    using Params = QuadraticMappedParams<E>;
    static constexpr int kRows = 64 * kReaders;
    static constexpr int kWidth = Width;
    static constexpr int kOthers = Others;
    static constexpr int kPanels = Width / tile::kPanelColumns;
    // Elements of tiles.
    static constexpr int kOwn = kRows * Width, kOther = Others * Width;
    using Scores = tile::WarpgroupSums<Others>;
    using SumsTile = tile::WarpgroupSums<Width>;
    using Packed = tile::PackedRows<E, Others>;
};

// Shared memory: the own side's two matrices; for each stage the other side's two; mbarriers; where they are wanted, for
// each stage RowFactors of the other side's rows.
template <class Config>
struct BackwardShared {
    using Element = typename Config::Element;
    using Factors = RowFactors<float>;
    Element *own_first, *own_second, *others;
    Factors* factors;
    ptx::Mbarrier* own_full;
    tile::Pipeline<kStages> stages;

    DEVICE static BackwardShared of_block() {
        Element* own = ptx::shared_memory<Element>();
        Element* others = own + 2 * Config::kOwn;
        auto* barriers = reinterpret_cast<ptx::Mbarrier*>(others + 2 * kStages * Config::kOther);
        // 128 bytes on, as copies need them.
        auto* factors = reinterpret_cast<Factors*>(barriers + 16);
        return {own, own + Config::kOwn, others, factors, barriers, {barriers + 1}};
    }

    DEVICE void initialise() const {
        if (ptx::thread() == 0) {
            ptx::mbarrier_init(own_full, 1);
            stages.initialise(kReaders);
            ptx::fence_mbarrier_init();
        }
        ptx::barrier_sync();
    }

    DEVICE Element* other_first(int stage) const { return others + 2 * stage * Config::kOther; }
    DEVICE Element* other_second(int stage) const { return others + (2 * stage + 1) * Config::kOther; }
    DEVICE Factors* factors_of(int stage) const { return factors + stage * Config::kOthers; }
};

// Where the tiles of a block come from.
struct BackwardSides {
    const ptx::TensorMap &own_first, &own_second, &other_first, &other_second;
    // Of the other side's rows; null if they are not wanted.
    const ptx::TensorMap* factors;
    int batch, own_row, own_head;
    // The other side's heads.
    int first_head, heads;
};

// By one thread.
template <class Config>
DEVICE void load_sides(const BackwardShared<Config>& shared, const BackwardSides& sides, const OtherTiles& tiles) {
    using Tile = tile::SwizzledTile<typename Config::Element>;
    constexpr int kElement = sizeof(typename Config::Element);
    ptx::mbarrier_arrive_expect_tx(shared.own_full, 2 * Config::kOwn * kElement);
    tile::load_panels(Tile{shared.own_first, Config::kRows}, Config::kPanels, sides.own_first, sides.own_row,
                      sides.own_head, sides.batch, shared.own_full);
    tile::load_panels(Tile{shared.own_second, Config::kRows}, Config::kPanels, sides.own_second, sides.own_row,
                      sides.own_head, sides.batch, shared.own_full);
    int bytes = 2 * Config::kOther * kElement;
    if (sides.factors != nullptr) bytes += Config::kOthers * int(sizeof(RowFactors<float>));
    tile::Turn<kStages> turn;
    for (int head = sides.first_head; head < sides.first_head + sides.heads; ++head) {
        for (int tile = tiles.first; tile < tiles.end; ++tile, turn.advance()) {
            int row = tile * Config::kOthers;
            auto* full = shared.stages.fill(turn, bytes);
            tile::load_panels(Tile{shared.other_first(turn.stage), Config::kOthers}, Config::kPanels,
                              sides.other_first, row, head, sides.batch, full);
            tile::load_panels(Tile{shared.other_second(turn.stage), Config::kOthers}, Config::kPanels,
                              sides.other_second, row, head, sides.batch, full);
            if (sides.factors == nullptr) continue;
            ptx::tensor_load(shared.factors_of(turn.stage), *sides.factors, full, {0, row, head, sides.batch});
        }
    }
}

// Turns products into weights and gradients of products up to the scale. values(m, i, column): statistic and δ.
template <class Config, class Place, class Values>
DEVICE void weigh(typename Config::Scores& scores, typename Config::Scores& d_weights, float factor, const Place& place,
                  int row, bool whole, Values values) {
    Softmax weight(place.params);
    scores.with_indexed(d_weights, [&](int m, int i, int, int column, float& x, float& d) {
        auto [statistic, delta] = values(m, i, column);
        auto result = weight.gradient(x, factor, d, statistic, delta);
        x = result.weight, d = result.d_score;
    });
    if (whole) return;
    auto bounds = Bounds<1>::of(place, row, Config::kOthers, false);
    scores.with_indexed(d_weights, [&](int m, int i, int, int column, float& x, float& d) {
        bool is_visible = bounds.contains(m, i, column);
        x = is_visible ? x : 0.0f, d = is_visible ? d : 0.0f;
    });
}

// f(tile, stage, scores, d_weights) for each tile of each of the other side's heads; f waits for its products.
template <class Config, class F>
DEVICE void walk_sides(const BackwardShared<Config>& shared, int row, int heads, const OtherTiles& tiles, F f) {
    using Element = typename Config::Element;
    using Own = tile::AlongColumns<Element, Config::kRows>;
    using Other = tile::AlongColumns<Element, Config::kOthers>;
    tile::wait_for_phase(shared.own_full, 0);
    tile::Turn<kStages> turn;
    typename Config::Scores scores, d_weights;
#pragma unroll 1
    for (int head = 0; head < heads; ++head) {
#pragma unroll 1
        for (int tile = tiles.first; tile < tiles.end; ++tile) {
            shared.stages.wait(turn);
            tile::multiply_beside<Config::kWidth>(scores, Own(shared.own_first, row),
                                                  Other(shared.other_first(turn.stage)), false);
            tile::multiply_beside<Config::kWidth>(d_weights, Own(shared.own_second, row),
                                                  Other(shared.other_second(turn.stage)), false);
            tile::wait_products<0>(scores, d_weights);
            f(tile, turn.stage, scores, d_weights);
            shared.stages.release(turn);
            turn.advance();
        }
    }
}

// Rows of a gradient [B, H, N, width], from the warp's first on, times `factor`.
template <class Config>
DEVICE void store_gradient(typename Config::SumsTile& sums, typename Config::Element* gradient, int64_t head,
                           int64_t count, int width, int first, float factor) {
    sums.each([factor](int, int, float& x) { x *= factor; });
    tile::Rows<typename Config::Element> rows{gradient + head * count * width, width, count, width};
    tile::store(sums, rows, first + tile::first_row_of_warp(), 0);
}

using ptx::bf16;
using ptx::f16;

}  // namespace attn::quadratic
