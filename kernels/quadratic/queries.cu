// The gradient of q, and each block's part of the gradient of the bias.
//
//     dq_i = scale Σ_j d_score_ij k_j,    dbias[j − p_i] += d_logit_ij       over the keys j that query i sees
//
// Block (x, y): the queries of block x, of one head and batch entry; columns of tile y of dq. It walks the tiles of keys
// that its rows see. Blocks of the first tile of columns add up d_logit along the diagonals of each tile, by way of
// shared memory, into their own row of a workspace; reduce.cu adds up those.

#include "backward.cuh"

namespace attn::quadratic {

// The part of the gradient of the bias that comes from a block.
template <class Config>
struct BiasPart {
    using Real = typename Config::Real;
    static constexpr int kRow = Config::kOthers + 4;
    static constexpr int kDiagonals = Config::kRows + Config::kOthers - 1;
    static_assert(kDiagonals <= kThreads, "a thread per diagonal");

    const typename Config::Params& params;
    // kRows × kOthers; null if there is nothing to add up.
    Real* d_logits = nullptr;

    DEVICE BiasPart(const typename Config::Params& params, int distance, tile::SharedPieces& pieces) : params(params) {
        if (params.d_bias == nullptr || ptx::block_y() != 0) return;
        d_logits = pieces.take<Real>(Config::kRows * kRow);
        for (int64_t i = ptx::thread(); i < params.bias_span; i += kThreads) sums()[i] = 0;
        if (ptx::thread() == 0) params.first_distance[ptx::block_x()] = distance;
    }

    // By distance from that of the first key of the block's first tile to the block's last row.
    DEVICE Real* sums() const { return params.partial_bias + ptx::block_x() * params.bias_span; }

    // `key` counts from the first one of the block's first tile. The barriers of the ring keep tiles apart.
    DEVICE void add(typename Config::Scores& tile, int row, int key) {
        if (d_logits == nullptr) return;
        tile.put([&](int r, int column, Real x) { d_logits[(row + r) * kRow + column] = x; });
        ptx::barrier_sync();
        int diagonal = ptx::thread();
        if (diagonal >= kDiagonals) return;
        Real sum = 0;
        for (int r = 0; r < Config::kRows; ++r) {
            int column = diagonal - (Config::kRows - 1) + r;
            if (column >= 0 && column < Config::kOthers) sum += d_logits[r * kRow + column];
        }
        sums()[key + diagonal] += sum;
    }
};

template <class Config, class Weight>
DEVICE void queries(const typename Config::Params& params) {
    using Real = typename Config::Real;
    using Math = typename Config::Math;
    using Own = QuerySide<Config>;
    using Other = KeySide<Config>;
    auto block = RowBlock::of(params.first_block + ptx::block_x(), params.heads, params.queries, Config::kRows);
    int panel = int(ptx::block_y()), row = Config::kRowsOfWarp * ptx::warp();
    PanelOrder order{Config::panels(params.width), Config::panels(params.value_width), panel, true};
    auto tiles = OtherTiles::of_queries(params, block.first, Config::kRows, Config::kOthers);
    tile::SharedPieces pieces;
    Own own{params, block.batch, block.head};
    BackwardLoad<Config, Own, Other> load(params, own, Other(params, block.batch, block.head / params.group()), order,
                                          block.first, tiles, 1, pieces);
    int first_key = tiles.first * Config::kOthers;
    int last_position = block.first + Config::kRows - 1 + params.offset();
    BiasPart<Config> bias(params, first_key - last_position, pieces);
    Weight weight(params);
    Logits<Config> logits(params, Weight::kUnit, block.batch, block.head);
    auto d_q = Config::SumsTile::zero();
    auto add = [&](int, int key, auto& scores, auto& d_weights, int stage) {
        QueriesByKeys<typename Config::Params> place{params, block.first, key};
        // Read again for each tile, which costs less than registers that live through the products.
        tile::RowValues<Real, Config::kBlocks> statistic, delta;
        statistic.each([&](int r, Real& x) { x = own.factors_of(block.first + row + r).statistic; });
        delta.each([&](int r, Real& x) { x = own.factors_of(block.first + row + r).delta; });
        auto of_row = [&](int m, int i, int) { return RowPair<Real>{statistic.at(m, i), delta.at(m, i)}; };
        logits.gradients(scores, d_weights, place, row, tiles.is_whole(key, Config::kOthers), weight, of_row, false);
        bias.add(scores, row, key - first_key);
        tile::multiply_registers<Math>(d_q, d_weights, typename Math::RightRows{load.other_first(stage)});
    };
    walk_tiles<Config>(load, add);
    d_q.each([&](int, int, Real& x) { x *= Real(params.scale_of(block.batch)); });
    int64_t width = params.width;
    auto* gradient = params.d_q + params.row(block.batch, block.head, 0) * width;
    tile::store(d_q, tile::Rows<typename Config::Element>{gradient, width, params.queries, params.width},
                block.first + row, panel * Config::kColumns);
}

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_queries_softmax_bf16_64, queries<Fast<bf16, 64>, Softmax>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_queries_softmax_f16_64, queries<Fast<f16, 64>, Softmax>, QuadraticParams<f16>, kThreads)
ATTN_KERNEL(quadratic_queries_softmax_f32_64, queries<F32, Softmax>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_queries_relu_f32_64, queries<F32, Relu>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_queries_relu_f64_32, queries<F64, Relu>, QuadraticParams<double>, kThreads)
ATTN_KERNEL(quadratic_queries_softmax_bf16_128, queries<Fast<bf16, 128>, Softmax>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_queries_softmax_f16_128, queries<Fast<f16, 128>, Softmax>, QuadraticParams<f16>, kThreads)
ATTN_KERNEL(quadratic_queries_softmax_f64_32, queries<F64, Softmax>, QuadraticParams<double>, kThreads)
ATTN_KERNEL(quadratic_queries_relu_bf16_64, queries<Tf32<bf16>, Relu>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_queries_relu_f16_64, queries<Tf32<f16>, Relu>, QuadraticParams<f16>, kThreads)
