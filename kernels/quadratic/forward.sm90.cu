// o_i = Σ_j softmax_j(s_ij) v_j, as forward.cu for plain scores (no key mask, bias or soft-cap), on warpgroups.
//
// Block x: 128 rows of one head and batch entry, the last of the head first. Warpgroup 0 copies; 1 and 2 own 64 rows each
// and walk the same key tiles, the last first. While a tile's scores turn into weights, the product of the weights before
// with their values is under way.
//
//     shared memory      size                      filled by copies, and released
//     q                  kRows × kWidth            once
//     k                  2 stages kKeys × kWidth   a tile ahead; after its scores
//     v                  2 stages kKeys × kWidth   a step behind k; after its product
//     mbarriers          q, and full and empty for each stage
//
// Columns past the widths are zeros that the copy engine fills in; so are rows past the end.

#include "../ptx/barrier.cuh"
#include "../tile/pipeline.cuh"
#include "../tile/warpgroup.cuh"
#include "logits.cuh"
#include "params.sm90.cuh"
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
    Element *q, *k, *v;
    ptx::Mbarrier* q_full;
    Stages k_stages, v_stages;

    DEVICE static ForwardShared of_block() {
        Element* q = ptx::shared_memory<Element>();
        Element* k = q + Config::kOwn;
        Element* v = k + kStages * Config::kOther;
        auto* barriers = reinterpret_cast<ptx::Mbarrier*>(v + kStages * Config::kOther);
        return {q, k, v, barriers, {barriers + 1}, {barriers + 1 + Stages::kBarriers}};
    }

    DEVICE void initialise() const {
        if (ptx::thread() == 0) {
            ptx::mbarrier_init(q_full, 1);
            k_stages.initialise(kReaders);
            v_stages.initialise(kReaders);
            ptx::fence_mbarrier_init();
        }
        ptx::barrier_sync();
    }

    DEVICE Element* k_tile(int stage) const { return k + stage * Config::kOther; }
    DEVICE Element* v_tile(int stage) const { return v + stage * Config::kOther; }
};

// By one thread.
template <class Config>
DEVICE void load_tiles(const typename Config::Params& params, const ForwardShared<Config>& shared,
                       const RowBlock& block, const OtherTiles& tiles) {
    using Tile = tile::SwizzledTile<typename Config::Element>;
    constexpr int kBytes = sizeof(typename Config::Element) * Config::kOther;
    int key_head = block.head / params.problem.group();
    tile::Turn<kStages> k_turn, v_turn;
    auto load_values = [&](int tile) {
        auto* full = shared.v_stages.fill(v_turn, kBytes);
        tile::load_panels(Tile{shared.v_tile(v_turn.stage), Config::kKeys}, Config::kPanels, params.v_map,
                          tile * Config::kKeys, key_head, block.batch, full);
        v_turn.advance();
    };
    ptx::mbarrier_arrive_expect_tx(shared.q_full, sizeof(typename Config::Element) * Config::kOwn);
    tile::load_panels(Tile{shared.q, Config::kRows}, Config::kPanels, params.q_map, block.first, block.head,
                      block.batch, shared.q_full);
    for (int tile = tiles.end - 1; tile >= tiles.first; --tile) {
        auto* full = shared.k_stages.fill(k_turn, kBytes);
        tile::load_panels(Tile{shared.k_tile(k_turn.stage), Config::kKeys}, Config::kPanels, params.k_map,
                          tile * Config::kKeys, key_head, block.batch, full);
        k_turn.advance();
        if (tile + 1 < tiles.end) load_values(tile + 1);
    }
    load_values(tiles.first);
}

// Rows of a warpgroup on their way through the keys.
template <class Config>
struct ForwardRows {
    using Problem = QuadraticParams<typename Config::Element>;
    using Element = typename Config::Element;
    const Problem& params;
    const ForwardShared<Config>& shared;
    // The warpgroup's first row in the block, the block's first among the queries.
    int row, block_first;
    float factor;
    tile::Turn<kStages> k_turn, v_turn;
    tile::RowValues<float, 1> maximum, sum;
    typename Config::SumsTile sums;
    typename Config::Scores scores;
    typename Config::Weights weights;

    DEVICE ForwardRows(const Problem& params, const ForwardShared<Config>& shared, int row, int block_first)
        : params(params), shared(shared), row(row), block_first(block_first),
          factor(float(params.scale) * float(Softmax::kUnit)),
          maximum(tile::RowValues<float, 1>::filled(Softmax::initial_maximum<float>())),
          sum(tile::RowValues<float, 1>::filled(0.0f)), sums(Config::SumsTile::zero()) {}

    // Tiles that all of the warpgroup's rows see whole, those past the last query left out.
    DEVICE Range whole_tiles(const OtherTiles& tiles) const {
        int first = block_first + row, last = ptx::min(first + 64, int(params.queries)) - 1;
        if (last < first) return {tiles.end, tiles.end};
        return tiles.whole(params.visible_keys(first), params.visible_keys(last), Config::kKeys);
    }

    DEVICE void multiply_keys() {
        shared.k_stages.wait(k_turn);
        tile::AlongColumns<Element, Config::kRows> q(shared.q, row);
        tile::AlongColumns<Element, Config::kKeys> k(shared.k_tile(k_turn.stage));
        tile::multiply_beside<Config::kWidth>(scores, q, k, false);
    }

