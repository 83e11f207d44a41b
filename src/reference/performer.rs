use super::array::assert_shape;
use super::features::Features;
use super::finish::Finish;
use super::linear::LinearCall;
use super::{Array, Gradients, State, StateGradient};
use crate::performer::PerformerOptions;

/// Performer attention of q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hv, M, E]` with directions ω
/// `[1, 1, m, D]`, in its dense form:
///
/// ```text
/// W_ij = ⟨φ(q_i) e^{−a_i}, φ(k_j) e^{−c_i}⟩,   o_i = Σ_j W_ij v_j / (Σ_j W_ij + ε)
/// ```
///
/// over the keys j ≤ p_i when causal, else over all. φ is that of [`FavorMap`](crate::performer::FavorMap). With
/// exponential features, u(x) the exponents ±ωx̃ − ‖x̃‖²/2, the stabilisers are a_i = max_f u_f(q_i) and
/// c_i = max_{f, visible j} u_f(k_j); with ReLU features they are 0.
///
/// # Panics
/// If shapes do not fit together.
pub fn performer_attention(q: &Array, k: &Array, v: &Array, omega: &Array, options: &PerformerOptions<Array>) -> Array {
    call(q, k, v, omega, options).dense()
}

/// Gradients of ⟨d_out, o⟩ for [`performer_attention`], those of
/// [`linear_attention_backward`](super::linear_attention_backward) with the stabilised features as φ, and with
/// constant stabilisers. x receives (u = dφ ⊙ φ, ± the sign of ω in the feature)
///
/// ```text
/// dx = D^{−1/4} (Σ_f ±u_f ω_f − (Σ_f u_f) x̃)                      exponential features
/// dx = D^{−1/4} m^{−1/2} Σ_{f: ω_f x̃ > 0} dφ_f ω_f                ReLU features
/// ```
///
/// # Panics
/// As [`performer_attention`].
pub fn performer_attention_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    omega: &Array,
    options: &PerformerOptions<Array>,
    d_out: &Array,
) -> Gradients {
    call(q, k, v, omega, options).dense_backward(d_out)
}

/// [`performer_attention`] in its recurrent form, after `state` and with the state that follows; c is the running
/// maximum of the exponents, begun by the state:
///
/// ```text
/// c_t = max(c_{t−1}, max_f u_f(k_t)),   S_t = e^{c_{t−1} − c_t} S_{t−1} + φ(k_t) e^{−c_t} v_tᵀ,   z_t likewise
/// ```
///
/// # Panics
/// As [`performer_attention`], and if the state does not fit.
pub fn performer_attention_with_state(
    q: &Array,
    k: &Array,
    v: &Array,
    omega: &Array,
    options: &PerformerOptions<Array>,
    state: Option<&State>,
) -> (Array, State) {
    call(q, k, v, omega, options).recurrent(state)
}

/// Gradients of ⟨d_out, o⟩ + ⟨d_state, last state⟩ for [`performer_attention_with_state`], by its inputs and by the state given, with the
/// stabilisers held fixed; `d_state` is 0 by default.
///
/// # Panics
/// As [`performer_attention_with_state`], and if the gradients do not fit.
pub fn performer_attention_with_state_backward(
    q: &Array,
    k: &Array,
    v: &Array,
    omega: &Array,
    options: &PerformerOptions<Array>,
    state: Option<&State>,
    (d_out, d_state): (&Array, Option<&StateGradient>),
) -> (Gradients, StateGradient) {
    call(q, k, v, omega, options).recurrent_backward(state, d_out, d_state)
}

pub(super) fn call<'a>(
    q: &'a Array,
    k: &'a Array,
    v: &'a Array,
    omega: &'a Array,
    options: &'a PerformerOptions<Array>,
) -> LinearCall<'a> {
    assert!(options.sequences.is_none(), "packed sequences are defined by the calls of each");
    assert_shape("omega", omega, [1, 1, omega.shape[2], q.shape[3]]);
    assert!(omega.shape[2] > 0, "omega without directions");
    let call = LinearCall {
        q,
        k,
        v,
        features: Features::Favor { map: options.map, omega },
        causal: options.causal,
        key_mask: options.key_mask.as_ref(),
        log_decay: None,
        finish: Finish::Normalize { epsilon: options.epsilon },
        rotary: None,
    };
    call.check();
    call
}
