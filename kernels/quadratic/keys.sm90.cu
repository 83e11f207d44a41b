// Gradients of k and v, as keys.cu for plain scores (no key mask, bias or soft-cap), on warpgroups.
//
// Block x: 128 keys of one key head and batch entry, in the order of schedule.sm90.cuh, the first keys first; 64 at width
// 256, where one warpgroup has dk and the other dv. It walks the query heads of the group and, for each, the tiles of
// queries that see its keys. Own side k, v; other side q, d_out. While weights come of a tile's scores, the product for
// their gradients is under way. Rows past the last query have zeros for q, d_out and factors, which add nothing.

#include "backward.sm90.cuh"

namespace attn::quadratic {

// What a warpgroup has the gradients of.
struct OfBoth {
    static constexpr bool kHasKeys = true, kHasValues = true;
};
struct OfKeys {
    static constexpr bool kHasKeys = true, kHasValues = false;
};
struct OfValues {
    static constexpr bool kHasKeys = false, kHasValues = true;
};

template <class Config, class Parts>
struct KeyRows : BackwardRows<Config> {
    using Base = BackwardRows<Config>;
    using Problem = typename Config::Problem;
    using Base::params, Base::shared, Base::row, Base::turn, Base::scores, Base::d_weights, Base::weight;
    int block_first;
    typename Config::SumsTile d_k, d_v;
    typename Config::Packed weights, d_scores;

    DEVICE KeyRows(const Problem& params, const BackwardShared<Config>& shared, int row, int block_first)
        : Base(params, shared, row), block_first(block_first), d_k(Config::SumsTile::zero()),
          d_v(Config::SumsTile::zero()) {}

    // Tiles of which all of the warpgroup's rows that exist see every query that exists.
    DEVICE Range whole_tiles(const OtherTiles& tiles) const {
        int first = block_first + row, last = ptx::min(first + 64, int(params.keys)) - 1;
        if (last < first) return {tiles.end, tiles.end};
        Range upper = params.seeing_queries(first), lower = params.seeing_queries(last);
        if (upper.high == params.queries) upper.high = tiles.end * Config::kOthers;
        return tiles.whole(upper, lower, Config::kOthers);
    }

    // Gradients of the scores; what was kept of these becomes weights.
    template <class Visible>
    DEVICE void finish_gradients(const RowFactors<float>* factors, const Visible& visible) {
        // At width 256 this spills 144 bytes.
        if constexpr (Config::Weight::kHasExponentials && Parts::kHasValues) tile::compute_before_wait(scores);
        tile::wait_products<0>(d_weights);
        d_weights.with_indexed(scores, [&](int, int, int, int column, float& d, float& kept) {
            d = weight.d_score(kept, d, factors[column].delta, factors[column].statistic);
            kept = weight.weight_of(kept, factors[column].statistic);
        });
        Base::hide(d_weights, visible);
    }

    template <class Visible>
    DEVICE void step(const Visible& visible) {
        if constexpr (Parts::kHasKeys) Base::multiply();
        else Base::multiply_scores();
        tile::wait_products<Parts::kHasKeys>(scores);
        const RowFactors<float>* factors = shared.factors_of(turn.stage);
        scores.each([&, factor = Base::factor](int, int column, float& x) {
            x = weight.kept(x, factor, factors[column].statistic);
        });
        Base::hide(scores, visible);
        if constexpr (Parts::kHasKeys) finish_gradients(factors, visible);
        if constexpr (Parts::kHasValues) weights.set(scores);
        if constexpr (Parts::kHasKeys) d_scores.set(d_weights);
        if constexpr (Parts::kHasValues) tile::multiply_beside(d_v, weights, Base::second_rows(), true);
        if constexpr (Parts::kHasKeys) tile::multiply_beside(d_k, d_scores, Base::first_rows(), true);
        if constexpr (Parts::kHasValues) tile::wait_products<0>(d_v);
        if constexpr (Parts::kHasKeys) tile::wait_products<0>(d_k);
        shared.stages.release(turn);
        turn.advance();
    }

    DEVICE void walk(const OtherTiles& tiles, int heads) {
        Range whole = whole_tiles(tiles);
        tile::wait_for_phase(shared.own_full, 0);
#pragma unroll 1
        for (; heads > 0; --heads) {
            Base::each_tile(tiles, whole, [&](const auto& visible) { step(visible); }, [&](int tile) {
                return Base::bounds(KeysByQueries<Problem>{params, tile * Config::kOthers, block_first});
            });
        }
    }

    DEVICE void store(const RowBlock& block) {
        int64_t head = int64_t(block.batch) * params.key_heads + block.head;
        if constexpr (Parts::kHasValues) {
            Base::store(d_v, params.d_v, head, params.keys, params.value_width, block_first, 1.0f);
        }
        if constexpr (Parts::kHasKeys) {
            Base::store(d_k, params.d_k, head, params.keys, params.width, block_first, float(params.scale));
        }
    }

    DEVICE void run(const RowBlock& block, const OtherTiles& tiles, int heads) {
        if (heads > 0) walk(tiles, heads);
        store(block);
    }
};

template <class Config>
DEVICE void keys(const typename Config::Params& params) {
    const auto& problem = params.problem;
    auto shared = BackwardShared<Config>::of_block();
    shared.initialise();
    auto sections = Sections::of(problem.batch, problem.key_heads, problem.keys, Config::kRows, params.section);
    auto block = sections.of_block_ascending(ptx::block_x());
    auto tiles = OtherTiles::of_keys(problem, block.first, Config::kRows, Config::kOthers);
    int heads = tiles.first < tiles.end ? problem.group() : 0;
    if (ptx::warpgroup() == 0) {
        ptx::setmaxnreg_dec<40>();
        BackwardCopies copies{params.k_map, params.v_map, params.q_map, params.d_out_map, &params.factors_map,
                              block, block.head * problem.group(), heads, tiles};
        if (heads > 0 && ptx::warp() == 0 && ptx::elect()) copy_tiles(shared, copies);
    } else {
        ptx::setmaxnreg_inc<232>();
        if constexpr (Config::kRows == 128) {
            KeyRows<Config, OfBoth>(problem, shared, 64 * (ptx::warpgroup() - 1), block.first).run(block, tiles, heads);
        } else if (ptx::warpgroup() == 1) {
            KeyRows<Config, OfKeys>(problem, shared, 0, block.first).run(block, tiles, heads);
        } else {
            KeyRows<Config, OfValues>(problem, shared, 0, block.first).run(block, tiles, heads);
        }
    }
}

template <class E>
using Width64 = BackwardConfig<BackwardTile<E, 64, 112, 4>>;
template <class E>
using Width128 = BackwardConfig<BackwardTile<E, 128, 64, 4>>;
// Gradients of both would be 256 registers.
template <class E>
using Width256 = BackwardConfig<SharedRows<BackwardTile<E, 256, 64, 2>>>;
using Rectified = BackwardConfig<BackwardTile<bf16, 128, 64, 4>, SquaredReluGradients>;

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_keys_sm90_bf16_64_112, keys<Width64<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_bf16_128_64, keys<Width128<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_bf16_256_64, keys<Width256<bf16>>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_relu_bf16_128_64, keys<Rectified>, QuadraticMappedParams<bf16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_f16_64_112, keys<Width64<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_f16_128_64, keys<Width128<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
ATTN_KERNEL(quadratic_keys_sm90_f16_256_64, keys<Width256<f16>>, QuadraticMappedParams<f16>, kWarpgroupThreads)
