// 16-bit rows between registers and swizzled tiles.
#pragma once

#include "../ptx/stmatrix.cuh"
#include "rows.cuh"
#include "warpgroup.cuh"

namespace attn::tile {

// The thread's number, for addresses that are not to be kept in registers around a loop.
DEVICE int thread_here() { return int(ptx::here(uint64_t(ptx::thread()))); }

// Rows row … row + 15 of a tile from a warp's part of packed rows.
template <class Element, int N>
DEVICE void store(const SwizzledTile<Element>& into, int row, const PackedRows<Element, N>& rows) {
    int lane = thread_here() % 32;
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
        ptx::stmatrix_x4(into.chunk(row + lane % 16, 16 * n + lane / 16 * 8), rows.value[n]);
    }
}

// A warp's part of packed rows from rows row … row + 15 of a tile.
template <class Element, int N>
DEVICE void load(const SwizzledTile<Element>& from, int row, PackedRows<Element, N>& rows) {
    int lane = thread_here() % 32;
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
        ptx::ldmatrix_x4(rows.value[n], from.chunk(row + lane % 16, 16 * n + lane / 16 * 8));
    }
}

// 64 columns of rows row … row + 15 of a tile into rows of `into` from `first` on, at its column `column`, by a warp; what
// lies outside is left out.
template <class Element>
DEVICE void copy_out(const SwizzledTile<Element>& from, int row, const Rows<Element>& into, int64_t first, int column) {
    bool is_aligned = into.is_aligned();
    int lane = thread_here() % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int r = 4 * i + lane / 8, c = lane % 8 * 8;
        int64_t to = first + r;
        if (to < 0 || to >= into.count || column + c >= into.width) continue;
        auto vector = ptx::load_vector<Element, 8>(from.chunk(row + r, c));
        Element* target = into.row(to) + column + c;
        if (is_aligned) {
            ptx::store_vector(target, vector);
            continue;
        }
        for (int j = 0; j < 8; ++j) {
            if (column + c + j < into.width) target[j] = vector.value[j];
        }
    }
}

}  // namespace attn::tile