    DEVICE void multiply_values() {
        shared.v_stages.wait(v_turn);
        tile::AlongRows<Element, Config::kKeys> v(shared.v_tile(v_turn.stage));
        tile::multiply_beside(sums, weights, v, true);
    }

    DEVICE void release_keys() {
        shared.k_stages.release(k_turn);
        k_turn.advance();
    }

    DEVICE void release_values() {
        shared.v_stages.release(v_turn);
        v_turn.advance();
    }

    DEVICE void hide(int tile) {
        QueriesByKeys<Problem> place{params, block_first, tile * Config::kKeys};
        auto bounds = Bounds<1>::of(place, row + tile::first_row_of_warp(), Config::kKeys, false);
        scores.each_indexed([&](int m, int i, int, int column, float& x) {
            if (!bounds.contains(m, i, column)) x = -infinity<float>();
        });
    }

    // Scores and weights of the first tile.
    DEVICE void start(int tile) {
        multiply_keys();
        tile::wait_products<0>(scores);
        release_keys();
        hide(tile);
        Softmax(params).weigh(scores, factor, maximum, sum);
        weights.set(scores);
    }

    // Scores and weights of a tile, beside the values of the one before. `hide` is for what not all rows see.
    template <class Hide>
    DEVICE void step(Hide hide) {
        multiply_keys();
        multiply_values();
        tile::wait_products<1>(scores);
        release_keys();
        hide();
        auto rescale = Softmax(params).weigh(scores, factor, maximum, sum);
        tile::wait_products<0>(sums);
        release_values();
        sums.scale_rows(rescale);
        weights.set(scores);
    }

    // Values of the last tile.
    DEVICE void end() {
        multiply_values();
        tile::wait_products<0>(sums);
        release_values();
    }

    // Tiles down to the first; the last is done.
    DEVICE void walk_down(const OtherTiles& tiles, EdgeAtEnd) {
#pragma unroll 1
        for (int tile = tiles.end - 2; tile >= tiles.first; --tile) step([] {});
    }

    DEVICE void walk_down(const OtherTiles& tiles, EdgesAnywhere) {
        Range whole = whole_tiles(tiles);
        int tile = tiles.end - 2;
#pragma unroll 1
        for (; tile >= whole.high && tile >= tiles.first; --tile) step([&] { hide(tile); });
#pragma unroll 1
        for (; tile >= whole.low; --tile) step([] {});
#pragma unroll 1
        for (; tile >= tiles.first; --tile) step([&] { hide(tile); });
    }

    DEVICE void walk(const OtherTiles& tiles) {
        tile::wait_for_phase(shared.q_full, 0);
        start(tiles.end - 1);
        walk_down(tiles, typename Config::Edges{});
        end();
    }

    // Finishes the rows and writes them.
    DEVICE void store(const RowBlock& block) {
        int first = block_first + row + tile::first_row_of_warp();
        auto all = sum.fold_lanes([](float a, float b) { return a + b; });
        auto factors = all, statistics = all;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            auto finish = Finish<float>::of(params, maximum.value[0][half], all.value[0][half], 0.0f);
            factors.value[0][half] = finish.factor, statistics.value[0][half] = finish.statistic;
        }
        sums.scale_rows(factors);
        auto out = tile::rows_of_head(static_cast<Element*>(params.out), params.out_strides, block.batch, block.head,
                                      params.queries, params.value_width);
        tile::store(sums, out, first, 0);
        if (params.statistic == nullptr) return;
        statistics.each_once([&](int r, float statistic) {
            if (first + r < params.queries) *params.statistic_of(block.batch, block.head, first + r) = statistic;
        });
    }
};

template <class Config>
DEVICE void forward(const typename Config::Params& params) {
    const auto& problem = params.problem;
    auto shared = ForwardShared<Config>::of_block();
    shared.initialise();
    auto block = RowBlock::of(ptx::block_x(), problem.heads, problem.queries, Config::kRows);
    auto tiles = OtherTiles::of_queries(problem, block.first, Config::kRows, Config::kKeys);
    bool is_empty = tiles.first >= tiles.end;
    if (ptx::warpgroup() == 0) {
        ptx::setmaxnreg_dec<24>();
        if (!is_empty && ptx::warp() == 0 && ptx::elect()) load_tiles(params, shared, block, tiles);
    } else {
        ptx::setmaxnreg_inc<240>();
        ForwardRows<Config> rows(problem, shared, 64 * (ptx::warpgroup() - 1), block.first);
        if (!is_empty) rows.walk(tiles);
        rows.store(block);
    }
}

using ptx::bf16;
using ptx::f16;

template <class E>
using Width64 = WarpgroupConfig<E, 64, 128, EdgesAnywhere>;
template <class E>
using Width128 = WarpgroupConfig<E, 128, 128, EdgesAnywhere>;
// Larger tiles: there is no diagonal to waste them on.
template <class E>
using Width128Full = WarpgroupConfig<E, 128, 176, EdgeAtEnd>;
template <class E>
using Width256 = WarpgroupConfig<E, 256, 80, EdgesAnywhere>;

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_forward_sm90_bf16_64_128, forward<Width64<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_bf16_128_128, forward<Width128<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_bf16_128_176, forward<Width128Full<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_bf16_256_80, forward<Width256<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_f16_64_128, forward<Width64<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_f16_128_128, forward<Width128<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_f16_128_176, forward<Width128Full<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_f16_256_80, forward<Width256<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
