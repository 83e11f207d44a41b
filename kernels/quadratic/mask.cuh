// Which keys a query sees, as a range of positions whose ends grow with the query's. Rows are counted in 32 bits.
#pragma once

#include "../ptx/math.cuh"

namespace attn::quadratic {

struct Range {
    int low, high;

    // low … high inside first … end; empty ranges have low = high.
    DEVICE static Range clipped(int64_t low, int64_t high, int first, int end) {
        int start = int(ptx::min(ptx::max(low, int64_t(first)), int64_t(end)));
        return {start, int(ptx::max(ptx::min(high, int64_t(end)), int64_t(start)))};
    }
};

// Keys from `left` before a query to `right` after it, inside its block of positions if `block` is not 0.
// Unlimited counts are far beyond any length.
struct Mask {
    int64_t left, right, block;

    // Rows first … end around a position, less `origin`.
    DEVICE Range around(int position, int origin, int first, int end) const {
        int64_t low = position - left, high = position + right + 1;
        if (block > 0) {
            int64_t start = block_start(position);
            low = ptx::max(low, start);
            high = ptx::min(high, start + block);
        }
        return Range::clipped(low - origin, high - origin, first, end);
    }

    // The queries that see a key.
    DEVICE Mask mirrored() const { return {right, left, block}; }

private:
    DEVICE int64_t block_start(int position) const {
        if (block > INT32_MAX) return position < 0 ? -block : 0;
        int size = int(block), index = position / size - (position % size < 0);
        return int64_t(index) * size;
    }
};

}  // namespace attn::quadratic
