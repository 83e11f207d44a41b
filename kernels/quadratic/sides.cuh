// The two sides of a tile of scores in the backward pass. Each has two matrices: `first` enters the scores, `second` the
// gradients of the weights.
//
//     keys       first k,  second v
//     queries    first q,  second the gradient of the rows' sums up to their factors, d_out − from_out out
#pragma once

#include "config.cuh"

namespace attn::quadratic {

template <class Config>
struct KeySide {
    using Params = typename Config::Params;
    const Params& params;
    int batch, head;
    KeptKeys kept;

    DEVICE KeySide(const Params& params, int batch, int key_head)
        : params(params), batch(batch), head(key_head), kept{params.mask_of(batch)} {}

    template <class Tile>
    DEVICE void load_first(const Tile& tile, int row, int rows, int column, int columns) const {
        tile::load(tile, key_rows(params, batch, head).from_column(column), row, rows, columns, kept);
    }

    template <class Tile>
    DEVICE void load_second(const Tile& tile, int row, int rows, int column, int columns) const {
        tile::load(tile, value_rows(params, batch, head).from_column(column), row, rows, columns, kept);
    }

    DEVICE void load_values(typename Config::Real*, int, int) const {}
};

template <class Config>
struct QuerySide {
    using Params = typename Config::Params;
    using Element = typename Config::Element;
    using Real = typename Config::Real;
    using Number = typename Tiles<typename Config::Math>::Number;
    const Params& params;
    int batch, head;

    template <class Tile>
    DEVICE void load_first(const Tile& tile, int row, int rows, int column, int columns) const {
        tile::load(tile, query_rows(params, batch, head).from_column(column), row, rows, columns, EveryRow{});
    }

    template <class Tile>
    DEVICE void load_second(const Tile& tile, int row, int rows, int column, int columns) const {
        if (params.is_out_wide) {
            load_sum_gradients<Real>(tile, row, rows, column, columns);
        } else if (params.finish != kRmsNorm) {
            tile::load(tile, gradient_rows<Element>().from_column(column), row, rows, columns, EveryRow{});
        } else {
            load_sum_gradients<Element>(tile, row, rows, column, columns);
        }
    }

    // Statistics of the rows, then their δ.
    DEVICE void load_values(Real* values, int row, int rows) const {
        for (int r = ptx::thread(); r < rows; r += ptx::threads()) {
            auto factors = factors_of(row + r);
            values[r] = factors.statistic, values[rows + r] = factors.delta;
        }
    }

    // Rows past the end have no weights.
    DEVICE RowFactors<Real> factors_of(int query) const {
        Real none = params.weight == kSoftmax ? Real(__builtin_huge_val()) : Real(0);
        if (query >= params.queries) return {none, Real(0), Real(0), Real(0)};
        return params.factors[params.row(batch, head, query)];
    }

private:
    template <class Stored>
    DEVICE tile::Rows<const Stored> gradient_rows() const {
        return tile::rows_of_head(static_cast<const Stored*>(params.d_out), params.d_out_strides, batch, head,
                                  params.queries, params.value_width);
    }

    template <class Stored, class Tile>
    DEVICE void load_sum_gradients(const Tile& tile, int first, int rows, int column, int columns) const {
        auto d_out = gradient_rows<Stored>();
        auto out = tile::rows_of_head(static_cast<const Stored*>(params.out), params.out_strides, batch, head,
                                      params.queries, params.value_width);
        bool reads_out = params.finish == kRmsNorm;
        for (int index = ptx::thread(); index < rows * columns; index += ptx::threads()) {
            int r = index / columns, c = index % columns;
            Real x = 0;
            if (first + r < params.queries && column + c < params.value_width) {
                x = tile::widen<Real>(d_out.row(first + r)[column + c]);
                if (reads_out) {
                    x = ptx::fma(-factors_of(first + r).from_out, tile::widen<Real>(out.row(first + r)[column + c]), x);
                }
            }
            tile.at(r, c) = tile::narrow<Number>(x);
        }
    }
};

}  // namespace attn::quadratic
