// What kernels of outputs on warpgroups share: S on its way to the operands' type, and rows on their way out.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/packed.cuh"
#include "state.sm90.cuh"

namespace attn::linear {

// S and z of the keys before a segment, S in rows `row` numbers apart; null if there are none.
struct EnteringSums {
    const float *s = nullptr, *z = nullptr;
    int64_t row;

    DEVICE EnteringSums(const LinearParams& p, const Place& place) : row(p.value_width) {
        if (p.segments > 1 || is_full(p)) {
            // A full scan reads the sums of all keys.
            int64_t slot = place.slot(p, is_full(p) ? p.segments : place.segment);
            s = static_cast<const float*>(p.segment_s) + slot * p.features * p.value_width;
            z = static_cast<const float*>(p.segment_z) + slot * p.features;
        } else if (p.state_s) {
            s = place.given<float>(p.state_s, p.state_s_strides);
            z = place.given<float>(p.state_z, p.state_z_strides);
            row = p.state_s_strides.row;
        }
    }
};

// Sums of a warpgroup, rounded, to a tile of 64 · Blocks rows; 1 over what they were multiplied by. In f16 that is a power
// of two by which they fit, for which the warps tell each other their `largest`, four numbers, at a barrier. The caller's
// fence and barrier follow.
template <class Element, int Blocks>
DEVICE float publish(tile::WarpgroupSums<64> (&sums)[Blocks], const tile::SwizzledTile<Element>& to, float* largest,
                     int barrier) {
    float scale = 1.0f;
    if constexpr (!ptx::is_bf16<Element>) {
        float own = 0.0f;
#pragma unroll
        for (int m = 0; m < Blocks; ++m) {
            sums[m].each([&](int, int, float& x) { own = ptx::max(own, ptx::abs(x)); });
        }
        own = warp_max(own);
        if (ptx::lane() == 0) largest[ptx::warp() % 4] = own;
        ptx::barrier_sync(barrier, 128);
        scale = fitting_scale(ptx::max(ptx::max(largest[0], largest[1]), ptx::max(largest[2], largest[3])));
    }
#pragma unroll
    for (int m = 0; m < Blocks; ++m) {
        tile::PackedRows<Element, 64> packed;
        if constexpr (!ptx::is_bf16<Element>) {
            auto scaled = sums[m];
            scaled.each([&](int, int, float& x) { x *= scale; });
            packed.set(scaled);
        } else {
            packed.set(sums[m]);
        }
        tile::store(to, 64 * m + tile::first_row_of_warp(), packed);
    }
    return 1.0f / scale;
}

// The output's rows of the block's head.
template <class Element>
struct OutputRows {
    const Tiles<InShared<Element>>& tiles;

    DEVICE int64_t first() const {
        const LinearParams& p = tiles.p;
        return (tiles.place.batch * p.heads + tiles.reader_head(0)) * p.queries;
    }

    template <class T>
    DEVICE tile::Rows<T> at(void* to) const {
        const LinearParams& p = tiles.p;
        return {static_cast<T*>(to) + first() * p.value_width, p.value_width, p.queries, p.value_width};
    }

    // 16 rows of a chunk, from `row` on, and 64 columns, from `column` on, by a warp, by way of its rows of a tile.
    DEVICE void store(const tile::WarpgroupSums<64>& out, Range chunk, const tile::SwizzledTile<Element>& by, int row,
                      int column) const {
        const LinearParams& p = tiles.p;
        int64_t to = tiles.query_at(chunk, row);
        if (p.finish == kRaw || p.is_out_wide) {
            return tile::store(out, at<float>(p.finish == kRaw ? p.raw : p.out), to, column);
        }
        tile::PackedRows<Element, 64> packed;
        packed.set(out);
        tile::store(by, row, packed);
        ptx::warp_sync();
        tile::copy_out(by, row, at<Element>(p.out), to, column);
        ptx::warp_sync();
    }
};

}  // namespace attn::linear
