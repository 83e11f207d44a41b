// What the kernels of the backward pass share: a block's own rows against tiles of the other side's rows, each tile in
// steps over panels of columns, with the products
//
//     scores    += own first · (other first)ᵀ        over D
//     d_weights += own second · (other second)ᵀ      over E
//
// The panels that a block's results are columns of come last, so that they are at hand when the scores are complete. But
// scores add panels up in the order of the forward pass, first to last: what divides a row of weights is a sum of the very
// same ones. So a panel of the first side that is not its last comes once more.
#pragma once

#include "../tile/shared.cuh"
#include "logits.cuh"
#include "ring.cuh"
#include "sides.cuh"
#include "weight.cuh"

namespace attn::quadratic {

// Which panels of D and of E a step is about; one at or past the end: none.
struct PanelOrder {
    int first_panels, second_panels;
    // The panel that comes last.
    int own;
    // Whether the gradients of the weights are wanted. If not, the second side's own panel is all that is loaded of it.
    bool has_d_weights;

    // With a step of its own for a panel that comes once more, if there is none beside the last ones of the second side.
    DEVICE int count() const {
        int most = has_d_weights ? ptx::max(first_panels, second_panels) : first_panels;
        return most + (most == first_panels && own + 1 < first_panels);
    }
    DEVICE bool is_last(int step) const { return step == count() - 1; }
    // Whether the step's panel of the first side enters the scores.
    DEVICE bool scores(int step) const { return step < first_panels; }
    DEVICE int first(int step) const { return scores(step) ? step : is_last(step) ? own : first_panels; }
    DEVICE int second(int step) const {
        return has_d_weights ? (own + 1 + step) % count() : is_last(step) ? own : second_panels;
    }
};

// Shared memory: the own side's two matrices if resident; stages of a panel of each of the other side's, and of the
// own side's if those are not resident; for each stage two numbers per row of the other side.
template <class Config, class Own, class Other>
struct BackwardLoad {
    using Math = typename Config::Math;
    using Real = typename Config::Real;
    using Number = typename Tiles<Math>::Number;
    using Tile = typename Math::Tile;

    static constexpr int kOther = Tiles<Math>::size(Config::kOthers, Config::kColumns);
    static constexpr int kOwn = Tiles<Math>::size(Config::kRows, Config::kColumns);

    const typename Config::Params& params;
    Own own;
    Other other;
    PanelOrder order;
    int first_row;
    OtherTiles tiles;
    int heads;
    Tile resident_first, resident_second;
    Number* stages;
    Real* values;
    // The step that is loaded next.
    int tile, step = 0;

    DEVICE BackwardLoad(const typename Config::Params& params, const Own& own, const Other& other,
                        const PanelOrder& order, int first_row, const OtherTiles& tiles, int heads,
                        tile::SharedPieces& pieces)
        : params(params), own(own), other(other), order(order), first_row(first_row), tiles(tiles), heads(heads),
          tile(tiles.first) {
        int stage_size = 2 * kOther + (params.is_resident ? 0 : 2 * kOwn);
        int d = params.width, e = params.value_width;
        if (params.is_resident) {
            Number* first = pieces.take<Number>(Tiles<Math>::size(Config::kRows, d));
            Number* second = pieces.take<Number>(Tiles<Math>::size(Config::kRows, e));
            resident_first = Tiles<Math>::tile(first, Config::kRows, d);
            resident_second = Tiles<Math>::tile(second, Config::kRows, e);
            if (tiles.first < tiles.end) {
                own.load_first(resident_first, first_row, Config::kRows, 0, Config::whole_inner(d));
                own.load_second(resident_second, first_row, Config::kRows, 0, Config::whole_inner(e));
            }
        }
        stages = pieces.take<Number>(params.stages * stage_size);
        values = pieces.take<Real>(params.stages * 2 * Config::kOthers);
        if (tiles.first == tiles.end) this->heads = 0;
    }

