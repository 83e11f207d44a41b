use super::super::delta::{self as engine, DeltaInputs, DeltaOutputs, DeltaSaved};
use super::element::{Conversion, Element, ensure_element, like, room, view};
use crate::Result;
use crate::delta::DeltaOptions;
use crate::problem::{self, Delta, DeltaDecay, RankOne, View};

/// What [`gated_linear`], [`delta`] and [`generalized_delta`] return: the output and the last state, and what gradients are
/// made from.
#[derive(Debug, Clone)]
pub struct DeltaAttention<'a, T: Element> {
    problem: Delta,
    inputs: DeltaInputs<'a>,
    /// `[B, H, N, E]`, row-major.
    pub out: Vec<T>,
    /// S after the last token, `[B, Hs, D, E]`: handed to the same function with the next piece, it continues the sequence.
    pub state: Vec<T::Sum>,
}

/// Gradients of a loss, each row-major in the shape of its operand.
#[derive(Debug, Clone)]
pub struct DeltaAttentionGradients<T: Element> {
    /// `[B, Hq, N, D]`
    pub q: Vec<T>,
    /// `[B, Hk, N, D]`
    pub k: Vec<T>,
    /// `[B, Hv, N, E]`
    pub v: Vec<T>,
    /// `[B, Hs, N]`, of [`delta`].
    pub beta: Option<Vec<T::Sum>>,
    /// `[B, Hk, N, D]` each, of [`generalized_delta`].
    pub a_and_b: Option<[Vec<T>; 2]>,
    /// Of one per token or channel.
    pub log_decay: Option<Vec<T::Sum>>,
    /// `[Hs, D]`, when there is a bonus.
    pub bonus: Option<Vec<T::Sum>>,
    /// `[B, Hs, D, E]`, of the state handed in, when there was one.
    pub state: Option<Vec<T::Sum>>,
}

impl<'a, T: Element> DeltaAttention<'a, T> {
    fn new(
        function: &'static str,
        [q, k, v]: [View<'a>; 3],
        rank_one: RankOne<View<'a>>,
        options: &DeltaOptions<View<'a>>,
        state: Option<&'a [T::Sum]>,
    ) -> Result<Self> {
        let problem = options.problem(function, [&q, &k, &v], rank_one.as_ref())?;
        ensure_element::<T>(function, problem.shapes.dtype)?;
        let state = state.map(|state| view(function, "state", state, &problem.state_shape())).transpose()?;
        let DeltaOptions { log_decay, bonus, key_mask, .. } = *options;
        let inputs = DeltaInputs { q, k, v, rank_one, log_decay, bonus, key_mask, state };
        let (mut out, mut last) = (room(&[problem.output_len()]), room(&problem.state_shape()));
        let outputs = DeltaOutputs { out: T::slice_mut(&mut out), state: Some(T::Sum::slice_mut(&mut last)) };
        engine::forward(&problem, &inputs, outputs)?;
        Ok(Self { problem, inputs, out, state: last })
    }

    /// The gradients of a loss, from that of the output, `d_out` `[B, H, N, E]`, and that of the last state, `d_state`
    /// `[B, Hs, D, E]`, if the loss depends on it.
    ///
    /// # Errors
    /// Gradients of another length.
    pub fn backward(&self, d_out: &[T], d_state: Option<&[T::Sum]>) -> Result<DeltaAttentionGradients<T>> {
        let (function, shapes) = (self.problem.function, &self.problem.shapes);
        let dims = [shapes.batch, shapes.heads(), shapes.tokens, shapes.value_width];
        let states = self.problem.state_shape();
        let saved = DeltaSaved {
            d_out: view(function, "d_out", d_out, &dims)?,
            d_state: d_state.map(|state| view(function, "d_state", state, &states)).transpose()?,
        };
        let DeltaInputs { q, k, v, rank_one, log_decay, bonus, state, .. } = &self.inputs;
        let has_gradient = matches!(shapes.decay, DeltaDecay::Token | DeltaDecay::Channel);
        let (mut d_beta, mut d_a, mut d_b) = Default::default();
        let mut gradients = DeltaAttentionGradients {
            q: like(q),
            k: like(k),
            v: like(v),
            beta: None,
            a_and_b: None,
            log_decay: log_decay.as_ref().filter(|_| has_gradient).map(like),
            bonus: bonus.as_ref().map(like),
            state: state.as_ref().map(like),
        };
        let room = problem::DeltaGradients {
            q: T::slice_mut(&mut gradients.q),
            k: T::slice_mut(&mut gradients.k),
            v: T::slice_mut(&mut gradients.v),
            rank_one: match rank_one {
                RankOne::None => RankOne::None,
                RankOne::Rule { beta } => {
                    d_beta = like(beta);
                    RankOne::Rule { beta: T::Sum::slice_mut(&mut d_beta) }
                }
                RankOne::Free { a, b } => {
                    (d_a, d_b) = (like(a), like(b));
                    RankOne::Free { a: T::slice_mut(&mut d_a), b: T::slice_mut(&mut d_b) }
                }
            },
            log_decay: gradients.log_decay.as_mut().map(|log_decay| T::Sum::slice_mut(log_decay)),
            bonus: gradients.bonus.as_mut().map(|bonus| T::Sum::slice_mut(bonus)),
            state: gradients.state.as_mut().map(|state| T::Sum::slice_mut(state)),
        };
        engine::backward(&self.problem, &self.inputs, &saved, room)?;
        match rank_one {
            RankOne::None => {}
            RankOne::Rule { .. } => gradients.beta = Some(d_beta),
            RankOne::Free { .. } => gradients.a_and_b = Some([d_a, d_b]),
        }
        Ok(gradients)
    }
}

/// Linear attention with a decay per channel (GLA, HGRN-2), in time and memory O(N):
///
/// ```text
/// S_t = Diag(e^{g_t}) S_{t−1} + k_t v_tᵀ,   o_t = τ S_tᵀ q_t
/// ```
///
/// q `[B, Hq, N, D]`, k `[B, Hk, N, D]`, v `[B, Hv, N, E]` → `[B, H, N, E]`, after `state` `[B, Hs, D, E]` (0 by default). g,
/// τ, the bonus of RWKV-6, norms and key mask are in [`DeltaOptions`], what holds for every operation at the
/// [crate's root](crate#conventions).
///
/// # Errors
/// Shapes or dtypes that do not fit together, results asked for in another dtype than that of q, a log-decay that is NaN or
/// above 0, no log-decay per channel where there is no bonus, a state of another length.
///
/// # Example
/// ```
/// use attn_kernels::{DeltaOptions, cpu, problem::View};
///
/// let x: Vec<f32> = (0..30 * 8).map(|i| (i as f32).sin()).collect();
/// let g: Vec<f32> = x.iter().map(|x| -x.abs()).collect();
/// let whole = View::contiguous(&x[..], &[1, 1, 30, 8])?;
/// let options = DeltaOptions { log_decay: Some(View::contiguous(&g[..], &[1, 1, 30, 8])?), ..Default::default() };
/// let all = cpu::gated_linear::<f32>(whole, whole, whole, &options, None)?;
///
/// // The same as a prompt and a token.
/// let ((x, last), (g, last_g)) = (x.split_at(29 * 8), g.split_at(29 * 8));
/// let prompt = View::contiguous(x, &[1, 1, 29, 8])?;
/// let options = DeltaOptions { log_decay: Some(View::contiguous(g, &[1, 1, 29, 8])?), ..Default::default() };
/// let state = cpu::gated_linear::<f32>(prompt, prompt, prompt, &options, None)?.state;
/// let token = View::contiguous(last, &[1, 1, 1, 8])?;
/// let options = DeltaOptions { log_decay: Some(View::contiguous(last_g, &[1, 1, 1, 8])?), ..Default::default() };
/// let token = cpu::gated_linear::<f32>(token, token, token, &options, Some(&state))?;
/// assert!(token.out.iter().zip(&all.out[29 * 8..]).all(|(x, y)| (x - y).abs() < 1e-5));
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn gated_linear<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    options: &DeltaOptions<View<'a>>,
    state: Option<&'a [T::Sum]>,
) -> Result<DeltaAttention<'a, T>> {
    DeltaAttention::new("cpu::gated_linear", [q, k, v], RankOne::None, options, state)
}

