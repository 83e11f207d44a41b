// Gradients of k and v, as keys.cu for softmax of plain scores (no key mask, bias or soft-cap), on warpgroups.
//
// Block x: 128 keys of one key head and batch entry, the first of the head first. It walks the query heads of the group
// and, for each, the tiles of queries that see its keys. Own side k, v; other side q, d_out. While weights come of a
// tile's scores, the product for their gradients is under way; dv while those become gradients of scores; dk beside the
// next tile's scores.

#include "backward.sm90.cuh"

namespace attn::quadratic {

// Statistics and δ of the queries, by a warp. Rows past the end have no weights.
template <class Config>
DEVICE void load_values(const typename Config::Problem& params, const BackwardShared<Config>& shared,
                        const BackwardCopies& copies) {
    typename Config::Turn turn;
    copies.each_tile([&](int head, int tile) {
        shared.stages.wait_until_free(turn);
        const auto* factors = params.factors + params.row(copies.own.batch, head, 0);
        for (int r = ptx::lane(); r < Config::kOthers; r += 32) {
            int query = tile * Config::kOthers + r;
            bool is_present = query < params.queries;
            shared.statistics(turn.stage)[r] = is_present ? factors[query].statistic : infinity<float>();
            shared.deltas(turn.stage)[r] = is_present ? factors[query].delta : 0.0f;
        }
        ptx::warp_sync();
        if (ptx::lane() == 0) ptx::mbarrier_arrive(shared.stages.full(turn.stage));
        turn.advance();
    });
}

template <class Config>
struct KeyRows : BackwardRows<Config> {
    using Base = BackwardRows<Config>;
    using Problem = typename Config::Problem;
    using Base::params, Base::shared, Base::row, Base::turn, Base::scores, Base::d_weights;
    int block_first;
    typename Config::SumsTile d_k, d_v;
    typename Config::Packed weights, d_scores;

    DEVICE KeyRows(const Problem& params, const BackwardShared<Config>& shared, int row, int block_first)
        : Base(params, shared, row), block_first(block_first), d_k(Config::SumsTile::zero()),
          d_v(Config::SumsTile::zero()) {}

    // The range of tiles of which all of the warpgroup's rows that exist see every query, or what is past the end.
    DEVICE Range whole_tiles(const OtherTiles& tiles) const {
        int first = block_first + row, last = ptx::min(first + 64, int(params.keys)) - 1;
        if (last < first) return {tiles.end, tiles.end};
        int low = params.seeing_queries(last).low, high = params.seeing_queries(first).high;
        int start = ptx::max((low + Config::kOthers - 1) / Config::kOthers, tiles.first);
        int end = high == params.queries ? tiles.end : high / Config::kOthers;
        return {ptx::min(start, tiles.end), ptx::max(end, ptx::min(start, tiles.end))};
    }

    template <class Visible>
    DEVICE void step(const Visible& visible) {
        Base::multiply();
        tile::wait_products<1>(scores);
        float factor = Base::factor;
        tile::with_columns(scores, shared.statistics(turn.stage),
                           [factor](float& x, float statistic) { x = Softmax::weight(x, factor, statistic); });
        Base::hide(scores, visible);
        tile::wait_products<0>(d_weights);
        tile::with_columns(d_weights, shared.deltas(turn.stage), [](float& d, float delta) { d -= delta; });
        Base::finish_gradients();
        Base::hide(d_weights, visible);
        weights.set(scores);
        d_scores.set(d_weights);
        tile::multiply_beside(d_v, weights, Base::second_rows(), true);
        tile::multiply_beside(d_k, d_scores, Base::first_rows(), true);
        tile::wait_products<0>(d_v, d_k);
        shared.stages.release(turn);
        turn.advance();
    }

    DEVICE void walk(const OtherTiles& tiles, int heads) {
        Range whole = whole_tiles(tiles);
        tile::wait_for_phase(shared.own_full, 0);
#pragma unroll 1
        for (; heads > 0; --heads) {
            int tile = tiles.first;
            auto bounds = [&](int tile) {
                return Base::bounds(KeysByQueries<Problem>{params, tile * Config::kOthers, block_first});
            };
#pragma unroll 1
            for (; tile < whole.low; ++tile) step(bounds(tile));
#pragma unroll 1
            for (; tile < whole.high; ++tile) step(AllVisible{});
#pragma unroll 1
            for (; tile < tiles.end; ++tile) step(bounds(tile));
        }
    }

    DEVICE void store(const RowBlock& block) {
        int64_t head = (int64_t(block.batch) * params.key_heads + block.head) * params.keys;
        auto rows = [&](auto* gradient, int width) {
            return tile::Rows<typename Config::Element>{gradient + head * width, width, params.keys, width};
        };
        int first = block_first + row + tile::first_row_of_warp();
        tile::store(d_v, rows(params.d_v, params.value_width), first, 0);
        float scale = float(params.scale);
        d_k.each([scale](int, int, float& x) { x *= scale; });
        tile::store(d_k, rows(params.d_k, params.width), first, 0);
    }
};

template <class Config>
DEVICE void keys(const typename Config::Params& params) {
    const auto& problem = params.problem;
    auto shared = BackwardShared<Config>::of_block();
    shared.initialise(2);
    auto block = RowBlock::ascending(ptx::block_x(), problem.key_heads, problem.keys, Config::kRows);
    auto tiles = OtherTiles::of_keys(problem, block.first, Config::kRows, Config::kOthers);
    int heads = tiles.first < tiles.end ? problem.group() : 0;
    if (ptx::warpgroup() == 0) {
        ptx::setmaxnreg_dec<40>();
        BackwardCopies copies{params.k_map, params.v_map, params.q_map, params.d_out_map,
                              block,        block.head * problem.group(), heads, tiles};
        if (heads > 0 && ptx::warp() == 0 && ptx::elect()) copy_tiles(shared, copies);
        if (heads > 0 && ptx::warp() == 1) load_values(problem, shared, copies);
    } else {
        ptx::setmaxnreg_inc<232>();
        KeyRows<Config> rows(problem, shared, 64 * (ptx::warpgroup() - 1), block.first);
        if (heads > 0) rows.walk(tiles, heads);
        rows.store(block);
    }
}

template <class E>
using Width64 = BackwardConfig<E, 64, 112, 4>;
template <class E>
using Width128 = BackwardConfig<E, 128, 64, 4>;

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_keys_sm90_bf16_64, keys<Width64<bf16>>, QuadraticMappedGradientParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_bf16_128, keys<Width128<bf16>>, QuadraticMappedGradientParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_f16_64, keys<Width64<f16>>, QuadraticMappedGradientParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_f16_128, keys<Width128<f16>>, QuadraticMappedGradientParams<f16>, kWarpgroupThreads)
