// Sums that follow the sweeps of the backward pass, always in the same order.
#include "block.cuh"

namespace attn::linear {

// Gradients of heads that share an operand: out[g, i] = Σ_j parts[g, j, i].
struct GatherParams {
    const void* parts;
    void* out;
    int64_t groups;
    int64_t parts_per_group;
    int64_t count;
};

template <class Element>
DEVICE void gather_heads(const GatherParams& p) {
    using Real = typename Arithmetic<Element>::Real;
    int64_t step = ptx::blocks_x() * kThreads;
    for (int64_t index = ptx::block_x() * kThreads + ptx::thread(); index < p.groups * p.count; index += step) {
        int64_t group = index / p.count, i = index % p.count;
        auto parts = static_cast<const Real*>(p.parts) + group * p.parts_per_group * p.count + i;
        Real sum = Real(0);
        for (int64_t j = 0; j < p.parts_per_group; ++j) sum += parts[j * p.count];
        static_cast<Element*>(p.out)[index] = tile::narrow<Element>(sum);
    }
}

// Gradient of the log-decay per token: the sum of `d_log` from each key to the last. One warp: a state head.
template <class Real>
DEVICE void d_log_decay(const LinearParams& p) {
    int64_t row = ptx::block_x() * warps() + ptx::warp();
    if (row >= p.batch * p.state_heads) return;
    auto d_log = static_cast<const double*>(p.d_log) + row * p.keys;
    auto out = static_cast<Real*>(p.d_log_decay) + row * p.keys;
    double later = 0.0;
    for (int64_t end = p.keys; end > 0; end -= 32) {
        int64_t key = end - 1 - ptx::lane();
        double sum = key >= 0 ? d_log[key] : 0.0;
        for (int delta = 1; delta < 32; delta *= 2) {
            double other = ptx::shuffle_up(sum, delta);
            if (ptx::lane() >= delta) sum += other;
        }
        if (key >= 0) out[key] = Real(later + sum);
        later += ptx::shuffle(sum, 31);
    }
}

ATTN_KERNEL(linear_gather_f32, gather_heads<float>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_f64, gather_heads<double>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_f16, gather_heads<ptx::f16>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_bf16, gather_heads<ptx::bf16>, GatherParams, kThreads)
ATTN_KERNEL(linear_d_log_decay_f32, d_log_decay<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_log_decay_f64, d_log_decay<double>, LinearParams, kThreads)

}  // namespace attn::linear
