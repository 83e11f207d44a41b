use candle_core::{Result, Tensor};

use super::LinearState;
use super::engine::{LinearCall, LinearTensors, QuadraticCall};
use super::state::ensure_causal;
use crate::transnormer::{DiagOptions, NormOptions};

/// DiagAttention of TransNormer (Qin et al. 2022, "The Devil in Linear Transformer"): attention inside blocks of w
/// positions,
///
/// ```text
/// o_i = Σ_j softmax_j(τ ⟨q_i, k_j⟩) v_j                          ⌊j/w⌋ = ⌊i/w⌋, and j ≤ i when causal
/// o_i = t_i/√(mean(t_i²) + ε),  t_i = Σ_j max(τ ⟨q_i, k_j⟩, 0) v_j    over the same j
/// ```
///
/// in time and memory O(N·w); the last block may be shorter.
///
/// q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]` → `[B, H, N, E]` in their dtype, f32, f64, f16 or bf16. w, τ,
/// the weight and the key mask are in [`DiagOptions`]; what holds for every operation is in the [module](crate::candle)
/// documentation. Gradients: q, k, v.
///
/// # Errors
/// Shapes or dtypes that do not fit together, a block size of 0, an ε that is not positive, a tracked key mask,
/// tensors on different devices or on one that the build does not compute on.
///
/// # Example
/// ```
/// use attn_kernels::candle::diag_attention;
/// use attn_kernels::transnormer::DiagOptions;
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 100, 8), &Device::Cpu)?;
/// let options = DiagOptions { block_size: 32, causal: true, ..Default::default() };
/// let out = diag_attention(&x, &x, &x, &options)?;
/// // The first position of a block sees itself alone.
/// let error = (out.narrow(2, 32, 1)? - x.narrow(2, 32, 1)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(error < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn diag_attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &DiagOptions<Tensor>) -> Result<Tensor> {
    let problem = options.problem("diag_attention", q, k, v)?;
    QuadraticCall::new(problem, [q, k, v], options.key_mask.as_ref(), None)?.output()
}

/// NormAttention of TransNormer (Qin et al. 2022, "The Devil in Linear Transformer"): linear attention with an RMS norm
/// in place of the denominator,
///
/// ```text
/// t_i = Σ_{j ≤ i} ⟨φ(q_i), φ(k_j)⟩ v_j        (all j when not causal)
/// o_i = t_i / √(mean(t_i²) + ε)               the mean over a head or over all heads
/// ```
///
/// in time and memory O(N).
///
/// q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hv, M, E]` → `[B, H, N, E]` with H = max(Hq, Hv) as in
/// [`linear_attention`](super::linear_attention), in their dtype, f32, f64, f16 or bf16. φ, ε (the stability knob of the
/// gradient), the norm, decay and key mask are in [`NormOptions`]; what holds for every operation is in the
/// [module](crate::candle) documentation. Gradients: q, k, v, and the log-decay if it is per token.
///
/// # Errors
/// Shapes or dtypes that do not fit together, an ε that is not positive, a log-decay that is NaN, above 0 or without
/// `causal`, a tracked key mask or log-decay per head, tensors on different devices or on one that the build does not
/// compute on.
///
/// # Example
/// ```
/// use attn_kernels::candle::norm_attention;
/// use attn_kernels::transnormer::NormOptions;
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 100, 8), &Device::Cpu)?;
/// let out = norm_attention(&x, &x, &x, &NormOptions { causal: true, ..Default::default() })?;
/// // Every row has mean square 1.
/// let error = (out.sqr()?.mean(3)? - 1.0)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(error < 1e-3);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn norm_attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &NormOptions<Tensor>) -> Result<Tensor> {
    call("norm_attention", q, k, v, options, None)?.output()
}

/// Causal [`norm_attention`] over the next piece of a sequence, as
/// [`linear_attention_with_state`](super::linear_attention_with_state).
///
/// # Errors
/// As [`norm_attention`]; options that are not causal; a state that
/// [`linear_attention_with_state`](super::linear_attention_with_state) refuses.
///
/// # Example
/// ```
/// use attn_kernels::candle::norm_attention_with_state;
/// use attn_kernels::transnormer::NormOptions;
/// use candle_core::{Device, Tensor};
///
/// let options = NormOptions { causal: true, ..Default::default() };
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 100, 8), &Device::Cpu)?;
/// let (out, state) = norm_attention_with_state(&x, &x, &x, &options, None)?;
/// let (next, state) = norm_attention_with_state(&x, &x, &x, &options, Some(&state))?;
/// assert_eq!((out.dims(), next.dims(), state.position()), (x.dims(), x.dims(), 200));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn norm_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &NormOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<(Tensor, LinearState)> {
    let function = "norm_attention_with_state";
    ensure_causal(function, options.causal)?;
    call(function, q, k, v, options, state)?.output_and_state()
}

fn call(
    function: &'static str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &NormOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<LinearCall> {
    let problem = options.problem(function, q, k, v)?;
    let (key_mask, log_decay) = (options.key_mask.as_ref(), options.log_decay.as_ref());
    LinearCall::new(problem, [q, k, v], LinearTensors { key_mask, log_decay, omega: None, state })
}
