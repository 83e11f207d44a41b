// 1/n for each batch entry, with n the number of keys that its mask keeps. A block for each.

#include "../tile/count.cuh"
#include "block.cuh"

namespace attn::linear {

DEVICE void count(const LinearParams& p) {
    auto* mask = static_cast<const uint8_t*>(p.key_mask) + ptx::block_x() * p.key_mask_stride;
    double inverse = tile::inverse_count(mask, p.keys);
    if (ptx::thread() == 0) static_cast<double*>(p.inverse_counts)[ptx::block_x()] = inverse;
}

ATTN_KERNEL(linear_count, count, LinearParams, kThreads)

}  // namespace attn::linear
