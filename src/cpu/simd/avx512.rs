use std::arch::x86_64::*;

use super::Simd;

/// 16 × f32 or 8 × f64.
#[derive(Clone, Copy)]
pub struct Avx512;

/// [`Avx512`] with bf16 dot products.
#[derive(Clone, Copy)]
pub struct Avx512Bf16;

impl Avx512Bf16 {
    /// Whether this processor has them.
    pub fn is_available() -> bool {
        super::Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
    }
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

macro_rules! simd {
    ($t:ty, $v:ty, $lanes:literal, $set1:ident, $loadu:ident, $storeu:ident, $add:ident, $sub:ident, $mul:ident,
     $div:ident, $fmadd:ident, $max:ident, $min:ident, $cmp:ident, $blend:ident, $round:ident, $scalef:ident,
     $sum:ident, $largest:ident) => {
        // SAFETY of all: the caller has AVX-512, and its pointers are valid for LANES elements.
        impl Simd<$t> for Avx512 {
            type V = $v;
            const LANES: usize = $lanes;
            const ROWS: usize = 8;

            #[inline(always)]
            unsafe fn splat(x: $t) -> $v {
                unsafe { $set1(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const $t) -> $v {
                unsafe { $loadu(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut $t, x: $v) {
                unsafe { $storeu(to, x) }
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
                unsafe { $fmadd(a, b, c) }
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
                unsafe { $blend($cmp::<_CMP_LT_OQ>(a, b), y, x) }
            }
            #[inline(always)]
            unsafe fn round(x: $v) -> $v {
                unsafe { $round::<NEAREST>(x) }
            }
            #[inline(always)]
            unsafe fn scale_by_power_of_two(x: $v, n: $v) -> $v {
                unsafe { $scalef(x, n) }
            }
            #[inline(always)]
            unsafe fn sum(x: $v) -> $t {
                unsafe { $sum(x) }
            }
            #[inline(always)]
            unsafe fn largest(x: $v) -> $t {
                unsafe { $largest(x) }
            }
        }
    };
}

simd!(
    f32,
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_div_ps,
    _mm512_fmadd_ps,
    _mm512_max_ps,
    _mm512_min_ps,
    _mm512_cmp_ps_mask,
    _mm512_mask_blend_ps,
    _mm512_roundscale_ps,
    _mm512_scalef_ps,
    _mm512_reduce_add_ps,
    _mm512_reduce_max_ps
);
simd!(
    f64,
    __m512d,
    8,
    _mm512_set1_pd,
    _mm512_loadu_pd,
    _mm512_storeu_pd,
    _mm512_add_pd,
    _mm512_sub_pd,
    _mm512_mul_pd,
    _mm512_div_pd,
    _mm512_fmadd_pd,
    _mm512_max_pd,
    _mm512_min_pd,
    _mm512_cmp_pd_mask,
    _mm512_mask_blend_pd,
    _mm512_roundscale_pd,
    _mm512_scalef_pd,
    _mm512_reduce_add_pd,
    _mm512_reduce_max_pd
);
