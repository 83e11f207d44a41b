// The random directions as tiles: ω·D^{-1/4}, rows of `width_row` numbers, with zeros up to whole blocks of 32 × 32.
#include "block.cuh"

namespace attn::linear {

template <class Element>
DEVICE void directions(const LinearParams& p) {
    using Real = typename Arithmetic<Element>::Real;
    auto omega = static_cast<const Real*>(p.omega);
    Real factor = Real(1) / ptx::sqrt(ptx::sqrt(Real(p.width)));
    int64_t count = int64_t(p.directions_count + kTile - 1) / kTile * kTile * p.width_row;
    int64_t step = ptx::blocks_x() * kThreads;
    for (int64_t index = ptx::block_x() * kThreads + ptx::thread(); index < count; index += step) {
        int64_t row = index / p.width_row, column = index % p.width_row;
        bool is_inside = row < p.directions_count && column < p.width;
        static_cast<Real*>(p.directions)[index] = is_inside ? omega[row * p.omega_stride + column] * factor : Real(0);
    }
}

ATTN_KERNEL(linear_directions_f32, directions<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_directions_f64, directions<double>, LinearParams, kThreads)
ATTN_KERNEL(linear_directions_f16, directions<ptx::f16>, LinearParams, kThreads)
ATTN_KERNEL(linear_directions_bf16, directions<ptx::bf16>, LinearParams, kThreads)

}  // namespace attn::linear
