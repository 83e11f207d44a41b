// The gradient of q, as queries.cu for plain scores (no key mask, bias or soft-cap), on warpgroups.
//
// Block x: 128 queries of one head and batch entry, in the order of schedule.sm90.cuh. It walks the tiles of keys that its rows
// see. Own side q, d_out; other side k, v. While weights come of a tile's scores, the product for their gradients is
// under way; dq runs beside the next tile's products, so that its stage is released when those scores are complete.

#include "backward.sm90.cuh"

namespace attn::quadratic {

template <class Config>
struct QueryRows : BackwardRows<Config> {
    using Base = BackwardRows<Config>;
    using Problem = typename Config::Problem;
    using Base::params, Base::shared, Base::row, Base::turn, Base::scores, Base::d_weights, Base::weight;
    int block_first;
    // Of the tile before.
    typename Config::Turn before;
    bool has_before = false;
    tile::RowValues<float, 1> statistic, delta;
    typename Config::SumsTile d_q;
    typename Config::Packed d_scores;

    DEVICE QueryRows(const Problem& params, const BackwardShared<Config>& shared, int row, int block_first)
        : Base(params, shared, row), block_first(block_first),
          statistic(tile::RowValues<float, 1>::filled(Config::Weight::kNoStatistic)),
          delta(tile::RowValues<float, 1>::filled(0.0f)), d_q(Config::SumsTile::zero()) {}

    // Rows past the end have no weights.
    DEVICE void load_values(const RowBlock& block) {
        int first = block_first + row + tile::first_row_of_warp();
        const auto* factors = params.factors + params.row(block.batch, block.head, 0);
        statistic.each([&](int r, float& x) {
            if (first + r < params.queries) x = factors[first + r].statistic;
        });
        delta.each([&](int r, float& x) {
            if (first + r < params.queries) x = factors[first + r].delta;
        });
    }

    // When the product of the tile before has been waited for.
    DEVICE void release_before() {
        if (has_before) shared.stages.release(before);
        has_before = true;
        before = turn;
    }

    // Tiles of which all of the warpgroup's rows that exist see every key.
    DEVICE Range whole_tiles(const OtherTiles& tiles) const {
        int first = block_first + row, last = ptx::min(first + 64, int(params.queries)) - 1;
        if (last < first) return {tiles.end, tiles.end};
        return tiles.whole(params.visible_keys(first), params.visible_keys(last), Config::kOthers);
    }

    template <class Visible>
    DEVICE void step(const Visible& visible) {
        Base::multiply();
        tile::wait_products<1>(scores, d_q);
        release_before();
        scores.with_rows(statistic, [&, factor = Base::factor](float& x, float statistic) {
            x = weight.kept(x, factor, statistic);
        });
        if constexpr (Config::Weight::kHasExponentials) tile::compute_before_wait(scores);
        tile::wait_products<0>(d_weights);
        d_weights.with_indexed(scores, [&](int m, int i, int, int, float& d, float& kept) {
            d = weight.d_score(kept, d, delta.at(m, i), statistic.at(m, i));
        });
        Base::hide(d_weights, visible);
        d_scores.set(d_weights);
        tile::multiply_beside(d_q, d_scores, Base::first_rows(), true);
        turn.advance();
    }

    DEVICE void walk(const OtherTiles& tiles) {
        Range whole = whole_tiles(tiles);
        tile::wait_for_phase(shared.own_full, 0);
        Base::each_tile(tiles, whole, [&](const auto& visible) { step(visible); }, [&](int tile) {
            return Base::bounds(QueriesByKeys<Problem>{params, block_first, tile * Config::kOthers});
        });
        tile::wait_products<0>(d_q);
    }

    DEVICE void store(const RowBlock& block) {
        int64_t head = int64_t(block.batch) * params.heads + block.head;
        Base::store(d_q, params.d_q, head, params.queries, params.width, block_first, float(params.scale));
    }
};

template <class Config>
DEVICE void queries(const typename Config::Params& params) {
    const auto& problem = params.problem;
    auto shared = BackwardShared<Config>::of_block();
    shared.initialise();
    auto sections = Sections::of(problem.batch, problem.heads, problem.queries, Config::kRows, params.section);
    auto block = sections.of_block(ptx::block_x());
    auto tiles = OtherTiles::of_queries(problem, block.first, Config::kRows, Config::kOthers);
    bool is_empty = tiles.first >= tiles.end;
    if (ptx::warpgroup() == 0) {
        ptx::setmaxnreg_dec<40>();
        BackwardCopies copies{params.q_map, params.d_out_map, params.k_map, params.v_map, nullptr,
                              block, block.head / problem.group(), 1, tiles};
        if (!is_empty && ptx::warp() == 0 && ptx::elect()) copy_tiles(shared, copies);
    } else {
        ptx::setmaxnreg_inc<232>();
        QueryRows<Config> rows(problem, shared, 64 * (ptx::warpgroup() - 1), block.first);
        rows.load_values(block);
        if (!is_empty) rows.walk(tiles);
        rows.store(block);
    }
}

template <class E>
using Width64 = BackwardConfig<BackwardTile<E, 64, 96, 4>>;
template <class E>
using Width128 = BackwardConfig<BackwardTile<E, 128, 96, 3>>;
template <class E>
using Width256 = BackwardConfig<BackwardTile<E, 256, 48, 2>>;
using Rectified = BackwardConfig<BackwardTile<bf16, 128, 96, 3>, SquaredReluGradients>;

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_queries_sm90_bf16_64_96, queries<Width64<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_bf16_128_96, queries<Width128<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_bf16_256_48, queries<Width256<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_relu_bf16_128_96, queries<Rectified>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_f16_64_96, queries<Width64<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_f16_128_96, queries<Width128<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_queries_sm90_f16_256_48, queries<Width256<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
