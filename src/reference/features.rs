//! The feature maps of the linear family and their derivatives.

use super::Array;
use super::array::{add_scaled, dot};
use super::quadratic::relu;
use crate::linear::FeatureMap;
use crate::performer::FavorMap;

/// φ. Exponential FAVOR+ features are handled as `phi·e^exponent`, the largest entry of `phi` being m^{-1/2}
/// (hyperbolic (2m)^{-1/2}); other features have exponent 0.
pub(super) enum Features<'a> {
    Plain(FeatureMap),
    /// ω is `[1, 1, m, D]`.
    Favor {
        map: FavorMap,
        omega: &'a Array,
    },
}

impl Features<'_> {
    /// Width of φ(x) for x of width `width`.
    pub fn width(&self, width: usize) -> usize {
        match self {
            Self::Plain(FeatureMap::Taylor) => 1 + width + width * width,
            Self::Plain(FeatureMap::Cosine) => 1 + width,
            Self::Plain(_) => width,
            Self::Favor { map: FavorMap::Hyperbolic, omega } => 2 * omega.shape[2],
            Self::Favor { omega, .. } => omega.shape[2],
        }
    }

    /// Whether keys carry a running stabiliser.
    pub fn is_stabilized(&self) -> bool {
        matches!(self, Self::Favor { map: FavorMap::Positive | FavorMap::Hyperbolic, .. })
    }

    /// Whether ⟨φ(q), φ(k)⟩ is a function of ⟨q, k⟩ and the lengths of both, so that rotation of q and k is what makes
    /// it one of their distance.
    pub fn are_of_products(&self) -> bool {
        matches!(self, Self::Plain(FeatureMap::Taylor | FeatureMap::Cosine))
    }

    /// Writes `phi` and returns the exponent.
    pub fn apply(&self, x: &[f64], phi: &mut [f64]) -> f64 {
        match self {
            Self::Plain(map) => {
                plain(*map, x, phi);
                0.0
            }
            Self::Favor { map: FavorMap::Relu, omega } => {
                let x = scaled(x);
                let amplitude = amplitude(phi.len());
                for (i, phi) in phi.iter_mut().enumerate() {
                    *phi = amplitude * relu(dot(omega.row(0, 0, i), &x)) + FavorMap::RELU_OFFSET;
                }
                0.0
            }
            Self::Favor { omega, .. } => exponential(omega, x, phi),
        }
    }

    /// d_x ← d_x + (∂φ/∂x)ᵀ d_phi, the exponent held fixed.
    pub fn backward(&self, x: &[f64], phi: &[f64], d_phi: &[f64], d_x: &mut [f64]) {
        match self {
            Self::Plain(map) => plain_backward(*map, x, phi, d_phi, d_x),
            Self::Favor { map: FavorMap::Relu, omega } => {
                let scaled = scaled(x);
                let factor = amplitude(phi.len()) * shrink(x);
                for (i, d) in d_phi.iter().enumerate() {
                    if dot(omega.row(0, 0, i), &scaled) > 0.0 {
                        add_scaled(d_x, factor * d, omega.row(0, 0, i));
                    }
                }
            }
            Self::Favor { omega, .. } => exponential_backward(omega, x, phi, d_phi, d_x),
        }
    }
}

/// D^{-1/4}
fn shrink(x: &[f64]) -> f64 {
    (x.len() as f64).powf(-0.25)
}

/// x̃ = x/D^{1/4}
fn scaled(x: &[f64]) -> Vec<f64> {
    x.iter().map(|value| value * shrink(x)).collect()
}

/// One over the root of the number of features.
fn amplitude(features: usize) -> f64 {
    1.0 / (features as f64).sqrt()
}

/// ±ω x̃ − ‖x̃‖²/2, less its maximum (which is returned), through exp. The square, which is the same for all features, is left
/// out of the difference: of a long x it would take the digits.
fn exponential(omega: &Array, x: &[f64], phi: &mut [f64]) -> f64 {
    let x = scaled(x);
    let half = dot(&x, &x) / 2.0;
    let directions = omega.shape[2];
    for (f, phi) in phi.iter_mut().enumerate() {
        let projection = dot(omega.row(0, 0, f % directions), &x);
        *phi = if f < directions { projection } else { -projection };
    }
    let max = phi.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let amplitude = amplitude(phi.len());
    for phi in phi {
        *phi = amplitude * (*phi - max).exp();
    }
    max - half
}

