// What kernels with tensor copies are given besides the parameters of the engine; its twin is in src/gpu/quadratic.
#pragma once

#include "../ptx/tensor_copy.cuh"
#include "params.cuh"

namespace attn::quadratic {

// Warpgroups of 64 own rows in a block, beside the one that copies.
constexpr int kReaders = 2;
constexpr int kWarpgroupThreads = 128 * (1 + kReaders);

template <class Element>
struct QuadraticMappedParams {
    QuadraticParams<Element> problem;
    // Of [B, H, N, D], in boxes of 64 columns of as many rows as a tile has.
    ptx::TensorMap q_map, k_map, v_map, d_out_map;
    // Of [B, H, N, 4], in boxes of whole rows.
    ptx::TensorMap factors_map;
    // Heads of the own side, over the batch, whose blocks are worked on together (schedule.sm90.cuh).
    int32_t section;
};

}  // namespace attn::quadratic