    DEVICE Number* stage(int index) const {
        return stages + index * (2 * kOther + (params.is_resident ? 0 : 2 * kOwn));
    }
    DEVICE Tile other_first(int index) const {
        return Tiles<Math>::tile(stage(index), Config::kOthers, Config::kColumns);
    }
    DEVICE Tile other_second(int index) const {
        return Tiles<Math>::tile(stage(index) + kOther, Config::kOthers, Config::kColumns);
    }
    DEVICE Tile own_first(int index, int panel) const {
        if (params.is_resident) return Tiles<Math>::panel(resident_first, panel * Config::kColumns);
        return Tiles<Math>::tile(stage(index) + 2 * kOther, Config::kRows, Config::kColumns);
    }
    DEVICE Tile own_second(int index, int panel) const {
        if (params.is_resident) return Tiles<Math>::panel(resident_second, panel * Config::kColumns);
        return Tiles<Math>::tile(stage(index) + 2 * kOther + kOwn, Config::kRows, Config::kColumns);
    }
    DEVICE const Real* values_of(int index) const { return values + index * 2 * Config::kOthers; }

    DEVICE void operator()(int index) {
        if (heads == 0) return;
        int row = tile * Config::kOthers;
        int first = order.first(step), second = order.second(step);
        if (first < order.first_panels) {
            int column = first * Config::kColumns, inner = Config::inner(params.width, first);
            // As a right operand the last panel is used whole.
            int columns = first == order.own ? Config::kColumns : inner;
            other.load_first(other_first(index), row, Config::kOthers, column, columns);
            if (!params.is_resident && order.scores(step)) {
                own.load_first(own_first(index, 0), first_row, Config::kRows, column, inner);
            }
        }
        if (second < order.second_panels) {
            int column = second * Config::kColumns, inner = Config::inner(params.value_width, second);
            int columns = second == order.own ? Config::kColumns : inner;
            other.load_second(other_second(index), row, Config::kOthers, column, columns);
            if (!params.is_resident) own.load_second(own_second(index, 0), first_row, Config::kRows, column, inner);
        }
        if (++step < order.count()) return;
        other.load_values(values + index * 2 * Config::kOthers, row, Config::kOthers);
        step = 0;
        if (++tile < tiles.end) return;
        tile = tiles.first, ++other.head, --heads;
    }
};

// f(head, first row of the other side, scores, d_weights, stage) for each tile of each of `load.heads` heads.
template <class Config, class Load, class F>
DEVICE void walk_tiles(Load& load, F f) {
    using Math = typename Config::Math;
    const auto& params = load.params;
    const PanelOrder order = load.order;
    int heads = load.heads, tile = load.tiles.first, head = load.other.head;
    int row = Config::kRowsOfWarp * ptx::warp(), step = 0;
    auto scores = Config::Scores::zero(), d_weights = Config::Scores::zero();
    Ring<Load> ring(params.stages, load);
    while (heads > 0) {
        int stage = ring.next();
        int second = order.second(step);
        if (order.scores(step)) {
            add_scores<Config>(scores, Tiles<Math>::left(load.own_first(stage, step), row), load.other_first(stage),
                               params.width, step);
        }
        if (second < order.second_panels && order.has_d_weights) {
            tile::multiply<Math>(d_weights, Tiles<Math>::left(load.own_second(stage, second), row),
                                 typename Math::RightTransposed{load.other_second(stage)},
                                 Config::inner(params.value_width, second));
        }
        if (++step < order.count()) continue;
        f(head, tile * Config::kOthers, scores, d_weights, stage);
        scores = d_weights = Config::Scores::zero();
        step = 0;
        if (++tile == load.tiles.end) tile = load.tiles.first, ++head, --heads;
    }
}

using ptx::bf16;
using ptx::f16;

// Instances: fewer rows of the other side where there are more columns of sums.
template <class Element, int Columns>
using Fast = Config<Element, tile::Native<Element>, 1, Columns == 64 ? 64 : 32, Columns>;
template <class Element>
using Tf32 = Config<Element, tile::Wide<float, 1>, 1, 32, 64>;
using F32 = Config<float, tile::Wide<float, 3>, 1, 32, 64>;
using F64 = Config<double, tile::Wide<double, 1>, 1, 16, 32>;

}  // namespace attn::quadratic
