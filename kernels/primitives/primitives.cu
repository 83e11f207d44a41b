// One kernel per function of kernels/ptx, to check its meaning on the emulator and on a GPU from the same source.
// Each comment gives what a thread reads of `input` and writes to `output`; i is the thread's number in the grid.
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/element.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/vector.cuh"

namespace attn::primitives {

using namespace ptx;

struct Params {
    const void* input;
    void* output;
};

template <class T>
DEVICE const T* input(const Params& params) {
    return static_cast<const T*>(params.input);
}

template <class T>
DEVICE T* output(const Params& params) {
    return static_cast<T*>(params.output);
}

DEVICE int64_t index() { return block_x() * threads() + thread(); }

// float[i] → E[i]
template <class E>
DEVICE void narrow(const Params& params) {
    output<E>(params)[index()] = from_float<E>(input<float>(params)[index()]);
}

// E[i] → float[i]
template <class E>
DEVICE void widen(const Params& params) {
    output<float>(params)[index()] = to_float(input<E>(params)[index()]);
}

// E[i] → double[i]
template <class E>
DEVICE void widen_to_double(const Params& params) {
    output<double>(params)[index()] = to_double(input<E>(params)[index()]);
}

// double[i] → float[i]
DEVICE void narrow_double(const Params& params) {
    output<float>(params)[index()] = from_double<float>(input<double>(params)[index()]);
}

// float[2i], float[2i + 1] → pair[i], low half first
template <class E>
DEVICE void pack_pair(const Params& params) {
    const float* values = input<float>(params) + 2 * index();
    output<uint32_t>(params)[index()] = pack<E>(values[0], values[1]);
}

// pair[i] → float[2i], float[2i + 1]
template <class E>
DEVICE void unpack_pair(const Params& params) {
    float* values = output<float>(params) + 2 * index();
    unpack<E>(input<uint32_t>(params)[index()], values[0], values[1]);
}

// float[i] → float[i]
DEVICE void to_tf32(const Params& params) {
    output<float>(params)[index()] = round_to_tf32(input<float>(params)[index()]);
}

// → int64[10 j], with j counting threads, then blocks along x, y and z
DEVICE void indices(const Params& params) {
    int64_t block = block_x() + blocks_x() * (block_y() + blocks_y() * block_z());
    int64_t* values = output<int64_t>(params) + 10 * (block * threads() + thread());
    int64_t all[10] = {thread(),  lane(),    warp(),     threads(),  block_x(),
                       block_y(), block_z(), blocks_x(), blocks_y(), blocks_z()};
    for (int j = 0; j < 10; ++j) values[j] = all[j];
}

// → int[i] = threads - 1 - thread, through 4 bytes of shared memory per thread
DEVICE void block_barrier(const Params& params) {
    int* shared = shared_memory<int>();
    shared[thread()] = thread();
    barrier_sync();
    output<int>(params)[index()] = shared[threads() - 1 - thread()];
}

// The same within halves of the block, the first of which uses its barrier twice.
DEVICE void named_barrier(const Params& params) {
    int half = threads() / 2, first = thread() / half * half;
    int* shared = shared_memory<int>() + first;
    if (first == 0) barrier_sync(1, half);
    shared[thread() - first] = thread();
    barrier_sync(first == 0 ? 1 : 2, half);
    output<int>(params)[index()] = shared[half - 1 - (thread() - first)];
}

// The same within warps.
DEVICE void warp_barrier(const Params& params) {
    int* shared = shared_memory<int>() + 32 * warp();
    shared[lane()] = thread();
    warp_sync();
    output<int>(params)[index()] = shared[31 - lane()];
}

// T[i] → T[j · threads + i]: for j < 6 from lane ^ (1, 2, 4, 8, 16, 31)[j]
template <class T>
DEVICE void exchange_xor(const Params& params) {
    const int masks[6] = {1, 2, 4, 8, 16, 31};
    for (int j = 0; j < 6; ++j) {
        output<T>(params)[j * threads() + thread()] = shuffle_xor(input<T>(params)[thread()], masks[j]);
    }
}

// T[i] → T[j · threads + i]: for j < 32 from lane (lane · j + j) mod 32
template <class T>
DEVICE void exchange(const Params& params) {
    for (int j = 0; j < 32; ++j) {
        output<T>(params)[j * threads() + thread()] = shuffle(input<T>(params)[thread()], (lane() * j + j) % 32);
    }
}

// T[i] → T[j · threads + i]: for j < 32 from lane - j
template <class T>
DEVICE void exchange_up(const Params& params) {
    for (int j = 0; j < 32; ++j) {
        output<T>(params)[j * threads() + thread()] = shuffle_up(input<T>(params)[thread()], j);
    }
}

// 16 bytes[i], 16 bytes[threads + i] → 16 bytes[threads - 1 - i] of both, zero where i mod 3 = 0 (first) or 1 (second);
// in two groups of copies, the first read while the second may be in flight. Shared: 32 bytes per thread.
DEVICE void copy(const Params& params) {
    using Chunk = Vector<uint32_t, 4>;
    Chunk* shared = shared_memory<Chunk>();
    const Chunk* source = input<Chunk>(params);
    Chunk* target = output<Chunk>(params);
    cp_async_16(shared + thread(), source + thread(), thread() % 3 != 0);
    cp_async_commit();
    cp_async_16(shared + threads() + thread(), source + threads() + thread(), thread() % 3 != 1);
    cp_async_commit();
    cp_async_wait<1>();
    barrier_sync();
    target[threads() - 1 - thread()] = shared[thread()];
    cp_async_wait<0>();
    barrier_sync();
    target[2 * threads() - 1 - thread()] = shared[threads() + thread()];
}

// One warp. 32 rows of 16 bytes; lane l passes the address of row 5l mod 32 → registers[l][count]
template <int count, bool transpose>
DEVICE void load_matrix(const Params& params) {
    uint32_t* shared = shared_memory<uint32_t>();
    for (int j = 0; j < 4; ++j) shared[32 * j + lane()] = input<uint32_t>(params)[32 * j + lane()];
    warp_sync();
    const uint32_t* row = shared + lane() * 5 % 32 * 4;
    uint32_t registers[count];
    if constexpr (count == 4 && transpose) ldmatrix_x4_trans(registers, row);
    if constexpr (count == 4 && !transpose) ldmatrix_x4(registers, row);
    if constexpr (count == 2 && transpose) ldmatrix_x2_trans(registers, row);
    if constexpr (count == 2 && !transpose) ldmatrix_x2(registers, row);
    for (int j = 0; j < count; ++j) output<uint32_t>(params)[lane() * count + j] = registers[j];
}

// One warp. registers[l] = {a[4], b[2], d[4]} of 4 bytes each → d[l]
template <class Multiply>
DEVICE void multiply(const Params& params) {
    uint32_t a[4], b[2];
    float d[4];
    const uint32_t* registers = input<uint32_t>(params) + 10 * lane();
    for (int j = 0; j < 4; ++j) a[j] = registers[j];
    for (int j = 0; j < 2; ++j) b[j] = registers[4 + j];
    for (int j = 0; j < 4; ++j) d[j] = bit_cast<float>(registers[6 + j]);
    Multiply::run(d, a, b);
    for (int j = 0; j < 4; ++j) output<float>(params)[4 * lane() + j] = d[j];
}

template <class E>
struct Mma16Bit {
    static DEVICE void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_m16n8k16(E{}, d, a, b);
    }
};

