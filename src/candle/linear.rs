use candle_core::{Result, Tensor};

use super::LinearState;
use super::engine::{LinearCall, LinearTensors};
use super::state::ensure_causal;
use crate::linear::LinearOptions;

/// Linear attention (Katharopoulos et al. 2020; not causal: Shen et al. 2018), with the decays of RetNet (Sun et al.
/// 2023), Lightning Attention (Qin et al. 2024) and Mamba-2 (Dao & Gu 2024):
///
/// ```text
/// S_t = e^{g_t} S_{t−1} + φ(k_t) v_tᵀ      z_t = e^{g_t} z_{t−1} + φ(k_t)
/// o_t = φ(q_t) S_t / (⟨φ(q_t), z_t⟩ + ε)   or without the divisor
/// ```
///
/// Not causal: S and z are those of the whole sequence for every query. Time and memory are O(N).
///
/// q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hv, M, E]` → `[B, H, N, E]` with H = max(Hq, Hv), in their dtype, f32,
/// f64, f16 or bf16. Output head h reads query head ⌊h·Hq/H⌋ and so on, so both shared keys (Hk = Hv < Hq) and shared
/// queries and keys (Hq = Hk < Hv) work. φ, ε, decay and key mask are in [`LinearOptions`]; what holds for every
/// operation is in the [module](crate::candle) documentation. Gradients: q, k, v, and the log-decay if it is per token; one per
/// head that is to be trained is broadcast to `[B, H, M]` by the caller.
///
/// # Errors
/// Shapes or dtypes that do not fit together, a negative ε, a log-decay that is NaN, above 0 or without `causal`, a
/// tracked key mask or log-decay per head, tensors on different devices or on one that the build does not compute on.
///
/// # Example
/// ```
/// use attn_kernels::candle::linear_attention;
/// use attn_kernels::linear::LinearOptions;
/// use candle_core::{Device, Tensor};
///
/// let q = Tensor::randn(0f32, 1.0, (1, 2, 100, 8), &Device::Cpu)?;
/// let v = Tensor::randn(0f32, 1.0, (1, 2, 100, 16), &Device::Cpu)?;
/// // RetNet: no feature map, no divisor, γ = 1 − 2⁻⁵ and 1 − 2⁻⁶.
/// let log_decay = Tensor::new(&[(1.0 - 1.0 / 32f32).ln(), (1.0 - 1.0 / 64f32).ln()], &Device::Cpu)?;
/// let options = LinearOptions {
///     map: attn_kernels::linear::FeatureMap::Identity,
///     causal: true,
///     normalizer: None,
///     log_decay: Some(log_decay),
///     ..Default::default()
/// };
/// assert_eq!(linear_attention(&q, &q, &v, &options)?.dims(), [1, 2, 100, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear_attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &LinearOptions<Tensor>) -> Result<Tensor> {
    call("linear_attention", q, k, v, options, None)?.output()
}

/// Causal [`linear_attention`] over the next piece of a sequence: reads the state after the pieces before (`None`
/// before the first) and returns the output of this piece with the state after it. Cutting a sequence anywhere and
/// handing the state on gives the output of the whole; a piece of one token is a step of generation, in time and
/// memory that do not depend on how many came before.
///
/// Gradients pass through states, so that pieces train as the whole, unless a state is [detached](LinearState::detach).
///
/// # Errors
/// As [`linear_attention`]; options that are not causal; a state of another shape or dtype, one with a tracked stabiliser, or
/// on CUDA tracked at all.
///
/// # Example
/// ```
/// use attn_kernels::candle::{linear_attention, linear_attention_with_state};
/// use attn_kernels::linear::LinearOptions;
/// use candle_core::{Device, Tensor};
///
/// let options = LinearOptions { causal: true, ..Default::default() };
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 30, 8), &Device::Cpu)?;
/// let (prompt, token) = (x.narrow(2, 0, 29)?, x.narrow(2, 29, 1)?);
/// let (_, state) = linear_attention_with_state(&prompt, &prompt, &prompt, &options, None)?;
/// let (last, state) = linear_attention_with_state(&token, &token, &token, &options, Some(&state))?;
/// assert_eq!(state.position(), 30);
///
/// let whole = linear_attention(&x, &x, &x, &options)?;
/// let error = (whole.narrow(2, 29, 1)? - last)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(error < 1e-5);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Training on a long sequence piece by piece, each with what the pieces before have left but without their graph:
///
/// ```
/// use attn_kernels::candle::linear_attention_with_state;
/// use attn_kernels::linear::LinearOptions;
/// use candle_core::{Device, Tensor, Var};
///
/// let options = LinearOptions { causal: true, ..Default::default() };
/// let weights = Var::randn(0f32, 0.3, (8, 8), &Device::Cpu)?;
/// let mut state = None;
/// for _ in 0..4 {
///     let x = Tensor::randn(0f32, 1.0, (1, 2, 30, 8), &Device::Cpu)?;
///     let k = x.broadcast_matmul(&weights)?;
///     let (out, next) = linear_attention_with_state(&x, &k, &x, &options, state.as_ref())?;
///     let gradients = out.sqr()?.mean_all()?.backward()?;
///     weights.set(&(weights.as_tensor() - (gradients.get(&weights).expect("a gradient") * 0.1)?)?)?;
///     // Without `detach`, the next gradient would go back through this piece, too.
///     state = Some(next.detach());
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &LinearOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<(Tensor, LinearState)> {
    let function = "linear_attention_with_state";
    ensure_causal(function, options.causal)?;
    call(function, q, k, v, options, state)?.output_and_state()
}

fn call(
    function: &'static str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &LinearOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<LinearCall> {
    let problem = options.problem(function, q, k, v)?;
    let (key_mask, log_decay) = (options.key_mask.as_ref(), options.log_decay.as_ref());
    LinearCall::new(problem, [q, k, v], LinearTensors { key_mask, log_decay, omega: None, state })
}
