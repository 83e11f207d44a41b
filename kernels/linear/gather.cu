// Sums that follow the sweeps of the backward pass, always in the same order.
#include "tiles.cuh"

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

// Gradient of the log-decay per token: the sum of `d_log` from each key to the last before the next cut, behind which
// nobody sees what is before it. 0 at a cut, and where the mask removes the key. One warp: a state head.
template <class Real>
DEVICE void d_log_decay(const LinearParams& p) {
    int64_t row = ptx::block_x() * warps() + ptx::warp();
    if (row >= p.batch * p.state_heads) return;
    Tiles<Real> tiles(p);
    tiles.place.batch = row / p.state_heads, tiles.place.head = row % p.state_heads;
    auto d_log = static_cast<const double*>(p.d_log) + row * p.keys;
    auto out = static_cast<Real*>(p.d_log_decay) + row * p.keys;
    double later = 0.0;
    for (int64_t end = p.keys; end > 0; end -= 32) {
        int64_t key = end - 1 - ptx::lane();
        bool is_cut = key >= 0 && cuts_off<Real>(tiles.log_decay(key));
        int cut = last_lane(is_cut);
        double sum = key >= 0 && !is_cut ? d_log[key] : 0.0;
        for (int delta = 1; delta < 32; delta *= 2) {
            double other = ptx::shuffle_up(sum, delta);
            if (ptx::lane() - delta >= ptx::max(cut, 0)) sum += other;
        }
        if (cut < 0) sum += later;
        if (key >= 0) out[key] = tiles.keeps(key) ? Real(sum) : Real(0);
        later = ptx::shuffle(sum, 31);
    }
}

ATTN_KERNEL(linear_gather_f32, gather_heads<float>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_f64, gather_heads<double>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_f16, gather_heads<ptx::f16>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_bf16, gather_heads<ptx::bf16>, GatherParams, kThreads)
ATTN_KERNEL(linear_d_log_decay_f32, d_log_decay<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_log_decay_f64, d_log_decay<double>, LinearParams, kThreads)

}  // namespace attn::linear
