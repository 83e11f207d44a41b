// As primitives.cu, for the instructions of sm_90a.
#include "ptx/barrier.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"

namespace attn::primitives {

using namespace ptx;

struct Params {
    const void* input;
    void* output;
};

struct MappedParams {
    TensorMap map;
    const void* input;
    void* output;
};

template <class T, class P>
DEVICE const T* input(const P& params) {
    return static_cast<const T*>(params.input);
}

template <class T, class P>
DEVICE T* output(const P& params) {
    return static_cast<T*>(params.output);
}

DEVICE void initialise(Mbarrier* barrier, int arrivals) {
    if (thread() == 0) {
        mbarrier_init(barrier, arrivals);
        fence_mbarrier_init();
    }
    barrier_sync();
}

// → int[j · threads + i] = (threads - 1 - i) (j + 1) for phases j < 3, through 4 bytes of shared memory per thread behind
// the barrier's 128
DEVICE void phases(const Params& params) {
    Mbarrier* barrier = shared_memory<Mbarrier>();
    int* shared = shared_memory<int>() + 32;
    initialise(barrier, threads());
    for (int phase = 0; phase < 3; ++phase) {
        shared[thread()] = thread() * (phase + 1);
        mbarrier_arrive(barrier);
        while (!mbarrier_try_wait_parity(barrier, phase % 2)) continue;
        output<int>(params)[phase * threads() + thread()] = shared[threads() - 1 - thread()];
        barrier_sync();
    }
}

// → int[i] = i for the second half of the threads, what the first half wrote to shared memory
DEVICE void arrival(const Params& params) {
    int half = threads() / 2, i = thread() % half;
    if (thread() < half) {
        shared_memory<int>()[i] = i;
        barrier_arrive(1, threads());
    } else {
        barrier_sync(1, threads());
        output<int>(params)[i] = shared_memory<int>()[half - 1 - i];
    }
}

// → int[i] = 1 in one lane of each warp
DEVICE void election(const Params& params) {
    int* shared = shared_memory<int>() + warp();
    if (lane() == 0) *shared = 0;
    warp_sync();
    bool is_elected = elect();
    if (is_elected) *shared = *shared + 1;
    warp_sync();
    output<int>(params)[thread()] = *shared;
}

// Three warpgroups, the first of which gives registers to the others → int[i] = i
DEVICE void redistribution(const Params& params) {
    if (warpgroup() == 0) {
        setmaxnreg_dec<24>();
        output<int>(params)[thread()] = thread();
    } else {
        setmaxnreg_inc<240>();
        output<int>(params)[thread()] = thread();
    }
}

// One warp. registers[l][4] → 32 rows of 16 bytes; lane l passes the address of row 5l mod 32
template <bool transpose>
DEVICE void store_matrix(const Params& params) {
    uint32_t* shared = shared_memory<uint32_t>();
    uint32_t registers[4];
    for (int j = 0; j < 4; ++j) registers[j] = input<uint32_t>(params)[lane() * 4 + j];
    uint32_t* row = shared + lane() * 5 % 32 * 4;
    if constexpr (transpose) stmatrix_x4_trans(row, registers);
    if constexpr (!transpose) stmatrix_x4(row, registers);
    warp_sync();
    for (int j = 0; j < 4; ++j) output<uint32_t>(params)[32 * j + lane()] = shared[32 * j + lane()];
}

// Copies of boxes of 64×16×2×1 16-bit elements at int[4 j], j < boxes, of the tensor → shared memory after each copy.
template <int boxes>
DEVICE void load_boxes(const MappedParams& params) {
    constexpr int kBytes = 64 * 16 * 2 * 2;
    char* shared = shared_memory<char>();
    Mbarrier* barrier = reinterpret_cast<Mbarrier*>(shared + kBytes);
    initialise(barrier, 1);
    for (int box = 0; box < boxes; ++box) {
        if (thread() == 0) {
            int at[4];
            for (int i = 0; i < 4; ++i) at[i] = input<int>(params)[4 * box + i];
            mbarrier_arrive_expect_tx(barrier, kBytes);
            tensor_load(shared, params.map, barrier, at);
        }
        while (!mbarrier_try_wait_parity(barrier, box % 2)) continue;
        for (int i = thread(); i < kBytes / 4; i += threads()) {
            output<uint32_t>(params)[box * kBytes / 4 + i] = reinterpret_cast<uint32_t*>(shared)[i];
        }
        barrier_sync();
    }
}

// What shared memory is to hold, from `bytes` on to the end of `count` bytes.
DEVICE void fill(const Params& params, int count) {
    for (int i = thread(); i < count / 4; i += threads()) {
        shared_memory<uint32_t>()[i] = input<uint32_t>(params)[i];
    }
    fence_proxy_async();
    barrier_sync();
}

template <int Count>
DEVICE void initial_sums(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) d[i] = float(thread() % 7 - i % 5);
}

