//! Functions built from the vector operations.

use super::{Real, Simd};

/// eˣ to about one unit in the last place; 0 below [`Real::EXP_MIN`]; NaN stays NaN.
#[inline(always)]
pub unsafe fn exp<T: Real, S: Simd<T>>(x: S::V) -> S::V {
    // SAFETY: the caller's.
    unsafe { exps::<T, S, 1, true>([x])[0] }
}

/// [`exp`] of N vectors, step by step side by side, as each step waits for the one before. Unless `ANY`, only of x ≤ 0;
/// others give whatever.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain indices unroll
pub unsafe fn exps<T: Real, S: Simd<T>, const N: usize, const ANY: bool>(x: [S::V; N]) -> [S::V; N] {
    // SAFETY: the caller has the instruction set of S.
    unsafe {
        let low = S::splat(T::EXP_MIN);
        let (mut r, mut n) = (x, x);
        for i in 0..N {
            // `max` and `min` return their second operand for NaN, so NaN passes through both.
            r[i] = S::max(low, x[i]);
            if ANY {
                r[i] = S::min(S::splat(T::EXP_MAX), r[i]);
            }
        }
        for i in 0..N {
            n[i] = S::round(S::mul(r[i], S::splat(T::from_f64(std::f64::consts::LOG2_E))));
        }
        for part in T::LN_2 {
            for i in 0..N {
                r[i] = S::fma(n[i], S::splat(-part), r[i]);
            }
        }
        // In powers of r², half as long a chain.
        let (mut square, mut p) = (r, [S::splat(T::EXP_COEFFICIENTS[0]); N]);
        for i in 0..N {
            square[i] = S::mul(r[i], r[i]);
        }
        for pair in T::EXP_COEFFICIENTS[1..].chunks_exact(2) {
            for i in 0..N {
                p[i] = S::fma(p[i], square[i], S::fma(S::splat(pair[0]), r[i], S::splat(pair[1])));
            }
        }
        for i in 0..N {
            let power = if ANY { S::scale_by_power_of_two(p[i], n[i]) } else { S::scale_normal(p[i], n[i]) };
            p[i] = S::select_less(x[i], low, S::splat(T::ZERO), power);
        }
        p
    }
}

/// 2ˣ for x that is at most little above 0, to about one unit in the last place; 0 below [`Real::EXP2_MIN`]; NaN
/// stays NaN.
#[inline(always)]
pub unsafe fn exp2<T: Real, S: Simd<T>>(x: S::V) -> S::V {
    // SAFETY: the caller's.
    unsafe { exp2s::<T, S, 1>([x])[0] }
}

/// [`exp2`] of N vectors, step by step side by side.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain indices unroll
pub unsafe fn exp2s<T: Real, S: Simd<T>, const N: usize>(x: [S::V; N]) -> [S::V; N] {
    // SAFETY: the caller has the instruction set of S.
    unsafe {
        let low = S::splat(T::EXP2_MIN[S::SCALES_ANY as usize]);
        let (mut n, mut r, mut p) = (x, x, [S::splat(T::EXP2_COEFFICIENTS[0]); N]);
        for i in 0..N {
            let clamped = S::max(low, x[i]);
            n[i] = S::round(clamped);
            r[i] = S::sub(clamped, n[i]);
        }
        for &c in &T::EXP2_COEFFICIENTS[1..] {
            for i in 0..N {
                p[i] = S::fma(p[i], r[i], S::splat(c));
            }
        }
        for i in 0..N {
            let y = S::scale_by_power_of_two(p[i], n[i]);
            p[i] = if S::SCALES_ANY { y } else { S::select_less(x[i], low, S::splat(T::ZERO), y) };
        }
        p
    }
}

/// 1/(1 + e⁻ˣ)
#[inline(always)]
pub unsafe fn sigmoid<T: Real, S: Simd<T>>(x: S::V) -> S::V {
    // SAFETY: the caller has the instruction set of S.
    unsafe {
        let one = S::splat(T::ONE);
        S::div(one, S::add(one, exp::<T, S>(S::sub(S::splat(T::ZERO), x))))
    }
}

/// tanh x = 1 − 2/(e²ˣ + 1), by its odd series near 0 where that form cancels.
#[inline(always)]
pub unsafe fn tanh<T: Real, S: Simd<T>>(x: S::V) -> S::V {
    // SAFETY: the caller has the instruction set of S.
    unsafe {
        let one = S::splat(T::ONE);
        let two = S::splat(T::from_f64(2.0));
        let far = S::sub(one, S::div(two, S::add(exp::<T, S>(S::mul(two, x)), one)));
        let x2 = S::mul(x, x);
        let mut p = S::splat(T::ZERO);
        for c in TANH_SERIES {
            p = S::fma(p, x2, S::splat(T::from_f64(c)));
        }
        let magnitude = S::max(x, S::sub(S::splat(T::ZERO), x));
        S::select_less(magnitude, S::splat(T::from_f64(0.125)), S::mul(x, p), far)
    }
}

/// Coefficients of tanh(x)/x in powers of x², highest first: relative error 2e-16 for |x| < 1/8.
const TANH_SERIES: [f64; 8] = [
    -929569.0 / 638512875.0,
    21844.0 / 6081075.0,
    -1382.0 / 155925.0,
    62.0 / 2835.0,
    -17.0 / 315.0,
    2.0 / 15.0,
    -1.0 / 3.0,
    1.0,
];