/// dx = D^{-1/4} (Σ_f ±u_f ω_f − (Σ_f u_f) x̃) with u_f = dφ_f φ_f
fn exponential_backward(omega: &Array, x: &[f64], phi: &[f64], d_phi: &[f64], d_x: &mut [f64]) {
    let (shrink, directions) = (shrink(x), omega.shape[2]);
    for (f, (phi, d)) in phi.iter().zip(d_phi).enumerate() {
        let sign = if f < directions { 1.0 } else { -1.0 };
        add_scaled(d_x, sign * d * phi * shrink, omega.row(0, 0, f % directions));
    }
    add_scaled(d_x, -dot(d_phi, phi) * shrink * shrink, x);
}

fn plain(map: FeatureMap, x: &[f64], phi: &mut [f64]) {
    match map {
        FeatureMap::Identity => phi.copy_from_slice(x),
        FeatureMap::EluPlusOne => each(x, phi, |x| if x >= 0.0 { x + 1.0 } else { x.exp() }),
        FeatureMap::Relu => each(x, phi, relu),
        FeatureMap::ReluSquared => each(x, phi, |x| relu(x).powi(2)),
        FeatureMap::Silu => each(x, phi, |x| x * sigmoid(x)),
        FeatureMap::Exp => each(x, phi, f64::exp),
        FeatureMap::Softmax => {
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            each(x, phi, |x| (x - max).exp());
            let sum: f64 = phi.iter().sum();
            phi.iter_mut().for_each(|phi| *phi /= sum);
        }
        FeatureMap::Taylor => {
            phi[0] = 1.0;
            let (first, second) = phi[1..].split_at_mut(x.len());
            first.copy_from_slice(x);
            for (row, a) in second.chunks_exact_mut(x.len()).zip(x) {
                each(x, row, |b| a * b / 2f64.sqrt());
            }
        }
        FeatureMap::Cosine => {
            let (largest, norm) = norms(x);
            phi[0] = 1.0;
            each(x, &mut phi[1..], |x| if largest == 0.0 { x } else { x / largest / norm });
        }
    }
}

fn plain_backward(map: FeatureMap, x: &[f64], phi: &[f64], d_phi: &[f64], d_x: &mut [f64]) {
    let slope: fn(f64) -> f64 = match map {
        FeatureMap::Identity => |_| 1.0,
        FeatureMap::EluPlusOne => |x| x.exp().min(1.0),
        FeatureMap::Relu => |x| if x > 0.0 { 1.0 } else { 0.0 },
        FeatureMap::ReluSquared => |x| 2.0 * relu(x),
        FeatureMap::Silu => |x| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))),
        FeatureMap::Exp => f64::exp,
        FeatureMap::Softmax => return softmax_backward(phi, d_phi, d_x),
        FeatureMap::Taylor => return taylor_backward(x, d_phi, d_x),
        FeatureMap::Cosine => return cosine_backward(x, &phi[1..], &d_phi[1..], d_x),
    };
    for ((d_x, &x), d) in d_x.iter_mut().zip(x).zip(d_phi) {
        *d_x += slope(x) * d;
    }
}

/// dx = φ ⊙ (dφ − ⟨dφ, φ⟩)
fn softmax_backward(phi: &[f64], d_phi: &[f64], d_x: &mut [f64]) {
    let mean = dot(d_phi, phi);
    for ((d_x, phi), d) in d_x.iter_mut().zip(phi).zip(d_phi) {
        *d_x += phi * (d - mean);
    }
}

/// dx_a = dφ_a + Σ_b (dφ_ab + dφ_ba) x_b/√2
fn taylor_backward(x: &[f64], d_phi: &[f64], d_x: &mut [f64]) {
    let (first, second) = d_phi[1..].split_at(x.len());
    add_scaled(d_x, 1.0, first);
    for (a, row) in second.chunks_exact(x.len()).enumerate() {
        d_x[a] += dot(row, x) / 2f64.sqrt();
        add_scaled(d_x, x[a] / 2f64.sqrt(), row);
    }
}

/// max |x| and ‖x‖ over it: neither overflows or vanishes where x does not.
fn norms(x: &[f64]) -> (f64, f64) {
    let largest = x.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    (largest, x.iter().map(|x| (x / largest).powi(2)).sum::<f64>().sqrt())
}

/// dx = (dx̂ − x̂⟨x̂, dx̂⟩)/‖x‖, 0 for a zero row
fn cosine_backward(x: &[f64], unit: &[f64], d_unit: &[f64], d_x: &mut [f64]) {
    let (largest, norm) = norms(x);
    if largest > 0.0 {
        let along = dot(unit, d_unit);
        for ((d_x, unit), d) in d_x.iter_mut().zip(unit).zip(d_unit) {
            *d_x += (d - unit * along) / norm / largest;
        }
    }
}

fn each(x: &[f64], phi: &mut [f64], function: impl Fn(f64) -> f64) {
    for (phi, &x) in phi.iter_mut().zip(x) {
        *phi = function(x);
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
