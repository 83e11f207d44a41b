// o_i = finish_i(Σ_j weight(s_ij) v_j) over the keys that query i sees.
//
// Block (x, y, z): the rows of block x, of one head and batch entry; value columns of tile y; part z of the keys. It walks
// key tiles that its rows see; for each, steps for the panels of k and one for the tile of v. Every warp owns its rows:
// scores, weights and sums never leave its registers.
//
//     shared memory      size                                  filled
//     q                  kRows × all panels, if resident       once
//     stages             kOthers × kColumns, and a panel       one step ahead (ring.cuh)
//                        of q if that is not resident
//
// With partial sums, combine.cu adds the parts up and finishes.

#include "../tile/shared.cuh"
#include "logits.cuh"
#include "ring.cuh"
#include "weight.cuh"

namespace attn::quadratic {

// Fills stages in the order of the steps: for each key tile the panels of k, then the tile of v.
template <class Config>
struct ForwardLoad {
    using Math = typename Config::Math;
    using Number = typename Tiles<Math>::Number;
    using Element = typename Config::Element;

    static constexpr int kOther = Tiles<Math>::size(Config::kOthers, Config::kColumns);
    static constexpr int kOwn = Tiles<Math>::size(Config::kRows, Config::kColumns);

    tile::Rows<const Element> q, k, v;
    KeptKeys kept;
    int first_row;
    bool is_resident;
    Number* stages;
    int tile, end;
    int panel;

    DEVICE Number* stage(int index) const { return stages + index * (kOther + (is_resident ? 0 : kOwn)); }
    DEVICE auto other(int index) const { return Tiles<Math>::tile(stage(index), Config::kOthers, Config::kColumns); }
    DEVICE auto own(int index) const { return Tiles<Math>::tile(stage(index) + kOther, Config::kRows, Config::kColumns); }

    DEVICE void operator()(int index) {
        if (tile >= end) return;
        bool is_value = panel == Config::panels(k.width);
        int column = panel * Config::kColumns;
        int inner = is_value ? Config::kColumns : Config::inner(k.width, panel);
        tile::load(other(index), is_value ? v : k.from_column(column), tile * Config::kOthers, Config::kOthers, inner, kept);
        if (!is_resident && !is_value) {
            tile::load(own(index), q.from_column(column), first_row, Config::kRows, inner, EveryRow{});
        }
        panel = is_value ? 0 : panel + 1;
        tile += is_value;
    }
};

// √(Σ x²) of the rows of a warp, where the finish needs it.
template <class Params, class Real, int M, int N>
DEVICE tile::RowValues<Real, M> norms_of_rows(const Params& params, const tile::Accumulator<Real, M, N>& sums) {
    auto norms = tile::RowValues<Real, M>::filled(Real(0));
    if (params.finish != kRmsNorm) return norms;
    auto scales = sums.fold_rows(norms, [](Real a, Real b) { return ptx::max(ptx::abs(a), ptx::abs(b)); });
    scales.each([](int, Real& x) { x = tile::scale_of_squares(x); });
    auto squares = sums;
    squares.scale_rows(scales);
    squares.each([](int, int, Real& x) { x *= x; });
    norms = squares.row_sums(norms);
    norms.with(scales, [](Real& x, Real scale) { x = tile::norm_of(x, scale); });
    return norms;
}

// Finishes the rows of a warp and writes them, or writes what combine.cu needs.
template <class Config, class Params>
DEVICE void store_rows(const Params& params, const RowBlock& block, typename Config::SumsTile& sums,
                       tile::RowValues<typename Config::Real, Config::kBlocks> maximum,
                       tile::RowValues<typename Config::Real, Config::kBlocks> sum) {
    using Real = typename Config::Real;
    int first = block.first + Config::kRowsOfWarp * ptx::warp();
    int column = int(ptx::block_y()) * Config::kColumns;
    bool is_first_column = column == 0;
    if (params.has_partial_sums) {
        int64_t row = params.row(block.batch, block.head, 0) + ptx::block_z() * params.row(params.batch, 0, 0);
        int width = params.value_width;
        tile::store(sums, tile::Rows<Real>{params.partial_sums + row * width, width, params.queries, width}, first, column);
        if (!is_first_column) return;
        Real* weights = params.partial_weights + 2 * (row + first);
        maximum.each_once([&](int r, Real largest) {
            if (first + r < params.queries) weights[2 * r] = largest;
        });
        sum.each_once([&](int r, Real weight) {
            if (first + r < params.queries) weights[2 * r + 1] = weight;
        });
        return;
    }
    auto factors = norms_of_rows(params, sums), statistics = factors;
#pragma unroll
    for (int m = 0; m < Config::kBlocks; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            auto finish = Finish<Real>::of(params, block.batch, maximum.value[m][half], sum.value[m][half], factors.value[m][half]);
            factors.value[m][half] = finish.factor, statistics.value[m][half] = finish.statistic;
        }
    }
    sums.scale_rows(factors);
    auto out = tile::rows_of_head(static_cast<typename Config::Element*>(params.out), params.out_strides, block.batch,
                                  block.head, params.queries, params.value_width);
    tile::store(sums, out, first, column);
    if (params.statistic == nullptr || !is_first_column) return;
    statistics.each_once([&](int r, Real statistic) {
        if (first + r < params.queries) *params.statistic_of(block.batch, block.head, first + r) = statistic;
    });
}

