// What kernels/ptx calls in place of instructions. Everything here acts for the CUDA thread that is running.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// A kernel instance; constructing it enters it in the table of kernels().
struct Kernel {
    const char* name;
    void (*run)(const void* params);
    size_t params_size;
    int threads;

    Kernel(const char* name, void (*run)(const void*), size_t params_size, int threads);
};

// The running thread's place.
struct Here {
    int thread, threads;
    uint32_t block[3], blocks[3];
    char* shared;
};
extern Here here;

// What a thread can wait at with others, in the order of operation_names.
enum class Operation {
    shuffle,
    warp_sync,
    ldmatrix_x2,
    ldmatrix_x2_trans,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_f16,
    mma_bf16,
    mma_tf32,
    mma_f64,
    stmatrix_x4,
    stmatrix_x4_trans,
    barrier_sync,
    mbarrier_wait,
    wgmma_wait,
    setmaxnreg,
    exit,
};

void barrier(int id, int threads);
void barrier_arrive(int id, int threads);
void warp_barrier();
uint64_t shuffle(uint64_t bits, int source_lane);
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transpose);
void stmatrix(void* row, const uint32_t* registers, bool transpose);
void mma(Operation kind, void* d, const void* a, const void* b);

void copy_async(void* shared, const void* global, bool present);
void copy_commit();
void copy_wait(int groups);

void mbarrier_init(void* barrier, int arrivals);
void mbarrier_arrive(void* barrier, int bytes);
void mbarrier_wait(void* barrier, int parity);
void tensor_load(void* shared, const void* map, void* barrier, const int* at);

// What the 128 threads of a warpgroup agree on.
struct WarpgroupProduct {
    int columns;
    bool is_bf16, accumulates, is_a_in_registers, is_a_outer, is_b_outer;
    uint64_t a, b;

    bool operator==(const WarpgroupProduct& other) const {
        return columns == other.columns && is_bf16 == other.is_bf16 && accumulates == other.accumulates &&
               is_a_in_registers == other.is_a_in_registers && is_a_outer == other.is_a_outer &&
               is_b_outer == other.is_b_outer && a == other.a && b == other.b;
    }
};

void wgmma(const WarpgroupProduct& product, float* d, const uint32_t* a);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);

// Ordinary writes of shared memory, of at most 16 bytes that lie in one multiple of 16.
void wrote(const void* at, size_t bytes);
void fence_proxy_async();

int elected_lane();
void set_registers(int count, bool rises);

// Names the running kernel and thread, says what is wrong and ends the process.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline void check_aligned(const void* pointer, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("%s: address is not a multiple of %zu", what, bytes);
}

}  // namespace emulator
