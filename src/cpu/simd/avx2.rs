use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

/// 8 × f32 or 4 × f64, with FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

macro_rules! simd {
    ($t:ty, $v:ty, $lanes:literal => $set1:ident, $loadu:ident, $storeu:ident, $add:ident, $sub:ident, $mul:ident,
     $div:ident, $fmadd:ident, $max:ident, $min:ident, $cmp:ident, $blend:ident, $round:ident, $power_of_two:expr,
     $scale_normal:expr, $transpose:expr, {$($more:item)*}) => {
        // SAFETY of all: the caller has AVX2, FMA and F16C, and its pointers are valid for LANES elements.
        impl Simd<$t> for Avx2 {
            type V = $v;
            const LANES: usize = $lanes;
            const ROWS: usize = 6;

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
                unsafe { $blend(y, x, $cmp::<_CMP_LT_OQ>(a, b)) }
            }
            #[inline(always)]
            unsafe fn round(x: $v) -> $v {
                unsafe { $round::<NEAREST>(x) }
            }
            #[inline(always)]
            unsafe fn scale_by_power_of_two(x: $v, n: $v) -> $v {
                // 2ⁿ⁻¹ is normal where 2ⁿ may not be.
                unsafe {
                    let half: $v = $power_of_two($sub(n, $set1(1.0)));
                    let y = $mul(x, half);
                    $add(y, y)
                }
            }
            #[inline(always)]
            unsafe fn scale_normal(x: $v, n: $v) -> $v {
                unsafe { $scale_normal(x, n) }
            }
            #[inline(always)]
            unsafe fn transpose(from: *const $t, row: usize, to: *mut $t, to_row: usize) {
                unsafe { $transpose(from, row, to, to_row) }
            }
            $($more)*
        }
    };
}

/// 2ⁿ by its exponent field.
#[inline(always)]
unsafe fn power_of_two_f32(n: __m256) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_cvtps_epi32(_mm256_add_ps(n, _mm256_set1_ps(127.0))))) }
}

/// 2ⁿ by its exponent field: adding 2⁵² leaves the integer in the low bits.
#[inline(always)]
unsafe fn power_of_two_f64(n: __m256d) -> __m256d {
    // SAFETY: the caller has AVX2.
    unsafe {
        let biased = _mm256_add_pd(n, _mm256_set1_pd(1023.0 + 4503599627370496.0));
        _mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_castpd_si256(biased)))
    }
}

/// Adds n to the exponents.
#[inline(always)]
unsafe fn scale_normal_f32(x: __m256, n: __m256) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let exponents = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponents))
    }
}

/// Adds n to the exponents: adding 1.5·2⁵² leaves the integer in the low bits.
#[inline(always)]
unsafe fn scale_normal_f64(x: __m256d, n: __m256d) -> __m256d {
    // SAFETY: the caller has AVX2.
    unsafe {
        let integers = _mm256_castpd_si256(_mm256_add_pd(n, _mm256_set1_pd(6755399441055744.0)));
        _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(x), _mm256_slli_epi64::<52>(integers)))
    }
}

/// Transposes 8 × 8: pairs of rows, pairs of pairs, then the halves.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain indices unroll
unsafe fn transpose_f32(from: *const f32, row: usize, to: *mut f32, to_row: usize) {
    // SAFETY: the caller has AVX2 and vouches for both squares.
    unsafe {
        let mut pairs = [_mm256_setzero_ps(); 8];
        for i in 0..4 {
            let (a, b) = (_mm256_loadu_ps(from.add(2 * i * row)), _mm256_loadu_ps(from.add((2 * i + 1) * row)));
            (pairs[2 * i], pairs[2 * i + 1]) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        }
        // Half h of fours[4g + c] holds column 4h + c of rows 4g to 4g + 3.
        let mut fours = [_mm256_setzero_ps(); 8];
        for g in 0..2 {
            for c in 0..2 {
                let (a, b) = (pairs[4 * g + c], pairs[4 * g + 2 + c]);
                fours[4 * g + 2 * c] = _mm256_shuffle_ps::<0x44>(a, b);
                fours[4 * g + 2 * c + 1] = _mm256_shuffle_ps::<0xee>(a, b);
            }
        }
        for c in 0..4 {
            let (a, b) = (fours[c], fours[4 + c]);
            _mm256_storeu_ps(to.add(c * to_row), _mm256_permute2f128_ps::<0x20>(a, b));
            _mm256_storeu_ps(to.add((4 + c) * to_row), _mm256_permute2f128_ps::<0x31>(a, b));
        }
    }
}

