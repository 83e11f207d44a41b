use candle_core::{Result, Tensor};

use super::LinearState;
use super::engine::{LinearCall, LinearTensors};
use super::state::ensure_causal;
use crate::performer::PerformerOptions;

/// Performer attention (FAVOR+, Choromanski et al. 2020): linear attention whose features estimate softmax attention
/// with τ = 1/√D,
///
/// ```text
/// φ(x) = m^{-1/2} exp(ω x̃ − ‖x̃‖²/2),  x̃ = x/D^{1/4}      or another FavorMap
/// o_t  = φ(q_t) S_t / (⟨φ(q_t), z_t⟩ + ε),  S = Σ φ(k) vᵀ,  z = Σ φ(k)
/// ```
///
/// with the sums over the keys up to t, or over all when not causal. Time and memory are O(N).
///
/// q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hv, M, E]` → `[B, H, N, E]` with H = max(Hq, Hv) as in
/// [`linear_attention`](super::linear_attention), in their dtype, f32, f64, f16 or bf16. `omega` is `[m, D]` in f32
/// (f64 for f64 inputs), from [`random_features`](crate::random_features::random_features) for example: the same ω for
/// all calls of a layer. [`PerformerOptions`] says how exponents are kept in range and when the estimate is good; what
/// holds for every operation is in the [module](crate::candle) documentation. Gradients: q, k, v.
///
/// # Errors
/// Shapes or dtypes that do not fit together, a negative ε, a tracked ω or key mask, tensors on
/// different devices or on one that the build does not compute on.
///
/// # Example
/// ```
/// use attn_kernels::candle::performer_attention;
/// use attn_kernels::performer::PerformerOptions;
/// use attn_kernels::random_features::{FeatureKind, random_features};
/// use candle_core::{DType, Device, Tensor};
///
/// let omega = random_features(FeatureKind::Orthogonal, 32, 8, 0)?;
/// let omega = Tensor::from_vec(omega, (32, 8), &Device::Cpu)?.to_dtype(DType::F32)?;
/// let x = Tensor::randn(0f32, 0.25, (1, 2, 100, 8), &Device::Cpu)?;
/// let options = PerformerOptions { causal: true, ..Default::default() };
/// assert_eq!(performer_attention(&x, &x, &x, &omega, &options)?.dims(), [1, 2, 100, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn performer_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    omega: &Tensor,
    options: &PerformerOptions<Tensor>,
) -> Result<Tensor> {
    call("performer_attention", [q, k, v], omega, options, None)?.output()
}

/// Causal [`performer_attention`] over the next piece of a sequence, as
/// [`linear_attention_with_state`](super::linear_attention_with_state). The state holds the stabiliser of the keys too,
/// so pieces give the output of the whole. The same `omega` must be passed with every piece.
///
/// # Errors
/// As [`performer_attention`]; options that are not causal; a state that
/// [`linear_attention_with_state`](super::linear_attention_with_state) refuses.
///
/// # Example
/// ```
/// use attn_kernels::candle::performer_attention_with_state;
/// use attn_kernels::performer::PerformerOptions;
/// use candle_core::{Device, Tensor};
///
/// let omega = Tensor::randn(0f32, 1.0, (32, 8), &Device::Cpu)?;
/// let options = PerformerOptions { causal: true, ..Default::default() };
/// let mut state = None;
/// for _ in 0..3 {
///     let token = Tensor::randn(0f32, 0.25, (1, 2, 1, 8), &Device::Cpu)?;
///     let (out, next) = performer_attention_with_state(&token, &token, &token, &omega, &options, state.as_ref())?;
///     assert_eq!(out.dims(), [1, 2, 1, 8]);
///     state = Some(next);
/// }
/// assert_eq!(state.map(|state| state.position()), Some(3));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn performer_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    omega: &Tensor,
    options: &PerformerOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<(Tensor, LinearState)> {
    let function = "performer_attention_with_state";
    ensure_causal(function, options.causal)?;
    call(function, [q, k, v], omega, options, state)?.output_and_state()
}

fn call(
    function: &'static str,
    [q, k, v]: [&Tensor; 3],
    omega: &Tensor,
    options: &PerformerOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<LinearCall> {
    let problem = options.problem(function, q, k, v, omega)?;
    let tensors = LinearTensors { key_mask: options.key_mask.as_ref(), log_decay: None, omega: Some(omega), state };
    LinearCall::new(problem, [q, k, v], tensors)
}
