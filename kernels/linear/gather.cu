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

// ⟨S, R⟩ + ⟨z, r⟩ at the end of a segment: what pairs of keys up to there and queries behind add to the gradient of a
// log-decay between them, in the place of the segment's log-decay. Block x counts segments, then state heads.
template <class Real>
DEVICE void log_anchors(const LinearParams& p) {
    int64_t slot = ptx::block_x() / p.segments * (p.segments + 1) + ptx::block_x() % p.segments;
    auto along = [&](const void* sums, const void* d_sums, int64_t count) {
        auto x = static_cast<const Real*>(sums) + (slot + 1) * count, d = static_cast<const Real*>(d_sums) + slot * count;
        double sum = 0.0;
        for (int64_t i = ptx::thread(); i < count; i += ptx::threads()) sum += double(x[i]) * double(d[i]);
        return sum;
    };
    double sum = along(p.segment_s, p.segment_d_s, int64_t(p.features) * p.value_width);
    sum = warp_sum(sum + along(p.segment_z, p.segment_d_z, p.features));
    double* parts = ptx::shared_memory<double>();
    if (ptx::lane() == 0) parts[ptx::warp()] = sum;
    ptx::barrier_sync();
    if (ptx::thread() != 0) return;
    for (int w = 1; w < warps(); ++w) sum += parts[w];
    static_cast<double*>(p.segment_log_decay)[slot] = sum;
}

// Gradient of the log-decay per token: the sum of `d_log` from each key to the end of its segment and what is left there,
// or to the next cut, behind which nobody sees what is before it, and what crosses the key inside its tile. 0 at a cut, and
// where the mask removes the key. One warp: a state head.
template <class Real>
DEVICE void d_log_decay(const LinearParams& p) {
    int64_t row = ptx::block_x() * warps() + ptx::warp();
    if (row >= p.batch * p.state_heads) return;
    Tiles<InShared<Real>> tiles(p);
    tiles.place.batch = row / p.state_heads, tiles.place.head = row % p.state_heads;
    auto d_log = static_cast<const double*>(p.d_log) + row * p.keys;
    auto crossing = p.crossing ? static_cast<const Real*>(p.crossing) + row * p.keys : nullptr;
    auto out = static_cast<Real*>(p.d_log_decay) + row * p.keys;
    for (int64_t segment = p.segments - 1; segment >= 0; --segment) {
        tiles.place.segment = segment;
        Range positions = tiles.place.positions(p);
        int64_t first = ptx::max(positions.start - p.first_key, int64_t(0));
        DoubledSum later{0.0, 0.0};
        if (p.segments > 1) later.high = static_cast<const double*>(p.segment_log_decay)[tiles.place.slot(p, segment)];
        for (int64_t end = ptx::min(positions.end - p.first_key, p.keys); end > first; end -= 32) {
            int64_t key = end - 1 - ptx::lane();
            bool is_there = key >= first, is_cut = is_there && cuts_off<Real>(tiles.log_decay(key));
            int cut = last_lane(is_cut);
            DoubledSum sum{is_there && !is_cut ? d_log[key] : 0.0, 0.0};
            for (int delta = 1; delta < 32; delta *= 2) {
                DoubledSum other{ptx::shuffle_up(sum.high, delta), ptx::shuffle_up(sum.low, delta)};
                if (ptx::lane() - delta >= ptx::max(cut, 0)) sum.add(other);
            }
            if (cut < 0) sum.add(later);
            double inside = crossing && is_there ? double(crossing[key]) : 0.0;
            if (is_there) out[key] = tiles.keeps(key) ? Real(sum.high + (sum.low + inside)) : Real(0);
            later = {ptx::shuffle(sum.high, 31), ptx::shuffle(sum.low, 31)};
        }
    }
}

ATTN_KERNEL(linear_gather_f32, gather_heads<float>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_f64, gather_heads<double>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_f16, gather_heads<ptx::f16>, GatherParams, kThreads)
ATTN_KERNEL(linear_gather_bf16, gather_heads<ptx::bf16>, GatherParams, kThreads)
ATTN_KERNEL(linear_log_anchors_f32, log_anchors<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_log_anchors_f64, log_anchors<double>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_log_decay_f32, d_log_decay<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_log_decay_f64, d_log_decay<double>, LinearParams, kThreads)

}  // namespace attn::linear
