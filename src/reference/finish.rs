//! What happens to the sums t_i = Σ_j W_ij v_j and d_i = Σ_j W_ij.

use super::Array;
use super::array::{add_scaled, dot};
use super::quadratic::rows;
use crate::transnormer::NormScope;

pub(super) enum Finish {
    /// o = t
    None,
    /// o = t/(d + ε), 0 for a zero divisor
    Normalize { epsilon: f64 },
    /// o = t/√(mean t² + ε)
    RmsNorm { epsilon: f64, scope: NormScope },
}

impl Finish {
    /// o from t `[B, H, N, E]` and d `[B, H, N, 1]`.
    pub fn apply(&self, sums: &Array, divisors: &Array) -> Array {
        match *self {
            Self::None => sums.clone(),
            Self::Normalize { epsilon } => {
                let mut out = Array::zeros(sums.shape);
                for [b, h, i] in rows(sums) {
                    let inverse = inverse(divisors.row(b, h, i)[0] + epsilon);
                    add_scaled(out.row_mut(b, h, i), inverse, sums.row(b, h, i));
                }
                out
            }
            Self::RmsNorm { epsilon, scope } => rms_norm(sums, epsilon, scope),
        }
    }

    /// dt and dd from do: dt = do/(d + ε), dd = −⟨do, o⟩/(d + ε) with a divisor.
    pub fn backward(&self, sums: &Array, divisors: &Array, d_out: &Array) -> (Array, Array) {
        let mut d_divisors = Array::zeros(divisors.shape);
        let d_sums = match *self {
            Self::None => d_out.clone(),
            Self::Normalize { epsilon } => {
                let mut d_sums = Array::zeros(sums.shape);
                for [b, h, i] in rows(sums) {
                    let inverse = inverse(divisors.row(b, h, i)[0] + epsilon);
                    add_scaled(d_sums.row_mut(b, h, i), inverse, d_out.row(b, h, i));
                    d_divisors.row_mut(b, h, i)[0] = -dot(d_out.row(b, h, i), sums.row(b, h, i)) * inverse * inverse;
                }
                d_sums
            }
            Self::RmsNorm { epsilon, scope } => rms_norm_backward(sums, epsilon, scope, d_out),
        };
        (d_sums, d_divisors)
    }
}

fn inverse(divisor: f64) -> f64 {
    if divisor == 0.0 { 0.0 } else { 1.0 / divisor }
}

/// o = t/r, r = √(mean t² + ε), the mean over E or, for all heads, over H·E.
pub(super) fn rms_norm(t: &Array, epsilon: f64, scope: NormScope) -> Array {
    let mut out = Array::zeros(t.shape);
    for [b, h, i] in rows(t) {
        let root = root(t, epsilon, scope, [b, h, i]);
        add_scaled(out.row_mut(b, h, i), 1.0 / root, t.row(b, h, i));
    }
    out
}

/// dt = (do − o·mean(o ⊙ do))/r
pub(super) fn rms_norm_backward(t: &Array, epsilon: f64, scope: NormScope, d_out: &Array) -> Array {
    let out = rms_norm(t, epsilon, scope);
    let mut d_t = Array::zeros(t.shape);
    for [b, h, i] in rows(t) {
        let root = root(t, epsilon, scope, [b, h, i]);
        let mean = mean_product(&out, d_out, scope, [b, h, i]);
        add_scaled(d_t.row_mut(b, h, i), 1.0 / root, d_out.row(b, h, i));
        add_scaled(d_t.row_mut(b, h, i), -mean / root, out.row(b, h, i));
    }
    d_t
}

/// r, of numbers brought to at most 1 before they are squared.
fn root(t: &Array, epsilon: f64, scope: NormScope, row: [usize; 3]) -> f64 {
    let together = normalized_together(t, scope, row);
    let largest = together.iter().map(|x| x.abs()).fold(epsilon.sqrt(), f64::max);
    let squares: f64 = together.iter().map(|x| (x / largest).powi(2)).sum();
    largest * (squares / together.len() as f64 + epsilon / largest / largest).sqrt()
}

/// The values that are normalised together with a row.
fn normalized_together(t: &Array, scope: NormScope, [b, h, i]: [usize; 3]) -> Vec<f64> {
    let heads = match scope {
        NormScope::Head => h..h + 1,
        NormScope::AllHeads => 0..t.shape[1],
    };
    heads.flat_map(|h| t.row(b, h, i)).copied().collect()
}

/// mean(x ⊙ y) over the values normalised together with a row.
fn mean_product(x: &Array, y: &Array, scope: NormScope, [b, h, i]: [usize; 3]) -> f64 {
    let [_, heads, _, width] = x.shape;
    let together = match scope {
        NormScope::Head => h..h + 1,
        NormScope::AllHeads => 0..heads,
    };
    let count = together.len() * width;
    together.map(|h| dot(x.row(b, h, i), y.row(b, h, i))).sum::<f64>() / count as f64
}
