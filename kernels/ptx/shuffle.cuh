// Exchange of registers within a full warp (PTX ISA: Data Movement, shfl.sync). T is of 4 or 8 bytes.
#pragma once

#include "index.cuh"

namespace attn::ptx {

#ifdef ATTN_EMULATOR

// The value that lane `source` passes.
template <class T>
T exchange(T value, int source) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = emulator::shuffle(bits, source);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T>
T shuffle_xor(T value, int mask) {
    return exchange(value, lane() ^ mask);
}

template <class T>
T shuffle(T value, int source_lane) {
    return exchange(value, source_lane & 31);
}

template <class T>
T shuffle_up(T value, int delta) {
    return exchange(value, lane() < delta ? lane() : lane() - delta);
}

#else

// The second source's upper bits leave the warp whole; the lower five are the last (bfly, idx) or first (up) lane.
#define ATTN_SHUFFLE(function, mode, clamp)                                                             \
    DEVICE uint32_t function(uint32_t value, int source) {                                              \
        uint32_t result;                                                                                \
        asm volatile("shfl.sync." mode ".b32 %0, %1, %2, " clamp ", 0xffffffff;"                        \
                     : "=r"(result)                                                                     \
                     : "r"(value), "r"(source));                                                        \
        return result;                                                                                  \
    }                                                                                                   \
    DEVICE int function(int value, int source) { return int(function(uint32_t(value), source)); }       \
    DEVICE float function(float value, int source) {                                                    \
        return bit_cast<float>(function(bit_cast<uint32_t>(value), source));                            \
    }                                                                                                   \
    DEVICE double function(double value, int source) {                                                  \
        uint64_t bits = bit_cast<uint64_t>(value);                                                      \
        uint64_t low = function(uint32_t(bits), source), high = function(uint32_t(bits >> 32), source); \
        return bit_cast<double>(low | high << 32);                                                      \
    }

// From lane `lane() ^ mask`.
ATTN_SHUFFLE(shuffle_xor, "bfly", "31")
// From lane `source`.
ATTN_SHUFFLE(shuffle, "idx", "31")
// From lane `lane() - delta`; lanes below delta keep their own.
ATTN_SHUFFLE(shuffle_up, "up", "0")

#undef ATTN_SHUFFLE

#endif

}  // namespace attn::ptx
