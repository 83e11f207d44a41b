//! Activations of layers, alone or as the gate of other numbers. Slices of any length, all of one.

use super::super::simd::{Real, Simd, exp, normal};
use super::parts::{load, store};
use crate::activation::Activation;

/// into = a(x), or a(x) ⊙ gated.
///
/// # Safety
/// The processor has the instruction set of S.
#[inline(always)]
pub unsafe fn activate<T: Real, S: Simd<T>>(into: &mut [T], x: &[T], gated: Option<&[T]>, activation: Activation) {
    // SAFETY: as here.
    unsafe {
        match activation {
            Activation::Silu => forward::<T, S, Silu>(into, x, gated),
            Activation::Gelu => forward::<T, S, Gelu>(into, x, gated),
            Activation::GeluTanh => forward::<T, S, GeluTanh>(into, x, gated),
            Activation::Relu => forward::<T, S, Relu>(into, x, gated),
            Activation::Sigmoid => forward::<T, S, Sigmoid>(into, x, gated),
            Activation::Softplus => forward::<T, S, Softplus>(into, x, gated),
        }
    }
}

/// dx = dy ⊙ a′(x); with what is gated, dx = dy ⊙ gated ⊙ a′(x) and d_gated = dy ⊙ a(x).
///
/// # Safety
/// As [`activate`].
#[inline(always)]
pub unsafe fn activate_gradient<T: Real, S: Simd<T>>(
    d_x: &mut [T],
    d_y: &[T],
    x: &[T],
    gated: Option<(&[T], &mut [T])>,
    activation: Activation,
) {
    // SAFETY: as here.
    unsafe {
        match activation {
            Activation::Silu => backward::<T, S, Silu>(d_x, d_y, x, gated),
            Activation::Gelu => backward::<T, S, Gelu>(d_x, d_y, x, gated),
            Activation::GeluTanh => backward::<T, S, GeluTanh>(d_x, d_y, x, gated),
            Activation::Relu => backward::<T, S, Relu>(d_x, d_y, x, gated),
            Activation::Sigmoid => backward::<T, S, Sigmoid>(d_x, d_y, x, gated),
            Activation::Softplus => backward::<T, S, Softplus>(d_x, d_y, x, gated),
        }
    }
}

#[inline(always)]
unsafe fn forward<T: Real, S: Simd<T>, C: Curve>(into: &mut [T], x: &[T], gated: Option<&[T]>) {
    for (piece, to) in into.chunks_mut(S::LANES).enumerate() {
        let at = piece * S::LANES;
        // SAFETY: as `activate`.
        unsafe {
            let (mut y, _) = C::value_and_slope::<T, S>(load::<T, S>(&x[at..]));
            if let Some(gated) = gated {
                y = S::mul(y, load::<T, S>(&gated[at..]));
            }
            store::<T, S>(to, y);
        }
    }
}

#[inline(always)]
unsafe fn backward<T: Real, S: Simd<T>, C: Curve>(
    d_x: &mut [T],
    d_y: &[T],
    x: &[T],
    mut gated: Option<(&[T], &mut [T])>,
) {
    for (piece, to) in d_x.chunks_mut(S::LANES).enumerate() {
        let at = piece * S::LANES;
        // SAFETY: as `activate`.
        unsafe {
            let (value, slope) = C::value_and_slope::<T, S>(load::<T, S>(&x[at..]));
            let mut along = load::<T, S>(&d_y[at..]);
            if let Some((gated, d_gated)) = &mut gated {
                store::<T, S>(&mut d_gated[at..], S::mul(along, value));
                along = S::mul(along, load::<T, S>(&gated[at..]));
            }
            store::<T, S>(to, S::mul(along, slope));
        }
    }
}

/// One activation.
trait Curve {
    /// a(x) and a′(x).
    ///
    /// # Safety
    /// As [`activate`].
    unsafe fn value_and_slope<T: Real, S: Simd<T>>(x: S::V) -> (S::V, S::V);
}

struct Silu;
struct Gelu;
struct GeluTanh;
struct Relu;
struct Sigmoid;
struct Softplus;

impl Curve for Silu {
    #[inline(always)]
    unsafe fn value_and_slope<T: Real, S: Simd<T>>(x: S::V) -> (S::V, S::V) {
        // SAFETY: the caller has the instruction set of S.
        unsafe {
            let (up, down) = sigmoids::<T, S>(x);
            (S::mul(x, up), S::mul(up, S::fma(x, down, S::splat(T::ONE))))
        }
    }
}

