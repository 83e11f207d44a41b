// Advanced SIMD is always enabled here, so that newer compilers take these intrinsics as safe and older ones do not.
#![allow(unused_unsafe)]

use std::arch::aarch64::*;

use half::bf16;

use super::Simd;

/// 4 × f32 or 2 × f64.
#[derive(Clone, Copy)]
pub struct Neon;

macro_rules! simd {
    ($t:ty, $v:ty, $lanes:literal => $dup:ident, $ld1:ident, $st1:ident, $add:ident, $sub:ident, $mul:ident, $div:ident,
     $fma:ident, $max:ident, $min:ident, $less:ident, $select:ident, $round:ident, $sum:ident, $largest:ident,
     $power_of_two:expr, {$($more:item)*}) => {
        // SAFETY of all: Advanced SIMD is part of the target, and the caller's pointers are valid for LANES elements.
        impl Simd<$t> for Neon {
            type V = $v;
            const LANES: usize = $lanes;
            const ROWS: usize = 8;

            #[inline(always)]
            unsafe fn splat(x: $t) -> $v {
                unsafe { $dup(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const $t) -> $v {
                unsafe { $ld1(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut $t, x: $v) {
                unsafe { $st1(to, x) }
            }
            #[inline(always)]
            unsafe fn add(a: $v, b: $v) -> $v {
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: $v, b: $v) -> $v {
                unsafe { $sub(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: $v, b: $v) -> $v {
                unsafe { $mul(a, b) }
            }
            #[inline(always)]
            unsafe fn div(a: $v, b: $v) -> $v {
                unsafe { $div(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: $v, b: $v, c: $v) -> $v {
                unsafe { $fma(c, a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: $v, b: $v) -> $v {
                unsafe { $max(a, b) }
            }
            #[inline(always)]
            unsafe fn min(a: $v, b: $v) -> $v {
                unsafe { $min(a, b) }
            }
            #[inline(always)]
            unsafe fn select_less(a: $v, b: $v, x: $v, y: $v) -> $v {
                unsafe { $select($less(a, b), x, y) }
            }
            #[inline(always)]
            unsafe fn round(x: $v) -> $v {
                unsafe { $round(x) }
            }
            #[inline(always)]
            unsafe fn scale_by_power_of_two(x: $v, n: $v) -> $v {
                // 2ⁿ⁻¹ is normal where 2ⁿ may not be.
                unsafe {
                    let y = $mul(x, $power_of_two($sub(n, $dup(1.0))));
                    $add(y, y)
                }
            }
            #[inline(always)]
            unsafe fn sum(x: $v) -> $t {
                unsafe { $sum(x) }
            }
            #[inline(always)]
            unsafe fn largest(x: $v) -> $t {
                unsafe { $largest(x) }
            }
            $($more)*
        }
    };
}

/// 2ⁿ by its exponent field.
#[inline(always)]
unsafe fn power_of_two_f32(n: float32x4_t) -> float32x4_t {
    // SAFETY: Advanced SIMD is part of the target.
    unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)))) }
}

/// 2ⁿ by its exponent field.
#[inline(always)]
unsafe fn power_of_two_f64(n: float64x2_t) -> float64x2_t {
    // SAFETY: Advanced SIMD is part of the target.
    unsafe { vreinterpretq_f64_s64(vshlq_n_s64::<52>(vaddq_s64(vcvtq_s64_f64(n), vdupq_n_s64(1023)))) }
}

simd!(
    f32, float32x4_t, 4 => vdupq_n_f32, vld1q_f32, vst1q_f32, vaddq_f32, vsubq_f32, vmulq_f32, vdivq_f32, vfmaq_f32,
    vmaxq_f32, vminq_f32, vcltq_f32, vbslq_f32, vrndnq_f32, vaddvq_f32, vmaxvq_f32, power_of_two_f32, {
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> float32x4_t {
            unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(from.cast())))) }
        }
    }
);
simd!(
    f64, float64x2_t, 2 => vdupq_n_f64, vld1q_f64, vst1q_f64, vaddq_f64, vsubq_f64, vmulq_f64, vdivq_f64, vfmaq_f64,
    vmaxq_f64, vminq_f64, vcltq_f64, vbslq_f64, vrndnq_f64, vaddvq_f64, vmaxvq_f64, power_of_two_f64, {}
);
