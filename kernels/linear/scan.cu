// Sums of segments become what enters each segment, in place, and after the last of them, the sums of all.
//
// One thread: one number of S or z of a state head, over all segments. Blocks x: state heads × blocks of numbers.
#include "block.cuh"

namespace attn::linear {

// A number of S [D′, E] or z [D′], the latter counted on, in the workspaces of the segments.
template <class Real>
struct Number {
    const LinearParams& p;
    Real* all_s;
    Real* all_z;
    int64_t index, s_count;

    DEVICE Number(const LinearParams& p, void* s, void* z, int64_t index)
        : p(p),
          all_s(static_cast<Real*>(s)),
          all_z(static_cast<Real*>(z)),
          index(index),
          s_count(int64_t(p.features) * p.value_width) {}

    DEVICE bool exists() const { return index < s_count + p.features; }

    DEVICE Real& at(int64_t slot) const {
        return index < s_count ? all_s[slot * s_count + index] : all_z[slot * p.features + (index - s_count)];
    }

    // That of the state handed in.
    DEVICE Real initial(int64_t batch, int64_t head) const {
        if (!p.state_s) return Real(0);
        if (index < s_count) {
            int64_t f = index / p.value_width, c = index % p.value_width;
            const tile::Strides& strides = p.state_s_strides;
            int64_t at = batch * strides.batch + head * strides.head + f * strides.row + c;
            return static_cast<const Real*>(p.state_s)[at];
        }
        const tile::Strides& strides = p.state_z_strides;
        return static_cast<const Real*>(p.state_z)[batch * strides.batch + head * strides.head + (index - s_count)];
    }
};

template <class Real>
DEVICE Real initial_stabilizer(const LinearParams& p, int64_t batch, int64_t head) {
    if (!p.state_stabilizer) return negative_infinity<Real>();
    const tile::Strides& strides = p.state_stabilizer_strides;
    return static_cast<const Real*>(p.state_stabilizer)[batch * strides.batch + head * strides.head];
}

// What is left of sums relative to `old` once they are relative to `now`.
template <class Real>
DEVICE Real restabilize(Real old, Real now) {
    return old == now ? Real(1) : ptx::exp(old - now);
}

// Block x counts blocks of numbers first.
struct ScanPlace {
    int64_t batch, head, state_head, index;

    DEVICE explicit ScanPlace(const LinearParams& p) {
        int64_t numbers = int64_t(p.features) * (p.value_width + 1);
        int64_t blocks = (numbers + kThreads - 1) / kThreads;
        state_head = ptx::block_x() / blocks;
        batch = state_head / p.state_heads, head = state_head % p.state_heads;
        index = ptx::block_x() % blocks * kThreads + ptx::thread();
    }
};

// From the first segment to the last, starting with the state handed in.
template <class Element>
DEVICE void scan(const LinearParams& p) {
    using Real = typename Arithmetic<Element>::Real;
    ScanPlace place(p);
    Number<Real> number(p, p.segment_s, p.segment_z, place.index);
    if (!number.exists()) return;
    auto own = static_cast<const Real*>(p.segment_stabilizer);
    auto entering = static_cast<Real*>(p.entering_stabilizer);
    auto log_decays = static_cast<const double*>(p.segment_log_decay);
    Real carried = number.initial(place.batch, place.head);
    Real stabilizer = initial_stabilizer<Real>(p, place.batch, place.head);
    int64_t first = place.state_head * (p.segments + 1), end = first + p.segments;
    for (int64_t slot = first; slot < end; ++slot) {
        if (place.index == 0) entering[slot] = stabilizer;
        Real sum = number.at(slot), now = ptx::max(stabilizer, own[slot]);
        number.at(slot) = carried;
        Real left = restabilize(stabilizer, now) * ptx::exp(Real(log_decays[slot]));
        carried = carried * left + sum * restabilize(own[slot], now);
        stabilizer = now;
    }
    number.at(end) = carried;
    if (place.index == 0) entering[end] = stabilizer;
}

// Gradients of S and z, from the last segment to the first.
template <class Element>
DEVICE void d_scan(const LinearParams& p) {
    using Real = typename Arithmetic<Element>::Real;
    ScanPlace place(p);
    Number<Real> number(p, p.segment_d_s, p.segment_d_z, place.index);
    if (!number.exists()) return;
    auto entering = static_cast<const Real*>(p.entering_stabilizer);
    auto log_decays = static_cast<const double*>(p.segment_log_decay);
    Real carried = Real(0);
    int64_t first = place.state_head * (p.segments + 1), end = first + p.segments;
    for (int64_t slot = end - 1; slot >= first; --slot) {
        Real sum = number.at(slot), before = entering[slot];
        number.at(slot) = carried;
        double log_decay = log_decays[slot];
        if (before > negative_infinity<Real>()) log_decay += double(before - entering[slot + 1]);
        carried = carried * (is_full(p) ? Real(1) : ptx::exp(Real(log_decay))) + sum;
    }
    number.at(end) = carried;
}

ATTN_KERNEL(linear_scan_f32, scan<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_scan_f64, scan<double>, LinearParams, kThreads)
ATTN_KERNEL(linear_scan_f16, scan<ptx::f16>, LinearParams, kThreads)
ATTN_KERNEL(linear_scan_bf16, scan<ptx::bf16>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_scan_f32, d_scan<float>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_scan_f64, d_scan<double>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_scan_f16, d_scan<ptx::f16>, LinearParams, kThreads)
ATTN_KERNEL(linear_d_scan_bf16, d_scan<ptx::bf16>, LinearParams, kThreads)

}  // namespace attn::linear