/// Transposes 4 × 4.
#[inline(always)]
unsafe fn transpose_f64(from: *const f64, row: usize, to: *mut f64, to_row: usize) {
    // SAFETY: the caller has AVX2 and vouches for both squares.
    unsafe {
        let [a, b] = [_mm256_loadu_pd(from), _mm256_loadu_pd(from.add(row))];
        let [c, d] = [_mm256_loadu_pd(from.add(2 * row)), _mm256_loadu_pd(from.add(3 * row))];
        let (even, odd) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
        let (even_2, odd_2) = (_mm256_unpacklo_pd(c, d), _mm256_unpackhi_pd(c, d));
        _mm256_storeu_pd(to, _mm256_permute2f128_pd::<0x20>(even, even_2));
        _mm256_storeu_pd(to.add(to_row), _mm256_permute2f128_pd::<0x20>(odd, odd_2));
        _mm256_storeu_pd(to.add(2 * to_row), _mm256_permute2f128_pd::<0x31>(even, even_2));
        _mm256_storeu_pd(to.add(3 * to_row), _mm256_permute2f128_pd::<0x31>(odd, odd_2));
    }
}

simd!(
    f32, __m256, 8 => _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps,
    _mm256_div_ps, _mm256_fmadd_ps, _mm256_max_ps, _mm256_min_ps, _mm256_cmp_ps, _mm256_blendv_ps, _mm256_round_ps,
    power_of_two_f32, scale_normal_f32, transpose_f32, {
        #[inline(always)]
        unsafe fn sum(x: __m256) -> f32 {
            unsafe {
                let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
            }
        }
        #[inline(always)]
        unsafe fn largest(x: __m256) -> f32 {
            unsafe {
                let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m256 {
            unsafe {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()))))
            }
        }
        #[inline(always)]
        unsafe fn sum_each([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
            unsafe {
                let halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
                let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
                std::mem::transmute::<__m128, [f32; 4]>(sums)
            }
        }
    }
);
simd!(
    f64, __m256d, 4 => _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_add_pd, _mm256_sub_pd,
    _mm256_mul_pd, _mm256_div_pd, _mm256_fmadd_pd, _mm256_max_pd, _mm256_min_pd, _mm256_cmp_pd, _mm256_blendv_pd,
    _mm256_round_pd, power_of_two_f64, scale_normal_f64, transpose_f64, {
        #[inline(always)]
        unsafe fn sum(x: __m256d) -> f64 {
            unsafe {
                let x = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd::<1>(x));
                _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)))
            }
        }
        #[inline(always)]
        unsafe fn largest(x: __m256d) -> f64 {
            unsafe {
                let x = _mm_max_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd::<1>(x));
                _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)))
            }
        }
        #[inline(always)]
        unsafe fn sum_each([a, b, c, d]: [__m256d; 4]) -> [f64; 4] {
            unsafe {
                let (ab, cd) = (_mm256_hadd_pd(a, b), _mm256_hadd_pd(c, d));
                let (low, high) = (_mm256_permute2f128_pd::<0x20>(ab, cd), _mm256_permute2f128_pd::<0x31>(ab, cd));
                std::mem::transmute::<__m256d, [f64; 4]>(_mm256_add_pd(low, high))
            }
        }
    }
);