struct MmaTf32 {
    static DEVICE void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k8_tf32(d, a, b); }
};

// One warp. doubles[l] = {a, b, d[2]} → d[l]
DEVICE void multiply_f64(const Params& params) {
    const double* values = input<double>(params) + 4 * lane();
    double d[2] = {values[2], values[3]};
    mma_m8n8k4_f64(d, values[0], values[1]);
    for (int j = 0; j < 2; ++j) output<double>(params)[2 * lane() + j] = d[j];
}

// T[3i], T[3i + 1], T[3i + 2] → T[12 i + …] of x, then of all three
template <class T>
DEVICE void elementary(const Params& params) {
    const T* values = input<T>(params) + 3 * index();
    T x = values[0], y = values[1], z = values[2];
    T all[12] = {exp2(x),  log2(x), exp(x),        log(x),    tanh(x),   sqrt(x),
                 rsqrt(x), abs(x),  reciprocal(x), max(x, y), min(x, y), fma(x, y, z)};
    for (int j = 0; j < 12; ++j) output<T>(params)[12 * index() + j] = all[j];
}

// N uint32[i] → the same, by load_vector and store_vector
template <int N>
DEVICE void move_vector(const Params& params) {
    store_vector(output<uint32_t>(params) + N * index(),
                 load_vector<uint32_t, N>(input<uint32_t>(params) + N * index()));
}

// N uint32[i] → the same, by load_constant and store_vector
template <int N>
DEVICE void move_constant(const Params& params) {
    store_vector(output<uint32_t>(params) + N * index(),
                 load_constant<uint32_t, N>(input<uint32_t>(params) + N * index()));
}

