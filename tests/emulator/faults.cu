// Small kernels with a planted fault each, or none, for the checks of the emulator.
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"

namespace attn::faults {

using namespace ptx;

struct Params {
    const float* input;  // 4 per thread of a block
    float* output;       // 1 per thread of two blocks
    int64_t count;       // 0, or how often to do something
};

DEVICE int64_t index() { return block_x() * threads() + thread(); }

// A thread's neighbour's number through shared memory; sound with the barrier.
template <bool has_barrier>
DEVICE void reversed(const Params& params) {
    float* shared = shared_memory<float>();
    shared[thread()] = float(thread());
    if (has_barrier) barrier_sync();
    params.output[index()] = shared[threads() - 1 - thread()];
}

// The same within a warp.
template <bool has_barrier>
DEVICE void reversed_in_warp(const Params& params) {
    float* shared = shared_memory<float>() + 32 * warp();
    shared[lane()] = float(lane());
    if (has_barrier) warp_sync();
    shuffle_xor(0, 1);
    params.output[index()] = shared[31 - lane()];
}

// Shared memory used again: without the barrier at a step's end a fast warp overwrites what a slow one still reads.
template <bool has_barrier>
DEVICE void reused(const Params& params) {
    float* shared = shared_memory<float>();
    float sum = 0;
    for (int step = 0; step < 3; ++step) {
        shared[thread()] = float(step);
        barrier_sync();
        sum += shared[threads() - 1 - thread()];
        if (has_barrier) barrier_sync();
    }
    params.output[index()] = sum;
}

template <bool has_wait>
DEVICE void copied(const Params& params) {
    float* shared = shared_memory<float>();
    cp_async_16(shared + 4 * thread(), params.input + 4 * thread(), true);
    cp_async_commit();
    if (has_wait) cp_async_wait<0>();
    barrier_sync();
    params.output[index()] = shared[4 * (threads() - 1 - thread())];
    cp_async_wait<0>();
}

// A copy into what other threads may still be reading.
template <bool has_barrier>
DEVICE void refilled(const Params& params) {
    float* shared = shared_memory<float>();
    shared[thread()] = 0;
    barrier_sync();
    float value = shared[threads() - 1 - thread()];
    if (has_barrier) barrier_sync();
    if (thread() < threads() / 4) cp_async_16(shared + 4 * thread(), params.input + 4 * thread(), true);
    cp_async_commit();
    cp_async_wait<0>();
    params.output[index()] = value;
}

// A matrix read by a warp whose lanes wrote it.
template <bool has_barrier>
DEVICE void written_matrix(const Params& params) {
    uint32_t* shared = shared_memory<uint32_t>() + 128 * warp();
    for (int i = 0; i < 4; ++i) shared[32 * i + lane()] = 0;
    if (has_barrier) warp_sync();
    uint32_t registers[4];
    ldmatrix_x4(registers, shared + 4 * lane());
    params.output[index()] = bit_cast<float>(registers[3]);
}

DEVICE void left_in_flight(const Params& params) {
    cp_async_16(shared_memory<float>() + 4 * thread(), params.input + 4 * thread(), true);
}

DEVICE void copied_outside(const Params& params) {
    cp_async_16(shared_memory<float>() + 4 * thread() + 4, params.input + 4 * thread(), true);
    cp_async_commit();
    cp_async_wait<0>();
}

DEVICE void divergent(const Params& params) {
    if (lane() < 16) {
        params.output[index()] = shuffle_xor(1.0f, 1);
    } else {
        warp_sync();
    }
}

DEVICE void deadlocked(const Params&) {
    if (warp() != 1) barrier_sync();
}

DEVICE void disagreeing_barrier(const Params&) { barrier_sync(1, warp() == 0 ? 64 : 128); }

DEVICE void shared_overrun(const Params& params) {
    shared_memory<float>()[thread() + 4 * threads() - params.count] = 1;
}

DEVICE void global_overrun(const Params& params) { params.output[index() == 255 ? 256 : index()] = 1; }

// Two blocks write the same place.
DEVICE void shared_output(const Params& params) { params.output[thread() ^ int(block_x())] = 1; }

DEVICE void null_access(const Params& params) { params.output[index()] = *reinterpret_cast<float*>(params.count); }

// Work for measurements of speed.
DEVICE void products(const Params& params) {
    uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}, b[2] = {0x3c003c00, 0x3c003c00};
    float d[4] = {};
    for (int64_t i = 0; i < params.count; ++i) mma_m16n8k16(f16{}, d, a, b);
    params.output[index()] = d[0];
}

DEVICE void shuffles(const Params& params) {
    float value = float(lane());
    for (int64_t i = 0; i < params.count; ++i) value = shuffle_xor(value, 1);
    params.output[index()] = value;
}

ATTN_KERNEL(sound_barrier, reversed<true>, Params, 128)
ATTN_KERNEL(sound_warp_sync, reversed_in_warp<true>, Params, 128)
ATTN_KERNEL(sound_reuse, reused<true>, Params, 128)
ATTN_KERNEL(sound_copy, copied<true>, Params, 128)
ATTN_KERNEL(sound_shuffles, shuffles, Params, 128)
ATTN_KERNEL(sound_products, products, Params, 128)
ATTN_KERNEL(fault_barrier, reversed<false>, Params, 128)
ATTN_KERNEL(fault_warp_sync, reversed_in_warp<false>, Params, 128)
ATTN_KERNEL(fault_reuse, reused<false>, Params, 128)
ATTN_KERNEL(fault_wait, copied<false>, Params, 128)
ATTN_KERNEL(sound_refill, refilled<true>, Params, 128)
ATTN_KERNEL(fault_refill, refilled<false>, Params, 128)
ATTN_KERNEL(sound_matrix, written_matrix<true>, Params, 128)
ATTN_KERNEL(fault_matrix, written_matrix<false>, Params, 128)
ATTN_KERNEL(fault_in_flight, left_in_flight, Params, 128)
ATTN_KERNEL(fault_copy_outside, copied_outside, Params, 128)
ATTN_KERNEL(fault_divergence, divergent, Params, 128)
ATTN_KERNEL(fault_deadlock, deadlocked, Params, 128)
ATTN_KERNEL(fault_barrier_count, disagreeing_barrier, Params, 128)
ATTN_KERNEL(fault_shared_overrun, shared_overrun, Params, 128)
ATTN_KERNEL(fault_global_overrun, global_overrun, Params, 128)
ATTN_KERNEL(fault_blocks, shared_output, Params, 128)
ATTN_KERNEL(fault_null, null_access, Params, 128)

}  // namespace attn::faults
