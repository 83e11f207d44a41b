use super::array::{assert_shape, dot};
use super::quadratic::{Row, Scores, rows};
use super::{Array, Gradients};
use crate::softmax::SoftmaxOptions;

/// What [`softmax_attention`] returns.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftmaxOutput {
    /// o `[B, H, N, E]`
    pub out: Array,
    /// L `[B, H, N, 1]`, the logarithm of Σ_j exp(s_ij), in which a sink counts; −∞ for a row that sees none of them.
    pub log_sum_exp: Array,
}

/// Softmax attention of q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]`:
///
/// ```text
/// s_ij = cap(τ ⟨q_i, k_j⟩) + bias[R + j − p_i] + b_ij,   L_i = ln(e^sink + Σ_j exp(s_ij)),   o_i = Σ_j exp(s_ij − L_i) v_j
/// ```
///
/// over the visible j, e^sink = 0 without sinks, the weights exp(s_ij − L_i) times those of dropout; o_i = 0 and L_i = −∞
/// where nothing is seen.
///
/// # Panics
/// If shapes do not fit together, or a visible distance is outside the bias.
pub fn softmax_attention(q: &Array, k: &Array, v: &Array, options: &SoftmaxOptions<Array>) -> SoftmaxOutput {
    let scores = scores(q, k, v, options);
    let out = scores.output(|at, row| dropped(options, at, row, softmax_beside(&row.scores, sink(options, at[1])).0));
    let mut log_sum_exp = Array::zeros([out.shape[0], out.shape[1], out.shape[2], 1]);
    for [b, h, i] in rows(&out) {
        log_sum_exp.row_mut(b, h, i)[0] = log_sum_exp_of(&scores.row(b, h, i).scores, sink(options, h));
    }
    SoftmaxOutput { out, log_sum_exp }
}

/// Gradients of ⟨d_out, o⟩ + ⟨d_log_sum_exp, L⟩ for [`softmax_attention`]; `d_out` is `[B, H, N, E]`,
/// `d_log_sum_exp` `[B, H, N, 1]`:
///
/// ```text
/// dv_j = Σ_i P_ij do_i,   dP_ij = ⟨do_i, v_j⟩,   ds_ij = P_ij (dP_ij − δ_i),   δ_i = Σ_l P_il dP_il − dL_i
/// dq_i = τ Σ_j cap′ ds_ij k_j,   dk_j = τ Σ_i cap′ ds_ij q_i,   dbias_d = Σ_{j − p_i = d} ds_ij,   db_ij = ds_ij
/// dsink = −Σ_i exp(sink − L_i) δ_i
/// ```
///
/// # Panics
/// As [`softmax_attention`].
pub fn softmax_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &SoftmaxOptions<Array>,
    d_out: &Array,
    d_log_sum_exp: Option<&Array>,
) -> Gradients {
    if let Some(d_log_sum_exp) = d_log_sum_exp {
        assert_shape("d_log_sum_exp", d_log_sum_exp, [q.shape[0], q.shape[1], q.shape[2], 1]);
    }
    let scores = scores(q, k, v, options);
    let delta = |[b, h, i]: [usize; 3], weights: &[f64], d_weights: &[f64]| {
        dot(weights, d_weights) - d_log_sum_exp.map_or(0.0, |d| d.row(b, h, i)[0])
    };
    let mut gradients = scores.backward(
        d_out,
        |at, row| dropped(options, at, row, softmax_beside(&row.scores, sink(options, at[1])).0),
        |at, row, d_weights| {
            let weights = softmax_beside(&row.scores, sink(options, at[1])).0;
            let d_weights = &dropped(options, at, row, d_weights.to_vec());
            let delta = delta(at, &weights, d_weights);
            weights.iter().zip(d_weights).map(|(weight, d)| weight * (d - delta)).collect()
        },
    );
    gradients.sinks = options.sinks.as_ref().map(|sinks| {
        let mut d_sinks = Array::zeros(sinks.shape);
        for [b, h, i] in rows(d_out) {
            let row = scores.row(b, h, i);
            let (weights, share) = softmax_beside(&row.scores, sink(options, h));
            let d_weights = dropped(options, [b, h, i], &row, scores.d_weights([b, h, i], &row, d_out));
            d_sinks.data[h] -= share * delta([b, h, i], &weights, &d_weights);
        }
        d_sinks
    });
    gradients
}

fn scores<'a>(q: &'a Array, k: &'a Array, v: &'a Array, options: &'a SoftmaxOptions<Array>) -> Scores<'a> {
    assert!(options.sequences.is_none(), "packed sequences are defined by the calls of each");
    if let Some(sinks) = &options.sinks {
        assert_shape("sinks", sinks, [1, 1, 1, q.shape[1]]);
    }
    Scores {
        q,
        k,
        v,
        mask: options.mask,
        scales: vec![options.scale.unwrap_or(1.0 / (q.shape[3] as f64).sqrt()); q.shape[0]],
        soft_cap: options.soft_cap,
        key_mask: options.key_mask.as_ref(),
        bias: options.bias.as_ref(),
        attention_bias: options.attention_bias.as_ref(),
    }
}

/// Weights of row `[b, h, i]`, or their derivatives, times m/(1 − p).
fn dropped(options: &SoftmaxOptions<Array>, [b, h, i]: [usize; 3], row: &Row, mut weights: Vec<f64>) -> Vec<f64> {
    if let Some(dropout) = options.dropout {
        weights.iter_mut().zip(&row.keys).for_each(|(weight, &j)| *weight *= dropout.factor([b, h, i, j]));
    }
    weights
}

/// The score of a head's sink: −∞ without one.
fn sink(options: &SoftmaxOptions<Array>, h: usize) -> f64 {
    options.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| sinks.data[h])
}

/// exp(s)/Σ exp(s); all 0 when every s is −∞.
pub(super) fn softmax(scores: &[f64]) -> Vec<f64> {
    softmax_beside(scores, f64::NEG_INFINITY).0
}

/// The weights of keys and that of a sink, which are 1 together; 0 when every score is −∞.
fn softmax_beside(scores: &[f64], sink: f64) -> (Vec<f64>, f64) {
    if all_removed(scores) && sink == f64::NEG_INFINITY {
        return (vec![0.0; scores.len()], 0.0);
    }
    let max = scores.iter().copied().fold(sink, f64::max);
    let sum: f64 = (sink - max).exp() + scores.iter().map(|s| (s - max).exp()).sum::<f64>();
    (scores.iter().map(|s| (s - max).exp() / sum).collect(), (sink - max).exp() / sum)
}

/// ds = P ⊙ (dP − ⟨P, dP⟩)
pub(super) fn softmax_backward(scores: &[f64], d_weights: &[f64]) -> Vec<f64> {
    let weights = softmax(scores);
    let mean = dot(&weights, d_weights);
    weights.iter().zip(d_weights).map(|(weight, d)| weight * (d - mean)).collect()
}

fn log_sum_exp_of(scores: &[f64], sink: f64) -> f64 {
    if all_removed(scores) && sink == f64::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let max = scores.iter().copied().fold(sink, f64::max);
    max + ((sink - max).exp() + scores.iter().map(|s| (s - max).exp()).sum::<f64>()).ln()
}

/// Whether no key is seen: there is none, or the bias of each is −∞.
fn all_removed(scores: &[f64]) -> bool {
    scores.iter().all(|&s| s == f64::NEG_INFINITY)
}
