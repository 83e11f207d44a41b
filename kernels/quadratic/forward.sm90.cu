// o_i = finish_i(Σ_j weight(s_ij) v_j), as forward.cu for plain scores (no key mask, bias or soft-cap), on warpgroups.
//
// As many blocks as multiprocessors, each for several blocks of 128 rows of one head and batch entry. Warpgroup 0 copies; 1
// and 2 own 64 rows each and walk the same key tiles, the last first. While a tile's scores turn into weights, the product
// of the weights before with their values is under way, and then the other warpgroup's products are. The next rows' first
// tiles are copied while these are finished.

#include "forward.sm90.cuh"

namespace attn::quadratic {

// Rows of a warpgroup on their way through the keys.
template <class Config>
struct ForwardRows {
    using Problem = QuadraticParams<typename Config::Element>;
    using Element = typename Config::Element;
    const Problem& params;
    const ForwardShared<Config>& shared;
    // The warpgroup's first row in a block, the block's first among the queries.
    int row, block_first = 0;
    float factor;
    typename Config::Weight weight;
    tile::Turn<1> q_turn;
    tile::Turn<kStages> k_turn, v_turn;
    tile::RowValues<float, 1> maximum, sum;
    typename Config::SumsTile sums;
    typename Config::Scores scores;
    typename Config::Weights weights;

    DEVICE ForwardRows(const Problem& params, const ForwardShared<Config>& shared, int row)
        : params(params), shared(shared), row(row), factor(float(params.scale) * float(Config::Weight::kUnit)),
          weight(params) {}

    DEVICE void begin(const RowBlock& block) {
        block_first = block.first;
        maximum = tile::RowValues<float, 1>::filled(Config::Weight::template initial_maximum<float>());
        sum = tile::RowValues<float, 1>::filled(0.0f);
        sums = Config::SumsTile::zero();
    }

    // Turns at products: barrier 1 + i lets warpgroup i of the two go on, when the other one's are under way.
    DEVICE void wait_for_turn() const {
        if constexpr (Config::kTakesTurns) ptx::barrier_sync(1 + row / 64, 256);
    }

    DEVICE void pass_turn() const {
        if constexpr (Config::kTakesTurns) ptx::barrier_arrive(2 - row / 64, 256);
    }

    // Before all blocks of rows, and after them: the first warpgroup has the first turn, and takes the last one back.
    DEVICE void open_turns() const {
        if (row > 0) pass_turn();
    }

    DEVICE void close_turns() const {
        if (row == 0) wait_for_turn();
    }

    // Tiles that all of the warpgroup's rows see whole, those past the last query left out.
    DEVICE Range whole_tiles(const OtherTiles& tiles) const {
        int first = block_first + row, last = ptx::min(first + 64, int(params.queries)) - 1;
        if (last < first) return {tiles.end, tiles.end};
        return tiles.whole(params.visible_keys(first), params.visible_keys(last), Config::kKeys);
    }

