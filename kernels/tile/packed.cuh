// 16-bit rows between registers and swizzled tiles.
#pragma once

#include "../ptx/stmatrix.cuh"
#include "rows.cuh"
#include "warpgroup.cuh"

namespace attn::tile {

// The thread's number, for addresses that are not to be kept in registers around a loop.
DEVICE int thread_here() { return int(ptx::here(uint64_t(ptx::thread()))); }

// Rows row … row + 15 of a tile, from `column` on, from a warp's part of packed rows.
template <class Element, int N>
DEVICE void store(const SwizzledTile<Element>& into, int row, const PackedRows<Element, N>& rows, int column = 0) {
    int lane = thread_here() % 32;
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
        ptx::stmatrix_x4(into.chunk(row + lane % 16, column + 16 * n + lane / 16 * 8), rows.value[n]);
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

// Sums of a warpgroup, rounded, into rows of `into`, those of the warp from `first` on, at column `column`, a multiple of 8;
// what lies outside is left out. The four lanes that share a row exchange numbers, so that each has every fourth 16-byte
// vector of it.
template <class Element, int N>
DEVICE void store_vectors(const Accumulator<float, 1, N>& sums, const Rows<Element>& into, int64_t first, int column) {
    static_assert(N % 4 == 0, "a vector for each of four lanes");
    bool is_aligned = into.is_aligned();
    bool is_odd = ptx::lane() % 2 != 0, is_high = ptx::lane() % 4 >= 2;
    auto exchange = [](uint32_t& low, uint32_t& high, bool keeps_high, int mask) {
        uint32_t other = ptx::shuffle_xor(keeps_high ? low : high, mask);
        (keeps_high ? low : high) = other;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int64_t row = first + block_row(2 * half);
        bool is_present = row >= 0 && row < into.count;
#pragma unroll
        for (int n = 0; n < N; n += 4) {
            ptx::Vector<uint32_t, 4> vector;
            auto& x = vector.value;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = sums.value[0][n + i];
                x[i] = ptx::pack<Element>(pair[2 * half], pair[2 * half + 1]);
            }
            exchange(x[0], x[1], is_odd, 1);
            exchange(x[2], x[3], is_odd, 1);
            exchange(x[0], x[2], is_high, 2);
            exchange(x[1], x[3], is_high, 2);
            int c = column + 8 * (n + ptx::lane() % 4);
            if (!is_present || c >= into.width) continue;
            auto* target = reinterpret_cast<uint16_t*>(into.row(row) + c);
            if (is_aligned) {
                ptx::store_vector(reinterpret_cast<uint32_t*>(target), vector);
                continue;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (c + i < into.width) target[i] = uint16_t(x[i / 2] >> i % 2 * 16);
            }
        }
    }
}

}  // namespace attn::tile
