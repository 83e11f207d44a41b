// How many keys a mask keeps.
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/device.cuh"
#include "../ptx/shuffle.cuh"

namespace attn::tile {

// 1/n of the n bytes out of `count` that are not 0, 1 for none. By a block, whose dynamic shared memory holds a number for
// each of its warps; on thread 0.
DEVICE double inverse_count(const uint8_t* mask, int64_t count) {
    int kept = 0;
    for (int64_t key = ptx::thread(); key < count; key += ptx::threads()) kept += mask[key] != 0;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) kept += ptx::shuffle_xor(kept, distance);
    int* parts = ptx::shared_memory<int>();
    if (ptx::lane() == 0) parts[ptx::warp()] = kept;
    ptx::barrier_sync();
    int sum = 0;
    for (int warp = 0; warp < ptx::threads() / 32; ++warp) sum += parts[warp];
    return sum == 0 ? 1.0 : 1.0 / sum;
}

}  // namespace attn::tile