/// The delta rule (DeltaNet; with a log-decay Gated DeltaNet and Kimi Delta Attention): what the state holds under a key is
/// replaced by the value, to the part β:
///
/// ```text
/// S'_t = Diag(e^{g_t}) S_{t−1},   S_t = S'_t + β_t k_t (v_t − S'_tᵀ k_t)ᵀ,   o_t = τ S_tᵀ q_t
/// ```
///
/// β is `[B, Hs, N]` in the type of sums; everything else as in [`gated_linear`], but that there is no bonus. Keys should have norms of about 1 (see
/// [`DeltaOptions::normalize`]): the state grows without bound where β‖k‖² is above 2.
///
/// # Errors
/// As [`gated_linear`], but that the log-decay is optional and may be per head, token or channel; a bonus.
///
/// # Example
/// ```
/// use attn_kernels::{DeltaOptions, cpu, problem::View};
///
/// let x: Vec<f32> = (0..20 * 8).map(|i| (i as f32).sin()).collect();
/// let x = View::contiguous(&x[..], &[1, 2, 10, 8])?;
/// let beta = [0.5f32; 2 * 10];
/// let options = DeltaOptions { normalize: Some(1e-6), ..Default::default() };
/// let attention = cpu::delta::<f32>(x, x, x, View::contiguous(&beta[..], &[1, 2, 10])?, &options, None)?;
/// assert_eq!(attention.backward(&attention.out, None)?.beta.map(|beta| beta.len()), Some(20));
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn delta<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    beta: View<'a>,
    options: &DeltaOptions<View<'a>>,
    state: Option<&'a [T::Sum]>,
) -> Result<DeltaAttention<'a, T>> {
    DeltaAttention::new("cpu::delta", [q, k, v], RankOne::Rule { beta }, options, state)
}

/// Linear attention with any transition of a diagonal and rank one (RWKV-7):
///
/// ```text
/// S_t = Diag(e^{g_t}) S_{t−1} + a_t b_tᵀ S_{t−1} + k_t v_tᵀ,   o_t = τ S_tᵀ q_t
/// ```
///
/// a and b are `[B, Hk, N, D]`, as k; everything else as in [`delta`].
///
/// # Errors
/// As [`delta`].
pub fn generalized_delta<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    [a, b]: [View<'a>; 2],
    options: &DeltaOptions<View<'a>>,
    state: Option<&'a [T::Sum]>,
) -> Result<DeltaAttention<'a, T>> {
    DeltaAttention::new("cpu::generalized_delta", [q, k, v], RankOne::Free { a, b }, options, state)
}
