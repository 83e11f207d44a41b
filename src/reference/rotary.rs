//! The linear family with rotary position embedding behind the feature map (Su et al. 2021, RoFormer, equation 19).

use super::linear::{self, LinearCall};
use super::{Array, Gradients, performer, transnormer};
use crate::linear::LinearOptions;
use crate::performer::PerformerOptions;
use crate::transnormer::NormOptions;

/// R_p x, the halves of the row rotated against each other: with θ_i = p·base^{−2i/D},
///
/// ```text
/// y_i = x_i cos θ_i − x_{i+D/2} sin θ_i,   y_{i+D/2} = x_{i+D/2} cos θ_i + x_i sin θ_i
/// ```
pub(super) fn rotated(x: &[f64], base: f64, position: i128) -> Vec<f64> {
    assert!(x.len().is_multiple_of(2), "rotation of rows of width {}", x.len());
    let (half, mut y) = (x.len() / 2, vec![0.0; x.len()]);
    for i in 0..half {
        let (sin, cos) = (position as f64 * base.powf(-2.0 * i as f64 / x.len() as f64)).sin_cos();
        y[i] = x[i] * cos - x[i + half] * sin;
        y[i + half] = x[i + half] * cos + x[i] * sin;
    }
    y
}

/// [`linear_attention`](super::linear_attention) with
///
/// ```text
/// o_i = Σ_j ⟨φ(q_i), R_{j−p_i} φ(k_j)⟩ γ_ij v_j / (Σ_j ⟨φ(q_i), φ(k_j)⟩ γ_ij + ε)
/// ```
///
/// γ_ij the decay of the pair, `base` that of the rotation R. For the maps that are functions of ⟨q, k⟩ (Taylor,
/// Cosine) q_i and k_j are replaced by R_{p_i} q_i and R_j k_j instead.
///
/// # Panics
/// As [`linear_attention`](super::linear_attention), and if what is rotated has an odd width.
pub fn rotary_linear_attention(q: &Array, k: &Array, v: &Array, base: f64, options: &LinearOptions<Array>) -> Array {
    with_rotary(linear::call(q, k, v, options), base).dense()
}

/// Gradients of ⟨d_out, o⟩ for [`rotary_linear_attention`]: those of
/// [`linear_attention_backward`](super::linear_attention_backward), with dn_i for the numerator's weights and dd_i for
/// the divisor's.
///
/// # Panics
/// As [`rotary_linear_attention`].
pub fn rotary_linear_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    base: f64,
    options: &LinearOptions<Array>,
    d_out: &Array,
) -> Gradients {
    with_rotary(linear::call(q, k, v, options), base).dense_backward(d_out)
}

/// [`norm_attention`](super::norm_attention) of the weights ⟨φ(q_i), R_{j−p_i} φ(k_j)⟩ γ_ij, as
/// [`rotary_linear_attention`].
///
/// # Panics
/// As [`norm_attention`](super::norm_attention), and if what is rotated has an odd width.
pub fn rotary_norm_attention(q: &Array, k: &Array, v: &Array, base: f64, options: &NormOptions<Array>) -> Array {
    with_rotary(transnormer::norm_call(q, k, v, options), base).dense()
}

/// Gradients of ⟨d_out, o⟩ for [`rotary_norm_attention`].
///
/// # Panics
/// As [`rotary_norm_attention`].
pub fn rotary_norm_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    base: f64,
    options: &NormOptions<Array>,
    d_out: &Array,
) -> Gradients {
    with_rotary(transnormer::norm_call(q, k, v, options), base).dense_backward(d_out)
}

/// [`performer_attention`](super::performer_attention) with rotated features in the numerator, as
/// [`rotary_linear_attention`].
///
/// # Panics
/// As [`performer_attention`](super::performer_attention), and if the features have an odd width.
pub fn rotary_performer_attention(
    q: &Array,
    k: &Array,
    v: &Array,
    omega: &Array,
    base: f64,
    options: &PerformerOptions<Array>,
) -> Array {
    with_rotary(performer::call(q, k, v, omega, options), base).dense()
}

/// Gradients of ⟨d_out, o⟩ for [`rotary_performer_attention`], the stabilisers held fixed.
///
/// # Panics
/// As [`rotary_performer_attention`].
pub fn rotary_performer_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    omega: &Array,
    base: f64,
    options: &PerformerOptions<Array>,
    d_out: &Array,
) -> Gradients {
    with_rotary(performer::call(q, k, v, omega, options), base).dense_backward(d_out)
}

fn with_rotary(call: LinearCall<'_>, base: f64) -> LinearCall<'_> {
    LinearCall { rotary: Some(base), ..call }
}
