// The gradient of q, as queries.cu for softmax of plain scores, on warpgroups.
//
// Block x: 128 queries of one head and batch entry, 64 for each of two warpgroups; a third one copies the tiles of keys and
// values that they see. Shared memory: backward.sm90.cuh.

#include "backward.sm90.cuh"

namespace attn::quadratic {

template <class Config>
DEVICE void add_gradient(const typename Config::Params& params, const BackwardShared<Config>& shared,
                         const RowBlock& block, const OtherTiles& tiles) {
    using Problem = QuadraticParams<typename Config::Element>;
    using Other = tile::AlongRows<typename Config::Element, Config::kOthers>;
    const Problem& problem = params.problem;
    int row = 64 * (ptx::warpgroup() - 1), first = block.first + row;
    int last = ptx::min(first + 64, int(problem.queries)) - 1;
    Range whole{0, 0};
    if (last >= first) {
        whole = tiles.whole(problem.visible_keys(first), problem.visible_keys(last), Config::kOthers);
    }
    // Rows past the end have no weights.
    auto statistic = tile::RowValues<float, 1>::filled(infinity<float>());
    auto delta = tile::RowValues<float, 1>::filled(0.0f);
    const RowFactors<float>* factors = problem.factors + problem.row(block.batch, block.head, 0);
    int first_of_warp = first + tile::first_row_of_warp();
    statistic.each([&](int r, float& x) {
        if (first_of_warp + r < problem.queries) x = factors[first_of_warp + r].statistic;
    });
    delta.each([&](int r, float& x) {
        if (first_of_warp + r < problem.queries) x = factors[first_of_warp + r].delta;
    });
    float factor = float(problem.scale) * float(Softmax::kUnit);
    auto d_q = Config::SumsTile::zero();
    auto add = [&](int tile, int stage, auto& scores, auto& d_weights) {
        QueriesByKeys<Problem> place{problem, block.first, tile * Config::kOthers};
        auto of_row = [&](int m, int i, int) { return RowPair<float>{statistic.at(m, i), delta.at(m, i)}; };
        weigh<Config>(scores, d_weights, factor, place, row + tile::first_row_of_warp(),
                      tile >= whole.low && tile < whole.high, of_row);
        typename Config::Packed d_scores;
        d_scores.set(d_weights);
        tile::multiply_beside(d_q, d_scores, Other(shared.other_first(stage)), true);
        tile::wait_products<0>(d_q);
    };
    if (tiles.first < tiles.end) walk_sides<Config>(shared, row, 1, tiles, add);
    int64_t head = int64_t(block.batch) * problem.heads + block.head;
    store_gradient<Config>(d_q, problem.d_q, head, problem.queries, problem.width, first, float(problem.scale));
}

template <class Config>
DEVICE void queries(const typename Config::Params& params) {
    const auto& problem = params.problem;
    auto shared = BackwardShared<Config>::of_block();
    shared.initialise();
    auto block = RowBlock::of(ptx::block_x(), problem.heads, problem.queries, Config::kRows);
    auto tiles = OtherTiles::of_queries(problem, block.first, Config::kRows, Config::kOthers);
    if (ptx::warpgroup() == 0) {
        ptx::setmaxnreg_dec<24>();
        BackwardSides sides{params.q_map, params.d_out_map, params.k_map, params.v_map, nullptr,
                            block.batch, block.first, block.head, block.head / problem.group(), 1};
        if (tiles.first < tiles.end && ptx::warp() == 0 && ptx::elect()) load_sides(shared, sides, tiles);
    } else {
        ptx::setmaxnreg_inc<240>();
        add_gradient<Config>(params, shared, block, tiles);
    }
}

template <class E>
using Width64 = BackwardConfig<E, 64, 128>;
template <class E>
using Width128 = BackwardConfig<E, 128, 96>;

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_queries_sm90_bf16_64_128, queries<Width64<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_bf16_128_96, queries<Width128<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_f16_64_128, queries<Width64<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_f16_128_96, queries<Width128<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
