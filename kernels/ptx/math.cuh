// Elementary functions on float and double. exp2(float) and reciprocal(float) are the fast instructions (PTX ISA:
// ex2.approx.ftz, 2 ulp, and rcp.approx.ftz, 1 ulp; subnormals flushed on both sides); the others are the accurate library
// functions.
#pragma once

#include "device.cuh"

#ifdef ATTN_EMULATOR
#include <cmath>
#endif

namespace attn::ptx {

DEVICE float exp2(float x) {
#ifdef ATTN_EMULATOR
    float result = std::exp2(x);
    return result < 0x1p-126f ? 0.0f : result;
#else
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

DEVICE double exp2(double x) { return ::exp2(x); }

DEVICE float reciprocal(float x) {
#ifdef ATTN_EMULATOR
    auto flushed = [](float y) { return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y; };
    return flushed(1.0f / flushed(x));
#else
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

DEVICE double reciprocal(double x) { return 1.0 / x; }

DEVICE float log2(float x) { return ::log2f(x); }
DEVICE double log2(double x) { return ::log2(x); }

DEVICE float exp(float x) { return ::expf(x); }
DEVICE double exp(double x) { return ::exp(x); }

DEVICE float log(float x) { return ::logf(x); }
DEVICE double log(double x) { return ::log(x); }

DEVICE float tanh(float x) { return ::tanhf(x); }
DEVICE double tanh(double x) { return ::tanh(x); }

DEVICE float sqrt(float x) { return ::sqrtf(x); }
DEVICE double sqrt(double x) { return ::sqrt(x); }

#ifdef ATTN_EMULATOR
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
#else
DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
DEVICE double rsqrt(double x) { return ::rsqrt(x); }
#endif

// The power of two that brings numbers of this size, above 0, to between 2^exponent and twice as much.
DEVICE float scale_to(float size, int exponent) {
    uint32_t bits = bit_cast<uint32_t>(fminf(fmaxf(size, 0x1p-100f), 0x1p100f)) & 0x7f800000;
    return bit_cast<float>((uint32_t(127 + exponent + 127) << 23) - bits);
}

DEVICE double scale_to(double size, int exponent) {
    uint64_t bits = bit_cast<uint64_t>(fmin(fmax(size, 0x1p-1000), 0x1p1000)) & 0x7ff0000000000000;
    return bit_cast<double>((uint64_t(1023 + exponent + 1023) << 52) - bits);
}

DEVICE float abs(float x) { return ::fabsf(x); }
DEVICE double abs(double x) { return ::fabs(x); }

DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
DEVICE double fma(double a, double b, double c) { return ::fma(a, b, c); }

// Of floats, the operand that is a number when the other is NaN.
DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
DEVICE double max(double a, double b) { return ::fmax(a, b); }
DEVICE float min(float a, float b) { return ::fminf(a, b); }
DEVICE double min(double a, double b) { return ::fmin(a, b); }

DEVICE int max(int a, int b) { return a > b ? a : b; }
DEVICE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
DEVICE int min(int a, int b) { return a < b ? a : b; }
DEVICE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace attn::ptx
