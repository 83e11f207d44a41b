use super::array::assert_shape;
use super::features::Features;
use super::finish::Finish;
use super::pairs::{is_kept, shared_head};
use super::{Array, Gradients, State, StateGradient};
use crate::linear::LinearOptions;

/// Linear attention of q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hv, M, E]`, in its dense form:
///
/// ```text
/// W_ij = ⟨φ(q_i), φ(k_j)⟩ · exp(Σ_{j < t ≤ p_i} g_t),   o_i = Σ_j W_ij v_j / (Σ_j W_ij + ε)
/// ```
///
/// over the keys j ≤ p_i when causal, else over all; `[B, H, N, E]` with H = max(Hq, Hv). Without a normaliser there
/// is no divisor; a zero divisor gives 0. The log-decay g ≤ 0, causal only, has Hs = max(Hk, Hv) heads; −∞ cuts off
/// what came before. At masked keys g counts as 0, whatever is given there.
///
/// # Panics
/// If shapes do not fit together, or a log-decay is given without `causal`.
pub fn linear_attention(q: &Array, k: &Array, v: &Array, options: &LinearOptions<Array>) -> Array {
    call(q, k, v, options).dense()
}

/// Gradients of ⟨d_out, o⟩ for [`linear_attention`]; `d_out` is `[B, H, N, E]`. With dn_i = do_i/(den_i + ε) and
/// dd_i = −⟨do_i, o_i⟩/(den_i + ε) (do_i and 0 without a normaliser), and γ_ij the decay of the pair:
///
/// ```text
/// dW_ij = ⟨dn_i, v_j⟩ + dd_i,   dv_j = Σ_i W_ij dn_i
/// dφ(q_i) = Σ_j dW_ij γ_ij φ(k_j),   dφ(k_j) = Σ_i dW_ij γ_ij φ(q_i),   dg_t = Σ_{i, j: j < t ≤ p_i} dW_ij W_ij
/// ```
///
/// # Panics
/// As [`linear_attention`].
pub fn linear_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &LinearOptions<Array>,
    d_out: &Array,
) -> Gradients {
    call(q, k, v, options).dense_backward(d_out)
}

/// [`linear_attention`] in its recurrent form, after `state` and with the state that follows:
///
/// ```text
/// S_t = e^{g_t} S_{t−1} + φ(k_t) v_tᵀ,   z_t = e^{g_t} z_{t−1} + φ(k_t),   o_i = φ(q_i) S_{p_i} / (⟨φ(q_i), z_{p_i}⟩ + ε)
/// ```
///
/// Not causal: every query reads the last state. A query with p_i < 0 reads the state given.
///
/// # Panics
/// As [`linear_attention`], and if the state does not fit.
pub fn linear_attention_with_state(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &LinearOptions<Array>,
    state: Option<&State>,
) -> (Array, State) {
    call(q, k, v, options).recurrent(state)
}

/// Gradients of ⟨d_out, o⟩ + ⟨d_state, last state⟩ for [`linear_attention_with_state`], by its inputs and by the state given; `d_state` is 0 by default.
///
/// # Panics
/// As [`linear_attention_with_state`], and if the gradients do not fit.
pub fn linear_attention_with_state_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    options: &LinearOptions<Array>,
    state: Option<&State>,
    (d_out, d_state): (&Array, Option<&StateGradient>),
) -> (Gradients, StateGradient) {
    call(q, k, v, options).recurrent_backward(state, d_out, d_state)
}

pub(super) fn call<'a>(q: &'a Array, k: &'a Array, v: &'a Array, options: &'a LinearOptions<Array>) -> LinearCall<'a> {
    assert!(options.sequences.is_none(), "packed sequences are defined by the calls of each");
    let call = LinearCall {
        q,
        k,
        v,
        features: Features::Plain(options.map),
        causal: options.causal,
        key_mask: options.key_mask.as_ref(),
        log_decay: options.log_decay.as_ref(),
        finish: options.normalizer.map_or(Finish::None, |epsilon| Finish::Normalize { epsilon }),
        rotary: None,
    };
    call.check();
    call
}

/// One call of an operation of the linear family.
pub(super) struct LinearCall<'a> {
    pub q: &'a Array,
    pub k: &'a Array,
    pub v: &'a Array,
    pub features: Features<'a>,
    pub causal: bool,
    pub key_mask: Option<&'a Array>,
    pub log_decay: Option<&'a Array>,
    pub finish: Finish,
    /// Base of the rotary embedding, in the dense form.
    pub rotary: Option<f64>,
}

impl LinearCall<'_> {
    pub fn check(&self) {
        let [batch, query_heads, _, width] = self.q.shape;
        let [_, key_heads, keys, _] = self.k.shape;
        let [_, value_heads, _, value_width] = self.v.shape;
        assert_shape("q", self.q, self.q.shape);
        assert_shape("k", self.k, [batch, key_heads, keys, width]);
        assert_shape("v", self.v, [batch, value_heads, keys, value_width]);
        assert!(query_heads.min(key_heads).min(value_heads) > 0, "an operand without heads");
        let (heads, state_heads) = (self.heads(), self.state_heads());
        assert!(
            heads % query_heads == 0
                && heads % state_heads == 0
                && state_heads % key_heads == 0
                && state_heads % value_heads == 0,
            "heads of q, k, v: {query_heads}, {key_heads}, {value_heads}"
        );
        if let Some(key_mask) = self.key_mask {
            assert_shape("key_mask", key_mask, [1, 1, batch, keys]);
        }
        if let Some(log_decay) = self.log_decay {
            assert!(self.causal, "log_decay without causal");
            let per_head = log_decay.shape == [1, 1, 1, state_heads];
            let needs = if per_head { log_decay.shape } else { [1, batch, state_heads, keys] };
            assert_shape("log_decay", log_decay, needs);
        }
    }

    /// H
    pub fn heads(&self) -> usize {
        self.q.shape[1].max(self.v.shape[1])
    }

    /// Hs, the heads of the state and of the log-decay.
    pub fn state_heads(&self) -> usize {
        self.k.shape[1].max(self.v.shape[1])
    }

    /// D'
    pub fn feature_width(&self) -> usize {
        self.features.width(self.q.shape[3])
    }

    /// Where g of output head `h` at key `t` lies in the data of the log-decay.
    pub fn decay_index(&self, log_decay: &Array, b: usize, h: usize, t: usize) -> usize {
        let (state_heads, keys) = (self.state_heads(), self.k.shape[2]);
        let head = shared_head(h, self.heads(), state_heads);
        if log_decay.shape == [1, 1, 1, state_heads] { head } else { (b * state_heads + head) * keys + t }
    }

    /// g of output head `h` at key `t`; 0 without decay and at masked keys.
    pub fn log_decay_at(&self, b: usize, h: usize, t: usize) -> f64 {
        match self.log_decay.filter(|_| is_kept(self.key_mask, b, t)) {
            Some(log_decay) => log_decay.data[self.decay_index(log_decay, b, h, t)],
            None => 0.0,
        }
    }
}
