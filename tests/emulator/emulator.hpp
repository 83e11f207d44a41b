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
    barrier_sync,
    exit,
};

void barrier(int id, int threads);
void warp_barrier();
uint64_t shuffle(uint64_t bits, int source_lane);
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transpose);
void mma(Operation kind, void* d, const void* a, const void* b);

void copy_async(void* shared, const void* global, bool present);
void copy_commit();
void copy_wait(int groups);

// Names the running kernel and thread, says what is wrong and ends the process.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline void check_aligned(const void* pointer, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("%s: address is not a multiple of %zu", what, bytes);
}

}  // namespace emulator