template <class Config, class Weight>
DEVICE void forward(const typename Config::Params& params) {
    using Real = typename Config::Real;
    using Math = typename Config::Math;
    using Number = typename Tiles<Math>::Number;
    auto block = RowBlock::of(ptx::block_x(), params.heads, params.queries, Config::kRows);
    int key_head = block.head / params.group();
    auto tiles = OtherTiles::of_queries(params, block.first, Config::kRows, Config::kOthers);
    tiles = tiles.part(int(ptx::block_z()), params.splits);
    auto q = query_rows(params, block.batch, block.head);
    int panels = Config::panels(params.width);

    tile::SharedPieces pieces;
    auto resident = Tiles<Math>::tile(nullptr, Config::kRows, params.width);
    if (params.is_resident) {
        resident = Tiles<Math>::tile(pieces.take<Number>(Tiles<Math>::size(Config::kRows, params.width)), Config::kRows,
                                     params.width);
        if (tiles.first < tiles.end) {
            tile::load(resident, q, block.first, Config::kRows, Config::whole_inner(params.width), EveryRow{});
        }
    }
    auto values = value_rows(params, block.batch, key_head).from_column(int(ptx::block_y()) * Config::kColumns);
    ForwardLoad<Config> load{q, key_rows(params, block.batch, key_head), values, {params.mask_of(block.batch)},
                             block.first, params.is_resident != 0, pieces.take<Number>(0), tiles.first, tiles.end, 0};
    Ring<ForwardLoad<Config>> ring(params.stages, load);

    Weight weight(params);
    Logits<Config> logits(params, Weight::kUnit, block.batch, block.head);
    int row = Config::kRowsOfWarp * ptx::warp();
    auto maximum = tile::RowValues<Real, Config::kBlocks>::filled(Weight::template initial_maximum<Real>());
    auto sum = tile::RowValues<Real, Config::kBlocks>::filled(Real(0));
    auto sums = Config::SumsTile::zero();
    auto scores = Config::Scores::zero();
    int tile = tiles.first;
    for (int panel = 0; tile < tiles.end;) {
        int stage = ring.next();
        if (panel < panels) {
            auto own = params.is_resident ? Tiles<Math>::panel(resident, panel * Config::kColumns) : load.own(stage);
            add_scores<Config>(scores, Tiles<Math>::left(own, row), load.other(stage), params.width, panel);
            ++panel;
            continue;
        }
        int key = tile * Config::kOthers;
        QueriesByKeys<typename Config::Params> place{params, block.first, key};
        Real factor = logits.apply(scores, place, row, tiles.is_whole(key, Config::kOthers));
        weight.absorb(scores, factor, maximum, sum, sums);
        tile::multiply_registers<Math>(sums, scores, typename Math::RightRows{load.other(stage)});
        scores = Config::Scores::zero();
        panel = 0, ++tile;
    }
    sum = sum.fold_lanes([](Real a, Real b) { return a + b; });
    store_rows<Config>(params, block, sums, maximum, sum);
}

using ptx::bf16;
using ptx::f16;

template <class Element, int Columns>
using Fast = Config<Element, tile::Native<Element>, 1, 64, Columns>;
template <class Element>
using Tf32 = Config<Element, tile::Wide<float, 1>, 1, 64, 64>;
using F32 = Config<float, tile::Wide<float, 3>, 1, 64, 64>;
using F64 = Config<double, tile::Wide<double, 1>, 1, 32, 64>;

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_forward_softmax_bf16_64, forward<Fast<bf16, 64>, Softmax>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_forward_softmax_bf16_128, forward<Fast<bf16, 128>, Softmax>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_forward_softmax_f16_64, forward<Fast<f16, 64>, Softmax>, QuadraticParams<f16>, kThreads)
ATTN_KERNEL(quadratic_forward_softmax_f16_128, forward<Fast<f16, 128>, Softmax>, QuadraticParams<f16>, kThreads)
ATTN_KERNEL(quadratic_forward_softmax_f32_64, forward<F32, Softmax>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_forward_softmax_f64_64, forward<F64, Softmax>, QuadraticParams<double>, kThreads)
ATTN_KERNEL(quadratic_forward_relu_bf16_64, forward<Tf32<bf16>, Relu>, QuadraticParams<bf16>, kThreads)
ATTN_KERNEL(quadratic_forward_relu_f16_64, forward<Tf32<f16>, Relu>, QuadraticParams<f16>, kThreads)
ATTN_KERNEL(quadratic_forward_relu_f32_64, forward<F32, Relu>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_forward_relu_f64_64, forward<F64, Relu>, QuadraticParams<double>, kThreads)
