// Arithmetic and tile sizes of the instances, and tiles that do not depend on the arithmetic.
#pragma once

#include "../tile/multiply.cuh"
#include "params.cuh"

namespace attn::quadratic {

// Warps of a block.
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// `Blocks` times 16 rows per warp against tiles of `Others` rows; panels and sums of `Columns` columns.
template <class E, class M, int Blocks, int Others, int Columns>
struct Config {
    using Element = E;
    using Math = M;
    using Real = typename Math::Real;
    using Params = QuadraticParams<E>;
    static constexpr int kBlocks = Blocks;
    static constexpr int kRowsOfWarp = 16 * Blocks;
    static constexpr int kRows = kWarps * kRowsOfWarp;
    static constexpr int kOthers = Others;
    static constexpr int kColumns = Columns;
    using Scores = tile::Accumulator<Real, kBlocks, kOthers / 8>;
    using SumsTile = tile::Accumulator<Real, kBlocks, kColumns / 8>;

    DEVICE static int panels(int width) { return (width + kColumns - 1) / kColumns; }

    // Columns of a panel as products take them.
    DEVICE static int inner(int width, int panel) {
        return whole_inner(ptx::min(width - panel * kColumns, kColumns));
    }

    DEVICE static int whole_inner(int width) { return (width + Math::kStep - 1) / Math::kStep * Math::kStep; }
};

// How tiles of an arithmetic are made of memory.
template <class Math>
struct Tiles {
    using Tile = typename Math::Tile;
    using Number = typename Math::Real;
    // Whether long sums need those of panels apart (add_scores).
    static constexpr bool kAddsPanels = false;

    DEVICE static constexpr int size(int rows, int columns) { return rows * tile::wide_row(columns); }
    DEVICE static Tile tile(Number* data, int, int columns) { return {data, tile::wide_row(columns)}; }
    DEVICE static Tile panel(const Tile& tile, int column) { return tile.from(0, column); }
    DEVICE static typename Math::LeftRows left(const Tile& tile, int row) { return {tile.from(row, 0)}; }
};

template <class Element>
struct Tiles<tile::Native<Element>> {
    using Tile = tile::SwizzledTile<Element>;
    using Number = Element;
    static constexpr bool kAddsPanels = true;

    DEVICE static constexpr int size(int rows, int columns) { return Tile::size(rows, columns); }
    DEVICE static Tile tile(Number* data, int rows, int) { return {data, rows}; }
    // `column` is a multiple of 64.
    DEVICE static Tile panel(const Tile& tile, int column) { return {tile.data + column * tile.rows, tile.rows}; }
    DEVICE static typename tile::Native<Element>::LeftRows left(const Tile& tile, int row) { return {tile, row}; }
};

// Columns whose products are left to tensor cores in one sum, which they cut off. Of more, ordinary cores add up panels.
constexpr int kChained = 256;

// scores += the product of rows and the transpose of `others`, in panel `panel` of so many columns.
template <class Config>
DEVICE void add_scores(typename Config::Scores& scores, const typename Config::Math::LeftRows& rows,
                       const typename Config::Math::Tile& others, int width, int panel) {
    using Math = typename Config::Math;
    using Right = typename Math::RightTransposed;
    int inner = Config::inner(width, panel);
    if constexpr (Tiles<Math>::kAddsPanels) {
        if (width > kChained) {
            // Half of the others at a time: there are not registers for all.
            constexpr int kHalf = Config::kOthers / 16;
#pragma unroll
            for (int first = 0; first < 2 * kHalf; first += kHalf) {
                auto sums = tile::Accumulator<typename Config::Real, Config::kBlocks, kHalf>::zero();
                tile::multiply<Math>(sums, rows, Right{others, 8 * first}, inner);
                scores.add(sums, first);
            }
            return;
        }
    }
    tile::multiply<Math>(scores, rows, Right{others}, inner);
}

}  // namespace attn::quadratic
