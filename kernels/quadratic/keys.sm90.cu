// Gradients of k and v, as keys.cu for softmax of plain scores, on warpgroups.
//
// Block x: 128 keys of one key head and batch entry, 64 for each of two warpgroups; a third one copies. It walks the query
// heads of the group and, for each, the tiles of queries that see its keys. Scores are transposed, so that weights and
// their gradients are left operands as they lie in registers. Shared memory: backward.sm90.cuh.

#include "backward.sm90.cuh"

namespace attn::quadratic {

template <class Config>
DEVICE void add_gradients(const typename Config::Params& params, const BackwardShared<Config>& shared,
                          const RowBlock& block, const OtherTiles& tiles) {
    using Problem = QuadraticParams<typename Config::Element>;
    using Other = tile::AlongRows<typename Config::Element, Config::kOthers>;
    const Problem& problem = params.problem;
    int row = 64 * (ptx::warpgroup() - 1), first = block.first + row;
    int last = ptx::min(first + 64, int(problem.keys)) - 1;
    Range whole{0, 0};
    if (last >= first) {
        whole = tiles.whole(problem.seeing_queries(first), problem.seeing_queries(last), Config::kOthers);
    }
    float factor = float(problem.scale) * float(Softmax::kUnit);
    auto d_k = Config::SumsTile::zero(), d_v = Config::SumsTile::zero();
    auto add = [&](int tile, int stage, auto& scores, auto& d_weights) {
        KeysByQueries<Problem> place{problem, tile * Config::kOthers, block.first};
        const RowFactors<float>* factors = shared.factors_of(stage);
        auto of_column = [factors](int, int, int c) { return RowPair<float>{factors[c].statistic, factors[c].delta}; };
        weigh<Config>(scores, d_weights, factor, place, row + tile::first_row_of_warp(),
                      tile >= whole.low && tile < whole.high, of_column);
        typename Config::Packed weights, d_scores;
        weights.set(scores);
        tile::multiply_beside(d_v, weights, Other(shared.other_second(stage)), true);
        d_scores.set(d_weights);
        tile::multiply_beside(d_k, d_scores, Other(shared.other_first(stage)), true);
        tile::wait_products<0>(d_v, d_k);
    };
    if (tiles.first < tiles.end) walk_sides<Config>(shared, row, problem.group(), tiles, add);
    int64_t head = int64_t(block.batch) * problem.key_heads + block.head;
    store_gradient<Config>(d_v, problem.d_v, head, problem.keys, problem.value_width, first, 1.0f);
    store_gradient<Config>(d_k, problem.d_k, head, problem.keys, problem.width, first, float(problem.scale));
}

template <class Config>
DEVICE void keys(const typename Config::Params& params) {
    const auto& problem = params.problem;
    auto shared = BackwardShared<Config>::of_block();
    shared.initialise();
    auto block = RowBlock::of(ptx::block_x(), problem.key_heads, problem.keys, Config::kRows);
    auto tiles = OtherTiles::of_keys(problem, block.first, Config::kRows, Config::kOthers);
    if (ptx::warpgroup() == 0) {
        ptx::setmaxnreg_dec<24>();
        BackwardSides sides{params.k_map, params.v_map, params.q_map, params.d_out_map, &params.factors_map,
                            block.batch, block.first, block.head, block.head * problem.group(), problem.group()};
        if (tiles.first < tiles.end && ptx::warp() == 0 && ptx::elect()) load_sides(shared, sides, tiles);
    } else {
        ptx::setmaxnreg_inc<240>();
        add_gradients<Config>(params, shared, block, tiles);
    }
}

template <class E>
using Width64 = BackwardConfig<E, 64, 64>;
template <class E>
using Width128 = BackwardConfig<E, 128, 64>;

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_keys_sm90_bf16_64_64, keys<Width64<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_bf16_128_64, keys<Width128<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_f16_64_64, keys<Width64<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_f16_128_64, keys<Width128<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
