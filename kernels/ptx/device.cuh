// What every kernel file starts from: function qualifiers, fixed-width integers, shared memory and the instance macro.
// The same source is compiled by nvcc for the GPU and, with ATTN_EMULATOR, by a host compiler for tests/emulator.
#pragma once

#include <cstdint>

#ifdef ATTN_EMULATOR

#include <cstring>

#include "emulator.hpp"

#define DEVICE inline
#define GLOBAL extern "C"

#else

#define DEVICE __device__ __forceinline__
#define GLOBAL extern "C" __global__

#endif

namespace attn::ptx {

// The block's dynamic shared memory, 1024-byte aligned: the 128-byte swizzle repeats after so many.
template <class T>
DEVICE T* shared_memory() {
#ifdef ATTN_EMULATOR
    return reinterpret_cast<T*>(emulator::here.shared);
#else
    extern __shared__ __align__(1024) char attn_shared_memory[];
    return reinterpret_cast<T*>(attn_shared_memory);
#endif
}

// An address in the shared window, as instructions take it.
DEVICE uint32_t shared_address(const void* pointer) {
#ifdef ATTN_EMULATOR
    return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator::here.shared);
#else
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

template <class To, class From>
DEVICE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different sizes");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

}  // namespace attn::ptx

// One line per kernel at the end of a .cu file: ATTN_KERNEL(name, function<arguments...>, Params, threads).
// `function` may contain up to six commas, which the preprocessor takes for separators.
#ifdef ATTN_EMULATOR
#define ATTN_KERNEL_INSTANCE(name, Params, count, ...)   \
    static const ::emulator::Kernel name##_kernel{ \
        #name, [](const void* params) { (__VA_ARGS__)(*static_cast<const Params*>(params)); }, sizeof(Params), count};
#else
// One block on a multiprocessor is enough: without saying so, registers are spilled to make room for more.
#define ATTN_KERNEL_INSTANCE(name, Params, count, ...) \
    GLOBAL void __launch_bounds__(count, 1) name(const __grid_constant__ Params params) { (__VA_ARGS__)(params); }
#endif

#define ATTN_KERNEL(...)                                                                                     \
    ATTN_KERNEL_PICK(__VA_ARGS__, ATTN_KERNEL_6, ATTN_KERNEL_5, ATTN_KERNEL_4, ATTN_KERNEL_3, ATTN_KERNEL_2, \
                     ATTN_KERNEL_1, ATTN_KERNEL_0, none)                                                     \
    (__VA_ARGS__)
#define ATTN_KERNEL_PICK(name, a, b, c, d, e, f, g, params, threads, kernel, ...) kernel
#define ATTN_KERNEL_0(name, f, P, n) ATTN_KERNEL_INSTANCE(name, P, n, f)
#define ATTN_KERNEL_1(name, f, a, P, n) ATTN_KERNEL_INSTANCE(name, P, n, f, a)
#define ATTN_KERNEL_2(name, f, a, b, P, n) ATTN_KERNEL_INSTANCE(name, P, n, f, a, b)
#define ATTN_KERNEL_3(name, f, a, b, c, P, n) ATTN_KERNEL_INSTANCE(name, P, n, f, a, b, c)
#define ATTN_KERNEL_4(name, f, a, b, c, d, P, n) ATTN_KERNEL_INSTANCE(name, P, n, f, a, b, c, d)
#define ATTN_KERNEL_5(name, f, a, b, c, d, e, P, n) ATTN_KERNEL_INSTANCE(name, P, n, f, a, b, c, d, e)
#define ATTN_KERNEL_6(name, f, a, b, c, d, e, g, P, n) ATTN_KERNEL_INSTANCE(name, P, n, f, a, b, c, d, e, g)
