// Which keys a query sees, as a range of positions whose ends grow with the query's.
#pragma once

#include "../ptx/math.cuh"

namespace attn::quadratic {

struct Range {
    int64_t low, high;

    // What is left of it inside first … end; empty ranges keep low = high.
    DEVICE Range clipped(int64_t first, int64_t end) const {
        int64_t start = ptx::min(ptx::max(low, first), end);
        return {start, ptx::max(ptx::min(high, end), start)};
    }
};

// Keys from `left` before a query to `right` after it, inside its block of positions if `block` is not 0.
// Unlimited counts are far beyond any length.
struct Mask {
    int64_t left, right, block;

    DEVICE Range around(int64_t position) const {
        Range range{position - left, position + right + 1};
        if (block > 0) {
            int64_t index = position / block - (position % block < 0);
            range.low = ptx::max(range.low, index * block);
            range.high = ptx::min(range.high, index * block + block);
        }
        return range;
    }

    // The queries that see a key.
    DEVICE Mask mirrored() const { return {right, left, block}; }
};

}  // namespace attn::quadratic
