// The gradient of the bias: the parts of all blocks of queries that read an entry, added up in a fixed order. A warp for each
// entry: lanes take turns at the blocks, then add up in pairs. A later launch goes on from the sums of the one before.

#include "config.cuh"

namespace attn::quadratic {

template <class Element>
DEVICE void reduce(const QuadraticParams<Element>& params) {
    using Real = typename Sums<Element>::Real;
    // Queries of a block of queries.cu.
    constexpr int kRows = 16 * kWarps;
    int64_t length = 2 * params.bias_radius + 1;
    int64_t at = ptx::block_x() * kWarps + ptx::warp();
    if (at >= params.bias_heads * length) return;
    int64_t bias_head = at / length, distance = at % length - params.bias_radius;
    Real sum = Real(0);
    for (int64_t block = ptx::lane(); block < params.blocks; block += 32) {
        int64_t head = RowBlock::of(params.first_block + block, params.heads, params.queries, kRows).head;
        int64_t index = distance - params.first_distance[block];
        bool is_read = params.bias_heads == 1 || head == bias_head;
        if (is_read && index >= 0 && index < params.bias_span) sum += params.partial_bias[block * params.bias_span + index];
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    if (ptx::lane() != 0) return;
    if (params.first_block > 0) sum += params.bias_sums[at];
    params.bias_sums[at] = sum;
    params.d_bias[at] = tile::narrow<Element>(sum);
}

}  // namespace attn::quadratic

using namespace attn::quadratic;

ATTN_KERNEL(quadratic_reduce_bf16, reduce<attn::ptx::bf16>, QuadraticParams<attn::ptx::bf16>, kThreads)
ATTN_KERNEL(quadratic_reduce_f16, reduce<attn::ptx::f16>, QuadraticParams<attn::ptx::f16>, kThreads)
ATTN_KERNEL(quadratic_reduce_f32, reduce<float>, QuadraticParams<float>, kThreads)
ATTN_KERNEL(quadratic_reduce_f64, reduce<double>, QuadraticParams<double>, kThreads)