ATTN_KERNEL(primitive_from_float_f16, narrow<f16>, Params, 128)
ATTN_KERNEL(primitive_from_float_bf16, narrow<bf16>, Params, 128)
ATTN_KERNEL(primitive_to_float_f16, widen<f16>, Params, 128)
ATTN_KERNEL(primitive_to_float_bf16, widen<bf16>, Params, 128)
ATTN_KERNEL(primitive_to_double_f16, widen_to_double<f16>, Params, 128)
ATTN_KERNEL(primitive_to_double_float, widen_to_double<float>, Params, 128)
ATTN_KERNEL(primitive_from_double, narrow_double, Params, 128)
ATTN_KERNEL(primitive_pack_f16, pack_pair<f16>, Params, 128)
ATTN_KERNEL(primitive_pack_bf16, pack_pair<bf16>, Params, 128)
ATTN_KERNEL(primitive_unpack_f16, unpack_pair<f16>, Params, 128)
ATTN_KERNEL(primitive_unpack_bf16, unpack_pair<bf16>, Params, 128)
ATTN_KERNEL(primitive_round_to_tf32, to_tf32, Params, 128)
ATTN_KERNEL(primitive_index, indices, Params, 96)
ATTN_KERNEL(primitive_barrier_sync, block_barrier, Params, 256)
ATTN_KERNEL(primitive_barrier_sync_named, named_barrier, Params, 256)
ATTN_KERNEL(primitive_warp_sync, warp_barrier, Params, 256)
ATTN_KERNEL(primitive_shuffle_xor_float, exchange_xor<float>, Params, 64)
ATTN_KERNEL(primitive_shuffle_xor_double, exchange_xor<double>, Params, 64)
ATTN_KERNEL(primitive_shuffle_xor_int, exchange_xor<int>, Params, 64)
ATTN_KERNEL(primitive_shuffle_xor_uint32, exchange_xor<uint32_t>, Params, 64)
ATTN_KERNEL(primitive_shuffle_float, exchange<float>, Params, 64)
ATTN_KERNEL(primitive_shuffle_double, exchange<double>, Params, 64)
ATTN_KERNEL(primitive_shuffle_int, exchange<int>, Params, 64)
ATTN_KERNEL(primitive_shuffle_uint32, exchange<uint32_t>, Params, 64)
ATTN_KERNEL(primitive_shuffle_up_float, exchange_up<float>, Params, 64)
ATTN_KERNEL(primitive_shuffle_up_double, exchange_up<double>, Params, 64)
ATTN_KERNEL(primitive_shuffle_up_int, exchange_up<int>, Params, 64)
ATTN_KERNEL(primitive_shuffle_up_uint32, exchange_up<uint32_t>, Params, 64)
ATTN_KERNEL(primitive_cp_async, copy, Params, 128)
ATTN_KERNEL(primitive_ldmatrix_x4, load_matrix<4, false>, Params, 32)
ATTN_KERNEL(primitive_ldmatrix_x4_trans, load_matrix<4, true>, Params, 32)
ATTN_KERNEL(primitive_ldmatrix_x2, load_matrix<2, false>, Params, 32)
ATTN_KERNEL(primitive_ldmatrix_x2_trans, load_matrix<2, true>, Params, 32)
ATTN_KERNEL(primitive_mma_f16, multiply<Mma16Bit<f16>>, Params, 32)
ATTN_KERNEL(primitive_mma_bf16, multiply<Mma16Bit<bf16>>, Params, 32)
ATTN_KERNEL(primitive_mma_tf32, multiply<MmaTf32>, Params, 32)
ATTN_KERNEL(primitive_mma_f64, multiply_f64, Params, 32)
ATTN_KERNEL(primitive_math_float, elementary<float>, Params, 128)
ATTN_KERNEL(primitive_math_double, elementary<double>, Params, 128)
ATTN_KERNEL(primitive_vector_4, move_vector<1>, Params, 128)
ATTN_KERNEL(primitive_vector_8, move_vector<2>, Params, 128)
ATTN_KERNEL(primitive_vector_16, move_vector<4>, Params, 128)
ATTN_KERNEL(primitive_load_constant_4, move_constant<1>, Params, 128)
ATTN_KERNEL(primitive_load_constant_8, move_constant<2>, Params, 128)
ATTN_KERNEL(primitive_load_constant_16, move_constant<4>, Params, 128)

}  // namespace attn::primitives