    DEVICE void multiply_keys() {
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
            if (!bounds.contains(m, i, column)) x = Config::Weight::kHidden;
        });
    }

    // When the last scores are complete.
    DEVICE void release_queries() {
        shared.q_stage.release(q_turn);
        q_turn.advance();
    }

    // Scores and weights of the first tile.
    DEVICE void start(int tile) {
        shared.q_stage.wait(q_turn);
        shared.k_stages.wait(k_turn);
        multiply_keys();
        tile::wait_products<0>(scores);
        release_keys();
        hide(tile);
        weight.weigh(scores, factor, maximum, sum);
        weights.set(scores);
    }

    // Scores and weights of a tile, beside the values of the one before. `hide` is for what not all rows see.
    template <class Hide>
    DEVICE void step(Hide hide) {
        shared.k_stages.wait(k_turn);
        wait_for_turn();
        multiply_keys();
        multiply_values();
        pass_turn();
        tile::wait_products<1>(scores);
        release_keys();
        hide();
        auto rescale = weight.weigh(scores, factor, maximum, sum);
        tile::compute_before_wait(sum);
        tile::wait_products<0>(sums);
        release_values();
        sums.scale_rows(rescale);
        weights.set(scores);
    }

    // Values of the last tile.
    DEVICE void end() {
        release_queries();
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
        start(tiles.end - 1);
        walk_down(tiles, typename Config::Edges{});
        end();
    }

    // √(Σ x²) of the rows up to their unit, where the finish needs it.
    DEVICE tile::RowValues<float, 1> norms() {
        auto norms = tile::RowValues<float, 1>::filled(0.0f);
        if (!Config::Weight::kHasNorm || params.finish != kRmsNorm) return norms;
        auto scales = sums.fold_rows(norms, [](float a, float b) { return ptx::max(ptx::abs(a), ptx::abs(b)); });
        scales.each([](int, float& x) { x = tile::scale_of_squares(x); });
        auto squared = sums;
        squared.scale_rows(scales);
        squared.each([](int, int, float& x) { x *= x; });
        norms = squared.row_sums(norms);
        norms.with(scales, [](float& x, float scale) { x = tile::norm_of(x, scale); });
        return norms;
    }

    // What combine.cu needs of the rows.
    DEVICE void store_parts(const RowBlock& block, const HeadColumns<Config>& place) {
        int first = block_first + row + tile::first_row_of_warp(), width = params.value_width;
        int64_t head = params.row(block.batch, place.head, 0) + ptx::block_z() * params.row(params.batch, 0, 0);
        auto units = maximum;
        units.each([this](int, float& x) { x = weight.unit(x); });
        if constexpr (Config::Weight::kScales) sums.scale_rows(units);
        tile::store(sums, tile::Rows<float>{params.partial_sums + head * width, width, params.queries, width}, first,
                    place.column);
        if (place.column > 0) return;
        float* parts = params.partial_weights + 2 * (head + first);
        auto all = sum.fold_lanes([](float a, float b) { return a + b; });
        all.with(units, [](float& x, float unit) { x *= unit; });
        all.each_once([&](int r, float x) {
            if (first + r < params.queries) parts[2 * r + 1] = x;
        });
        maximum.each_once([&](int r, float x) {
            if (first + r < params.queries) parts[2 * r] = Config::Weight::kScales ? 0.0f : x;
        });
    }

    // Finishes the rows and writes them.
    DEVICE void store(const RowBlock& block) {
        auto place = HeadColumns<Config>::of(params, block);
        if (params.has_partial_sums) return store_parts(block, place);
        int first = block_first + row + tile::first_row_of_warp();
        auto factors = sum.fold_lanes([](float a, float b) { return a + b; }), statistics = factors, norm = norms();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float unit = weight.unit(maximum.value[0][half]);
            auto finish = Finish<float>::of(params, block.batch, maximum.value[0][half], factors.value[0][half] * unit,
                                            norm.value[0][half] * unit);
            factors.value[0][half] = finish.factor * unit, statistics.value[0][half] = finish.statistic;
        }
        sums.scale_rows(factors);
        auto out = tile::rows_of_head(static_cast<Element*>(params.out), params.out_strides, block.batch, place.head,
                                      params.queries, params.value_width);
        tile::store_vectors(sums, out, first, place.column);
        if (params.statistic == nullptr || place.column > 0) return;
        statistics.each_once([&](int r, float statistic) {
            if (first + r < params.queries) *params.statistic_of(block.batch, place.head, first + r) = statistic;
        });
    }
};

template <class Config>
DEVICE void forward(const typename Config::Params& params) {
    const auto& problem = params.problem;
    auto shared = ForwardShared<Config>::of_block();
    shared.initialise();
    int64_t heads = problem.heads * Config::value_tiles(problem);
    SectionWalk walk(Sections::of(problem.batch, heads, problem.queries, Config::kRows, params.section));
    if (ptx::warpgroup() == 0) {
        ptx::setmaxnreg_dec<24>();
        if (ptx::warp() != 0 || !ptx::elect()) return;
        ForwardCopies<Config> copies{params, shared, {}, {}, {}};
        walk.each([&](const RowBlock& block) { copies.load(block); });
    } else {
        ptx::setmaxnreg_inc<240>();
        ForwardRows<Config> rows(problem, shared, 64 * (ptx::warpgroup() - 1));
        rows.open_turns();
        walk.each([&](const RowBlock& block) {
            auto tiles = tiles_of<Config>(params, block);
            rows.begin(block);
            if (tiles.first < tiles.end) rows.walk(tiles);
            rows.store(block);
        });
        rows.close_turns();
    }
}

using ptx::bf16;
using ptx::f16;

template <class E, class Tile, class Edges>
using OfSoftmax = ForwardConfig<E, SoftmaxOfRows, Tile, Edges>;
template <class E>
using Width64 = OfSoftmax<E, ForwardTile<64, 64, 128>, EdgesAnywhere>;
template <class E>
using Width128 = OfSoftmax<E, ForwardTile<128, 128, 128>, EdgesAnywhere>;
// Larger tiles: there is no diagonal to waste them on.
template <class E>
using Width128Full = OfSoftmax<E, ForwardTile<128, 128, 176>, EdgeAtEnd>;
template <class E>
using Width256 = OfSoftmax<E, ForwardTile<256, 256, 80>, EdgesAnywhere>;
template <class E>
using Rectified = ForwardConfig<E, ReluOfRows<E>, ForwardTile<128, 256, 80>, EdgesAnywhere>;

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_forward_sm90_bf16_64_128, forward<Width64<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_bf16_128_128, forward<Width128<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_bf16_128_176, forward<Width128Full<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_bf16_256_80, forward<Width256<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_relu_bf16_128_80, forward<Rectified<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_f16_64_128, forward<Width64<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_f16_128_128, forward<Width128<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_f16_128_176, forward<Width128Full<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_f16_256_80, forward<Width256<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_forward_sm90_relu_f16_128_80, forward<Rectified<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
