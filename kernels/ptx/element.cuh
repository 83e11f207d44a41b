// Element types and conversions between them (PTX ISA: Data Movement and Conversion Instructions, cvt). All round to
// nearest even unless the name says otherwise.
#pragma once

#include "device.cuh"

namespace attn::ptx {

struct f16 {
    uint16_t bits;
};

struct bf16 {
    uint16_t bits;
};

#ifdef ATTN_EMULATOR

inline float to_float(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

inline float to_float(f16 value) {
    uint32_t sign = uint32_t(value.bits & 0x8000) << 16, fields = uint32_t(value.bits & 0x7fff) << 13;
    // As float bits the exponent is 112 too low; the product is exact, subnormals included.
    uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(fields) * 0x1p112f);
    return bit_cast<float>(sign | (fields >= 0x7c00 << 13 ? fields | 0x7f800000 : finite));
}

inline uint16_t bf16_bits(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    if (value != value) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t f16_bits(float value) {
    uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
    uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (value != value) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    // Below 2^-14 the spacing is 2^-24, which is that of floats in [0.5, 1).
    if (magnitude < 0x38800000) {
        return sign | uint16_t(bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000);
    }
    return sign | uint16_t((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

#else

DEVICE float to_float(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

DEVICE float to_float(f16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

DEVICE uint16_t bf16_bits(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

DEVICE uint16_t f16_bits(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#endif

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(double value) { return static_cast<float>(value); }

template <class E>
DEVICE double to_double(E value) {
    return static_cast<double>(to_float(value));
}
template <>
DEVICE double to_double(double value) {
    return value;
}

template <class E>
DEVICE E from_float(float value) {
    return static_cast<E>(value);
}
template <>
DEVICE f16 from_float(float value) {
    return {f16_bits(value)};
}
template <>
DEVICE bf16 from_float(float value) {
    return {bf16_bits(value)};
}

// To float or double only: through double another type would be rounded twice.
template <class E>
DEVICE E from_double(double value) {
    static_assert(sizeof(E) >= sizeof(float), "16-bit elements are made from float");
    return static_cast<E>(value);
}

// Two elements in a register, `low` in the low half.
template <class E>
DEVICE uint32_t pack(float low, float high);

template <>
DEVICE uint32_t pack<f16>(float low, float high) {
#ifdef ATTN_EMULATOR
    return f16_bits(low) | uint32_t(f16_bits(high)) << 16;
#else
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#endif
}

template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
#ifdef ATTN_EMULATOR
    return bf16_bits(low) | uint32_t(bf16_bits(high)) << 16;
#else
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#endif
}

template <class E>
DEVICE void unpack(uint32_t pair, float& low, float& high) {
    low = to_float(E{static_cast<uint16_t>(pair)});
    high = to_float(E{static_cast<uint16_t>(pair >> 16)});
}

// To the 10 fraction bits of a tf32 operand; ties away from zero.
DEVICE float round_to_tf32(float value) {
#ifdef ATTN_EMULATOR
    if (value != value) return bit_cast<float>(0x7fffffffu);
    uint32_t bits = bit_cast<uint32_t>(value);
    return (bits & 0x7f800000) == 0x7f800000 ? value : bit_cast<float>((bits + 0x1000) & 0xffffe000);
#else
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
    return bit_cast<float>(result);
#endif
}

}  // namespace attn::ptx
