// What kernels with tensor copies are given besides the parameters of the engine; its twin is in src/gpu/linear.
#pragma once

#include "../ptx/tensor_copy.cuh"
#include "params.cuh"

namespace attn::linear {

struct LinearMappedParams {
    LinearParams problem;
    // Of [B, H, N, D], in boxes of 64 columns and the rows of a chunk.
    ptx::TensorMap q_map, k_map, v_map;
    // Elements whose sum is what a key adds to S, in tiles of their own; 0: the mapped keys themselves.
    int32_t key_terms;
};

// What the kernels of the backward pass are given.
struct LinearSweepParams {
    LinearParams problem;
    // As above; the last one of gradients of sums, all but for a factor of each row.
    ptx::TensorMap q_map, k_map, v_map, d_sums_map;
    // Whether the features that the state takes up need a tile of their own: they have weights.
    int32_t has_term;
    // Whether a block also needs the rows that it gives the gradients of.
    int32_t has_own;
};

}  // namespace attn::linear