template <int Count>
DEVICE void finish(const Params& params, float (&d)[Count]) {
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_registers(d);
#pragma unroll
    for (int i = 0; i < Count; ++i) output<float>(params)[thread() * Count + i] = d[i];
}

// Bytes from the descriptor of one k16 step to the next.
DEVICE constexpr int step_of(Major major) { return major == Major::inner ? 32 : 2048; }

// A warpgroup. Bytes of shared memory: a 64×64, then b 64×N → d[i] += a b over four steps, of thread[N/2]
template <class E, Major a_major, Major b_major, int N>
DEVICE void multiply_shared(const Params& params) {
    constexpr int kA = 64 * 64 * 2, kB = (N + 63) / 64 * 64 * 64 * 2;
    char* shared = shared_memory<char>();
    fill(params, kA + kB);
    float d[N / 2];
    initial_sums(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint64_t a = matrix_descriptor(shared + k * step_of(a_major), 1024, 8192);
        uint64_t b = matrix_descriptor(shared + kA + k * step_of(b_major), 1024, 8192);
        wgmma_m64k16<E, a_major, b_major>(d, a, b, true);
    }
    finish(params, d);
}

// The same with a behind b, as registers[step][thread][4]; the first step does not accumulate.
template <class E, Major b_major, int N>
DEVICE void multiply_registers(const Params& params) {
    constexpr int kB = (N + 63) / 64 * 64 * 64 * 2;
    fill(params, kB);
    uint32_t a[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        a[i / 4][i % 4] = input<uint32_t>(params)[kB / 4 + (i / 4 * 128 + thread()) * 4 + i % 4];
    }
    float d[N / 2];
    initial_sums(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint64_t b = matrix_descriptor(shared_memory<char>() + k * step_of(b_major), 1024, 8192);
        wgmma_m64k16<E, b_major>(d, a[k], b, k > 0);
    }
    finish(params, d);
}

constexpr Major inner = Major::inner, outer = Major::outer;

ATTN_KERNEL(primitive_mbarrier, phases, Params, 256)
ATTN_KERNEL(primitive_barrier_arrive, arrival, Params, 256)
ATTN_KERNEL(primitive_elect, election, Params, 128)
ATTN_KERNEL(primitive_setmaxnreg, redistribution, Params, 384)
ATTN_KERNEL(primitive_stmatrix_x4, store_matrix<false>, Params, 32)
ATTN_KERNEL(primitive_stmatrix_x4_trans, store_matrix<true>, Params, 32)
ATTN_KERNEL(primitive_tensor_load, load_boxes<6>, MappedParams, 128)
ATTN_KERNEL(primitive_wgmma_bf16_inner_inner_64, multiply_shared<bf16, inner, inner, 64>, Params, 128)
ATTN_KERNEL(primitive_wgmma_f16_inner_outer_128, multiply_shared<f16, inner, outer, 128>, Params, 128)
ATTN_KERNEL(primitive_wgmma_bf16_outer_outer_192, multiply_shared<bf16, outer, outer, 192>, Params, 128)
ATTN_KERNEL(primitive_wgmma_f16_outer_inner_80, multiply_shared<f16, outer, inner, 80>, Params, 128)
ATTN_KERNEL(primitive_wgmma_bf16_registers_outer_64, multiply_registers<bf16, outer, 64>, Params, 128)
ATTN_KERNEL(primitive_wgmma_f16_registers_outer_256, multiply_registers<f16, outer, 256>, Params, 128)
ATTN_KERNEL(primitive_wgmma_bf16_registers_inner_176, multiply_registers<bf16, inner, 176>, Params, 128)

}  // namespace attn::primitives
