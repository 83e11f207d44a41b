// Gradients of k and v.
//
//     dv_j = Σ_i w_ij d_sum_i,    dk_j = scale Σ_i d_score_ij q_i      over the queries i of the group that see key j
//
// Block (x, y): the keys of block x, of one key head and batch entry; columns of tile y of dk and dv. It walks the query
// heads of the group and, for each, the tiles of queries that see its keys. Scores are transposed, so that weights and
// their gradients are left operands as they lie in registers. Tiles of columns past the width of k need no d_score.

#include "backward.cuh"

namespace attn::quadratic {

template <class Config, class Params, class Element>
DEVICE void store_gradient(const Params& params, const RowBlock& block, typename Config::SumsTile& sums,
                           Element* gradient, int width, int panel) {
    int64_t head = (int64_t(block.batch) * params.key_heads + block.head) * params.keys;
    tile::store(sums, tile::Rows<Element>{gradient + head * width, width, params.keys, width},
                block.first + Config::kRowsOfWarp * ptx::warp(), panel * Config::kColumns);
}

template <class Config, class Weight>
DEVICE void keys(const typename Config::Params& params) {
    using Real = typename Config::Real;
    using Math = typename Config::Math;
    using Own = KeySide<Config>;
    using Other = QuerySide<Config>;
    auto block = RowBlock::of(ptx::block_x(), params.key_heads, params.keys, Config::kRows);
    int panel = int(ptx::block_y());
    PanelOrder order{Config::panels(params.width), Config::panels(params.value_width), panel, true};
    bool has_d_k = panel < order.first_panels, has_d_v = panel < order.second_panels;
    order.has_d_weights = has_d_k;
    auto tiles = OtherTiles::of_keys(params, block.first, Config::kRows, Config::kOthers);
    tile::SharedPieces pieces;
    BackwardLoad<Config, Own, Other> load(params, Own(params, block.batch, block.head),
                                          Other{params, block.batch, block.head * params.group()}, order, block.first,
                                          tiles, params.group(), pieces);
    Weight weight(params);
    auto d_k = Config::SumsTile::zero(), d_v = Config::SumsTile::zero();
    int row = Config::kRowsOfWarp * ptx::warp();
    auto add = [&](int head, int query, auto& scores, auto& d_weights, int stage) {
        Logits<Config> logits(params, Weight::kUnit, block.batch, head);
        KeysByQueries<typename Config::Params> place{params, query, block.first};
        const Real* values = load.values_of(stage);
        auto of_column = [values](int, int, int c) { return RowPair<Real>{values[c], values[Config::kOthers + c]}; };
        logits.gradients(scores, d_weights, place, row, tiles.is_whole(query, Config::kOthers), weight, of_column, true);
        if (has_d_v) tile::multiply_registers<Math>(d_v, scores, typename Math::RightRows{load.other_second(stage)});
        if (has_d_k) tile::multiply_registers<Math>(d_k, d_weights, typename Math::RightRows{load.other_first(stage)});
    };
    walk_tiles<Config>(load, add);
    if (has_d_v) store_gradient<Config>(params, block, d_v, params.d_v, params.value_width, panel);
    d_k.each([&](int, int, Real& x) { x *= Real(params.scale_of(block.batch)); });
    if (has_d_k) store_gradient<Config>(params, block, d_k, params.d_k, params.width, panel);
}

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_keys_softmax_bf16_64, keys<Fast<bf16, 64>, Softmax>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_keys_softmax_bf16_128, keys<Fast<bf16, 128>, Softmax>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_keys_softmax_f16_64, keys<Fast<f16, 64>, Softmax>, QuadraticParams<f16>, kThreads)
ATTN_KERNEL(quadratic_keys_softmax_f16_128, keys<Fast<f16, 128>, Softmax>, QuadraticParams<f16>, kThreads)
ATTN_KERNEL(quadratic_keys_softmax_f32_64, keys<F32, Softmax>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_keys_softmax_f64_32, keys<F64, Softmax>, QuadraticParams<double>, kThreads)
ATTN_KERNEL(quadratic_keys_relu_bf16_64, keys<Tf32<bf16>, Relu>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_keys_relu_f16_64, keys<Tf32<f16>, Relu>, QuadraticParams<f16>, kThreads)
ATTN_KERNEL(quadratic_keys_relu_f32_64, keys<F32, Relu>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_keys_relu_f64_32, keys<F64, Relu>, QuadraticParams<double>, kThreads)
