use super::array::dot;
use super::quadratic::{Scores, kept_keys, relu_squared, relu_squared_backward};
use super::{Array, Gradients};
use crate::gau::{GauNorm, GauOptions};

/// Squared-ReLU attention of q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]`:
///
/// ```text
/// s_ij = c ⟨q_i, k_j⟩ + bias[R + j − p_i],   a_ij = r_i relu(s_ij)²,   o_i = Σ_j a_ij v_j
/// ```
///
/// over the visible j. c and r_i are those of [`GauNorm`]: c = 1/n, r = 1 (length); c = 1, r = 1/(n·D) (length and
/// width), where n counts the keys that the key mask leaves in the batch entry, at least 1; c = 1/√D, r_i = 1/(Σ_j relu(s_ij)² + ε), 0 for a zero divisor (row sum); c = 1/n₀, r = 1 (fixed).
///
/// # Panics
/// If shapes do not fit together, or a visible distance is outside the bias.
pub fn gau_attention(q: &Array, k: &Array, v: &Array, options: &GauOptions<Array>) -> Array {
    let scaling = Scaling::new(k, options);
    scores(q, k, v, options, &scaling).output(|[b, ..], row| scaling.weights(b, &row.scores))
}

/// Gradients of ⟨d_out, o⟩ for [`gau_attention`]; `d_out` is `[B, H, N, E]`. With x = relu(s), da_ij = ⟨do_i, v_j⟩:
///
/// ```text
/// dv_j = Σ_i a_ij do_i,   ds_ij = 2 r_i x_ij da_ij,   for the row sum 2 r_i x_ij (da_ij − Σ_l a_il da_il)
/// dq_i = c Σ_j ds_ij k_j,   dk_j = c Σ_i ds_ij q_i,   dbias_d = Σ_{j − p_i = d} ds_ij
/// ```
///
/// # Panics
/// As [`gau_attention`].
pub fn gau_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &GauOptions<Array>,
    d_out: &Array,
) -> Gradients {
    let scaling = Scaling::new(k, options);
    scores(q, k, v, options, &scaling).backward(
        d_out,
        |[b, ..], row| scaling.weights(b, &row.scores),
        |[b, ..], row, d_weights| scaling.backward(b, &row.scores, d_weights),
    )
}

fn scores<'a>(
    q: &'a Array,
    k: &'a Array,
    v: &'a Array,
    options: &'a GauOptions<Array>,
    scaling: &Scaling,
) -> Scores<'a> {
    assert!(options.sequences.is_none(), "packed sequences are defined by the calls of each");
    Scores {
        q,
        k,
        v,
        mask: options.mask,
        scales: scaling.inside.clone(),
        soft_cap: None,
        key_mask: options.key_mask.as_ref(),
        bias: options.bias.as_ref(),
        attention_bias: None,
    }
}

/// The numbers behind a [`GauNorm`].
struct Scaling {
    /// c of the batch entries
    inside: Vec<f64>,
    /// r of the batch entries, unless it is that of the row sum
    outside: Vec<f64>,
    /// ε of the row sum
    row_sum: Option<f64>,
}

impl Scaling {
    fn new(k: &Array, options: &GauOptions<Array>) -> Self {
        let [batch, _, keys, width] = k.shape;
        let count = |b| kept_keys(options.key_mask.as_ref(), b, keys);
        let of_entry = |b| match options.norm {
            GauNorm::Length => (1.0 / count(b), 1.0),
            GauNorm::LengthWidth => (1.0, 1.0 / (count(b) * width as f64)),
            GauNorm::RowSum { .. } => (1.0 / (width as f64).sqrt(), 1.0),
            GauNorm::Fixed { length } => (1.0 / length, 1.0),
        };
        let (inside, outside) = (0..batch).map(of_entry).unzip();
        let row_sum = if let GauNorm::RowSum { epsilon } = options.norm { Some(epsilon) } else { None };
        Self { inside, outside, row_sum }
    }

    /// r_i
    fn outside(&self, b: usize, scores: &[f64]) -> f64 {
        let Some(epsilon) = self.row_sum else { return self.outside[b] };
        let divisor = relu_squared(scores).iter().sum::<f64>() + epsilon;
        if divisor == 0.0 { 0.0 } else { 1.0 / divisor }
    }

    fn weights(&self, b: usize, scores: &[f64]) -> Vec<f64> {
        let outside = self.outside(b, scores);
        relu_squared(scores).iter().map(|square| outside * square).collect()
    }

    fn backward(&self, b: usize, scores: &[f64], d_weights: &[f64]) -> Vec<f64> {
        let outside = self.outside(b, scores);
        let mean = if self.row_sum.is_some() { dot(&self.weights(b, scores), d_weights) } else { 0.0 };
        let d_squares: Vec<f64> = d_weights.iter().map(|d| outside * (d - mean)).collect();
        relu_squared_backward(scores, &d_squares)
    }
}
