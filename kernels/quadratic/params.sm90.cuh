// What kernels with tensor copies are given besides the parameters of the engine; its twin is in src/gpu/quadratic.
#pragma once

#include "../ptx/tensor_copy.cuh"
#include "params.cuh"

namespace attn::quadratic {

template <class Element>
struct QuadraticMappedParams {
    QuadraticParams<Element> problem;
    // Of [B, H, N, D], in boxes of 64 columns of as many rows as a tile has.
    ptx::TensorMap q_map, k_map, v_map;
};

// For the backward pass. A kernel's own side comes in boxes of as many rows as a block has.
template <class Element>
struct QuadraticMappedGradientParams {
    QuadraticParams<Element> problem;
    ptx::TensorMap q_map, k_map, v_map, d_out_map;
};

}  // namespace attn::quadratic
