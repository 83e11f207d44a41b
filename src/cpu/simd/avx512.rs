use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{MultiplyAdd, Simd};

/// 16 × f32 or 8 × f64.
#[derive(Clone, Copy)]
pub struct Avx512;

/// Pairs of bf16 as operands, each pair one step of a product: AVX512_BF16.
pub struct Avx512Pairs;

// SAFETY of all: the caller has AVX-512 and AVX512_BF16, and its pointers are valid for LANES elements.
impl MultiplyAdd<f32, Avx512> for Avx512Pairs {
    /// The first of the pair in the low half.
    type X = u32;
    type V = __m512i;

    #[inline(always)]
    unsafe fn splat(x: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(x as i32) }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: __m512i, b: __m512i, c: __m512) -> __m512 {
        // SAFETY: the types differ in name only.
        unsafe {
            _mm512_dpbf16_ps(
                c,
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b),
            )
        }
    }
}

impl Avx512Pairs {
    /// Rounds 16 numbers to 8 pairs.
    #[inline(always)]
    pub unsafe fn narrow(from: *const f32, to: *mut u32) {
        // SAFETY: the caller vouches for 16 readable and 8 writable elements, and for the instruction set.
        unsafe {
            let pairs = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
            _mm256_storeu_si256(to.cast(), std::mem::transmute::<__m256bh, __m256i>(pairs));
        }
    }
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

macro_rules! simd {
    ($t:ty, $v:ty, $lanes:literal => $set1:ident, $loadu:ident, $storeu:ident, $add:ident, $sub:ident, $mul:ident,
     $div:ident, $fmadd:ident, $max:ident, $min:ident, $cmp:ident, $blend:ident, $round:ident, $scalef:ident,
     $sum:ident, $largest:ident, {$($more:item)*}) => {
        // SAFETY of all: the caller has AVX-512, and its pointers are valid for LANES elements.
        impl Simd<$t> for Avx512 {
            type V = $v;
            const LANES: usize = $lanes;
            const ROWS: usize = 8;
            const SCALES_ANY: bool = true;

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
            $($more)*
        }
    };
}

simd!(
    f32, __m512, 16 => _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_sub_ps,
    _mm512_mul_ps, _mm512_div_ps, _mm512_fmadd_ps, _mm512_max_ps, _mm512_min_ps, _mm512_cmp_ps_mask,
    _mm512_mask_blend_ps, _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
    {
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m512 {
            unsafe {
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))))
            }
        }
        #[inline(always)]
        unsafe fn transpose(from: *const f32, row: usize, to: *mut f32, to_row: usize) {
            unsafe { transpose_f32(from, row, to, to_row) }
        }
    }
);
simd!(
    f64, __m512d, 8 => _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_add_pd, _mm512_sub_pd,
    _mm512_mul_pd, _mm512_div_pd, _mm512_fmadd_pd, _mm512_max_pd, _mm512_min_pd, _mm512_cmp_pd_mask,
    _mm512_mask_blend_pd, _mm512_roundscale_pd, _mm512_scalef_pd, _mm512_reduce_add_pd, _mm512_reduce_max_pd, {}
);

/// Transposes 16 × 16: four numbers of four rows into each quarter, then the quarters.
#[inline(always)]
unsafe fn transpose_f32(from: *const f32, row: usize, to: *mut f32, to_row: usize) {
    // SAFETY: the caller has AVX-512 and vouches for both squares.
    unsafe {
        let mut fours = [_mm512_setzero_ps(); 16];
        for g in 0..4 {
            let r: [__m512; 4] = std::array::from_fn(|i| _mm512_loadu_ps(from.add((4 * g + i) * row)));
            let [a, b] = [_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1])].map(|x| _mm512_castps_pd(x));
            let [c, d] = [_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3])].map(|x| _mm512_castps_pd(x));
            fours[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            fours[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            fours[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            fours[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        // Quarter q of fours[4g + c] holds column 4q + c of rows 4g to 4g + 3.
        for c in 0..4 {
            let even_low = _mm512_shuffle_f32x4::<0x88>(fours[c], fours[4 + c]);
            let odd_low = _mm512_shuffle_f32x4::<0xdd>(fours[c], fours[4 + c]);
            let even_high = _mm512_shuffle_f32x4::<0x88>(fours[8 + c], fours[12 + c]);
            let odd_high = _mm512_shuffle_f32x4::<0xdd>(fours[8 + c], fours[12 + c]);
            _mm512_storeu_ps(to.add(c * to_row), _mm512_shuffle_f32x4::<0x88>(even_low, even_high));
            _mm512_storeu_ps(to.add((4 + c) * to_row), _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high));
            _mm512_storeu_ps(to.add((8 + c) * to_row), _mm512_shuffle_f32x4::<0xdd>(even_low, even_high));
            _mm512_storeu_ps(to.add((12 + c) * to_row), _mm512_shuffle_f32x4::<0xdd>(odd_low, odd_high));
        }
    }
}
