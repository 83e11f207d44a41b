// Loads and stores of N elements at once (PTX ISA: Data Movement, ld and st): 2, 4, 8 or 16 bytes, aligned to as many.
#pragma once

#include "device.cuh"
#ifdef ATTN_EMULATOR
#include <type_traits>
#endif

namespace attn::ptx {

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    static_assert(sizeof(T) * N <= 16, "at most 16 bytes move at once");
    T value[N];
};

#ifdef ATTN_EMULATOR
// The host's access is one, too.
template <int kBytes>
using UpTo8 = std::conditional_t<kBytes == 8, uint64_t, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>;
template <int kBytes>
using Bits = std::conditional_t<kBytes == 16, unsigned __int128, UpTo8<kBytes>>;
#endif

template <class T, int N>
DEVICE Vector<T, N> load_vector(const T* source) {
#ifdef ATTN_EMULATOR
    emulator::check_aligned(source, sizeof(Vector<T, N>), "load_vector");
    return bit_cast<Vector<T, N>>(*reinterpret_cast<const Bits<sizeof(T) * N>*>(source));
#else
    return *reinterpret_cast<const Vector<T, N>*>(source);
#endif
}

template <class T, int N>
DEVICE void store_vector(T* target, const Vector<T, N>& vector) {
#ifdef ATTN_EMULATOR
    emulator::check_aligned(target, sizeof(Vector<T, N>), "store_vector");
    emulator::wrote(target, sizeof(Vector<T, N>));
    *reinterpret_cast<Bits<sizeof(T) * N>*>(target) = bit_cast<Bits<sizeof(T) * N>>(vector);
#else
    *reinterpret_cast<Vector<T, N>*>(target) = vector;
#endif
}

// From global memory that no thread writes during the launch (ld.global.nc), 4, 8 or 16 bytes.
template <class T, int N>
DEVICE Vector<T, N> load_constant(const T* source) {
#ifdef ATTN_EMULATOR
    return load_vector<T, N>(source);
#else
    constexpr int words = sizeof(T) * N / 4;
    static_assert(words == 1 || words == 2 || words == 4, "4, 8 or 16 bytes");
    uint32_t bits[words];
    if constexpr (words == 1) asm("ld.global.nc.b32 %0, [%1];" : "=r"(bits[0]) : "l"(source));
    if constexpr (words == 2) asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(bits[0]), "=r"(bits[1]) : "l"(source));
    if constexpr (words == 4)
        asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
            : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
            : "l"(source));
    Vector<T, N> result;
    memcpy(&result, bits, sizeof(result));
    return result;
#endif
}

}  // namespace attn::ptx
