// 1/n for each batch entry, with n the number of keys that its mask keeps. A block for each.

#include "../tile/count.cuh"
#include "config.cuh"

namespace attn::quadratic {

// The same for every element type.
DEVICE void count(const QuadraticParams<float>& params) {
    double inverse = tile::inverse_count(params.mask_of(ptx::block_x()), params.keys);
    if (ptx::thread() == 0) params.inverse_counts[ptx::block_x()] = inverse;
}

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_count, count, QuadraticParams<float>, kThreads)
