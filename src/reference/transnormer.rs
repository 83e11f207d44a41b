use super::array::assert_shape;
use super::features::Features;
use super::finish::{Finish, rms_norm, rms_norm_backward};
use super::linear::LinearCall;
use super::quadratic::{Scores, relu};
use super::softmax::{softmax, softmax_backward};
use super::{Array, Gradients, State, StateGradient};
use crate::problem::Mask;
use crate::transnormer::{DiagOptions, DiagWeight, NormOptions, NormScope};

/// Attention inside blocks of w positions, of q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]`:
///
/// ```text
/// s_ij = τ ⟨q_i, k_j⟩     over the j with ⌊j/w⌋ = ⌊p_i/w⌋, and j ≤ p_i when causal
/// softmax:  o_i = Σ_j softmax_j(s_ij) v_j
/// ReLU:     t_i = Σ_j relu(s_ij) v_j,   o_i = t_i/√(mean_E(t_i²) + ε)
/// ```
///
/// # Panics
/// If shapes do not fit together, or the block size is 0.
pub fn diag_attention(q: &Array, k: &Array, v: &Array, options: &DiagOptions<Array>) -> Array {
    let scores = diag_scores(q, k, v, options);
    match options.weight {
        DiagWeight::Softmax => scores.output(|_, row| softmax(&row.scores)),
        DiagWeight::Relu { epsilon } => {
            rms_norm(&scores.output(|_, row| relu_weights(&row.scores)), epsilon, NormScope::Head)
        }
    }
}

/// Gradients of ⟨d_out, o⟩ for [`diag_attention`]; `d_out` is `[B, H, N, E]`. Softmax: those of
/// [`softmax_attention_backward`](super::softmax_attention_backward). ReLU, with r_i = √(mean t_i² + ε):
///
/// ```text
/// dt_i = (do_i − o_i mean(o_i ⊙ do_i))/r_i,   dv_j = Σ_i relu(s_ij) dt_i,   ds_ij = [s_ij > 0] ⟨dt_i, v_j⟩
/// dq_i = τ Σ_j ds_ij k_j,   dk_j = τ Σ_i ds_ij q_i
/// ```
///
/// # Panics
/// As [`diag_attention`].
pub fn diag_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &DiagOptions<Array>,
    d_out: &Array,
) -> Gradients {
    let scores = diag_scores(q, k, v, options);
    match options.weight {
        DiagWeight::Softmax => {
            scores.backward(d_out, |_, row| softmax(&row.scores), |_, row, d| softmax_backward(&row.scores, d))
        }
        DiagWeight::Relu { epsilon } => {
            let sums = scores.output(|_, row| relu_weights(&row.scores));
            assert_shape("d_out", d_out, sums.shape);
            let d_sums = rms_norm_backward(&sums, epsilon, NormScope::Head, d_out);
            scores.backward(
                &d_sums,
                |_, row| relu_weights(&row.scores),
                |_, row, d| row.scores.iter().zip(d).map(|(&s, &d)| if s > 0.0 { d } else { 0.0 }).collect(),
            )
        }
    }
}

fn relu_weights(scores: &[f64]) -> Vec<f64> {
    scores.iter().copied().map(relu).collect()
}

fn diag_scores<'a>(q: &'a Array, k: &'a Array, v: &'a Array, options: &'a DiagOptions<Array>) -> Scores<'a> {
    assert!(options.sequences.is_none(), "packed sequences are defined by the calls of each");
    Scores {
        q,
        k,
        v,
        mask: Mask::Blocks { size: options.block_size, causal: options.causal },
        scales: vec![options.scale.unwrap_or(1.0 / (q.shape[3] as f64).sqrt()); q.shape[0]],
        soft_cap: None,
        key_mask: options.key_mask.as_ref(),
        bias: None,
        attention_bias: None,
    }
}

/// Normalised linear attention of q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hv, M, E]`, in its dense form:
///
/// ```text
/// W_ij = ⟨φ(q_i), φ(k_j)⟩ · exp(Σ_{j < t ≤ p_i} g_t),   t_i = Σ_j W_ij v_j,   o_i = t_i/√(mean(t_i²) + ε)
/// ```
///
/// over the keys j ≤ p_i when causal, else over all; `[B, H, N, E]` with H = max(Hq, Hv). The mean runs over the E
/// values of the head or over the H·E values of all heads of the token.
///
/// # Panics
/// If shapes do not fit together, or a log-decay is given without `causal`.
pub fn norm_attention(q: &Array, k: &Array, v: &Array, options: &NormOptions<Array>) -> Array {
    norm_call(q, k, v, options).dense()
}

/// Gradients of ⟨d_out, o⟩ for [`norm_attention`], those of
/// [`linear_attention_backward`](super::linear_attention_backward) without a normaliser for
///
/// ```text
/// dt_i = (do_i − o_i mean(o_i ⊙ do_i))/r_i,   r_i = √(mean(t_i²) + ε)
/// ```
///
/// # Panics
/// As [`norm_attention`].
pub fn norm_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &NormOptions<Array>,
    d_out: &Array,
) -> Gradients {
    norm_call(q, k, v, options).dense_backward(d_out)
}

/// [`norm_attention`] in its recurrent form, after `state` and with the state that follows; as
/// [`linear_attention_with_state`](super::linear_attention_with_state) with o_i the norm of φ(q_i) S.
///
/// # Panics
/// As [`norm_attention`], and if the state does not fit.
pub fn norm_attention_with_state(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &NormOptions<Array>,
    state: Option<&State>,
) -> (Array, State) {
    norm_call(q, k, v, options).recurrent(state)
}

/// Gradients of ⟨d_out, o⟩ + ⟨d_state, last state⟩ for [`norm_attention_with_state`], by its inputs and by the state given; `d_state` is 0 by default.
///
/// # Panics
/// As [`norm_attention_with_state`], and if the gradients do not fit.
pub fn norm_attention_with_state_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &NormOptions<Array>,
    state: Option<&State>,
    (d_out, d_state): (&Array, Option<&StateGradient>),
) -> (Gradients, StateGradient) {
    norm_call(q, k, v, options).recurrent_backward(state, d_out, d_state)
}

pub(super) fn norm_call<'a>(
    q: &'a Array,
    k: &'a Array,
    v: &'a Array,
    options: &'a NormOptions<Array>,
) -> LinearCall<'a> {
    assert!(options.sequences.is_none(), "packed sequences are defined by the calls of each");
    let call = LinearCall {
        q,
        k,
        v,
        features: Features::Plain(options.map),
        causal: options.causal,
        key_mask: options.key_mask.as_ref(),
        log_decay: options.log_decay.as_ref(),
        finish: Finish::RmsNorm { epsilon: options.epsilon, scope: options.norm },
        rotary: None,
    };
    call.check();
    call
}