impl Curve for Gelu {
    #[inline(always)]
    unsafe fn value_and_slope<T: Real, S: Simd<T>>(x: S::V) -> (S::V, S::V) {
        // SAFETY: the caller has the instruction set of S.
        unsafe {
            let (distribution, power) = normal::<T, S>(x);
            let unit = 0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
            let density = S::mul(S::splat(T::from_f64(unit)), power);
            (S::mul(x, distribution), S::fma(x, density, distribution))
        }
    }
}

impl Curve for GeluTanh {
    /// (1 + tanh u)/2 = sigmoid(2u)
    #[inline(always)]
    unsafe fn value_and_slope<T: Real, S: Simd<T>>(x: S::V) -> (S::V, S::V) {
        // SAFETY: the caller has the instruction set of S.
        unsafe {
            let one = S::splat(T::ONE);
            let scale = S::splat(T::from_f64(std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::SQRT_2));
            // Beyond, the sigmoid is 0 or 1 and the cube may overflow.
            let bound = T::from_f64(40.0);
            let near = S::min(S::splat(bound), S::max(S::splat(-bound), x));
            let cubic = S::mul(S::splat(T::from_f64(0.044715)), S::mul(near, near));
            let (up, down) = sigmoids::<T, S>(S::mul(scale, S::mul(near, S::add(one, cubic))));
            let steep = S::mul(scale, S::fma(S::splat(T::from_f64(3.0)), cubic, one));
            (S::mul(x, up), S::mul(up, S::fma(S::mul(near, steep), down, one)))
        }
    }
}

impl Curve for Relu {
    #[inline(always)]
    unsafe fn value_and_slope<T: Real, S: Simd<T>>(x: S::V) -> (S::V, S::V) {
        // SAFETY: the caller has the instruction set of S.
        unsafe {
            let zero = S::splat(T::ZERO);
            // NaN stays NaN.
            (S::max(zero, x), S::select_less(zero, x, S::splat(T::ONE), zero))
        }
    }
}

impl Curve for Sigmoid {
    #[inline(always)]
    unsafe fn value_and_slope<T: Real, S: Simd<T>>(x: S::V) -> (S::V, S::V) {
        // SAFETY: the caller has the instruction set of S.
        unsafe {
            let (up, down) = sigmoids::<T, S>(x);
            (up, S::mul(up, down))
        }
    }
}

impl Curve for Softplus {
    /// max(x, 0) + ln(1 + e^{−|x|}), the logarithm by ln(1 + p) = 2 artanh(p/(2 + p)): its argument is at most 1/3.
    #[inline(always)]
    unsafe fn value_and_slope<T: Real, S: Simd<T>>(x: S::V) -> (S::V, S::V) {
        // SAFETY: the caller has the instruction set of S.
        unsafe {
            let (zero, two) = (S::splat(T::ZERO), S::splat(T::from_f64(2.0)));
            // `min` and `max` return their second operand for NaN.
            let power = exp::<T, S>(S::min(S::sub(zero, x), x));
            let ratio = S::div(power, S::add(two, power));
            let square = S::mul(ratio, ratio);
            // The first term left out is below a rounding.
            let terms: i32 = if T::IS_NARROW { 8 } else { 17 };
            let mut series = zero;
            for term in (0..terms).rev() {
                series = S::fma(series, square, S::splat(T::from_f64(1.0 / f64::from(2 * term + 1))));
            }
            let value = S::fma(S::mul(two, ratio), series, S::max(zero, x));
            (value, sigmoids::<T, S>(x).0)
        }
    }
}

/// 1/(1 + e⁻ˣ) and 1/(1 + eˣ), neither by a difference.
#[inline(always)]
unsafe fn sigmoids<T: Real, S: Simd<T>>(x: S::V) -> (S::V, S::V) {
    // SAFETY: the caller has the instruction set of S.
    unsafe {
        let (zero, one) = (S::splat(T::ZERO), S::splat(T::ONE));
        // −|x|; `min` returns its second operand for NaN.
        let power = exp::<T, S>(S::min(S::sub(zero, x), x));
        let large = S::div(one, S::add(one, power));
        let small = S::mul(power, large);
        (S::select_less(x, zero, small, large), S::select_less(x, zero, large, small))
    }
}
