use candle_core::{Result, Tensor};

use super::engine::{DeltaCall, DeltaTensors};
use crate::delta::DeltaOptions;
use crate::problem::RankOne;

/// Linear attention with a decay per channel (GLA, Yang et al. 2023; HGRN-2, Qin et al. 2024):
///
/// ```text
/// S_t = Diag(e^{g_t}) S_{t−1} + k_t v_tᵀ,   o_t = τ S_tᵀ q_t
/// ```
///
/// Causal, in time and memory O(N). q `[B, Hq, N, D]`, k `[B, Hk, N, D]`, v `[B, Hv, N, E]` → `[B, H, N, E]` with
/// H = max(Hq, Hk, Hv), in their dtype; output head h reads query head ⌊h·Hq/H⌋ and so on. g, per channel
/// `[B, max(Hk, Hv), N, D]`, τ, norms and key mask are in [`DeltaOptions`]; what holds for every operation is in the
/// [module](crate::candle) documentation. Gradients: q, k, v, the log-decay and the bonus. On the CPU; on CUDA it is an error.
///
/// With a bonus, u `[max(Hk, Hv), D]`, it is the attention of RWKV-6 (Peng et al. 2024), o_t = τ (S_{t−1}ᵀ q_t + ⟨q_t, u ⊙ k_t⟩ v_t).
///
/// A decay per head or token, without a bonus, is that of [`linear_attention`](super::linear_attention).
///
/// # Errors
/// Shapes or dtypes that do not fit together, no log-decay per channel where there is no bonus, one that is NaN or above 0, a
/// tracked key mask or log-decay per head, tensors that are not on the CPU.
///
/// # Example
/// ```
/// use attn_kernels::{DeltaOptions, gated_linear_attention};
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 100, 8), &Device::Cpu)?;
/// let gate = candle_nn::ops::sigmoid(&x)?;
/// let options = DeltaOptions { log_decay: Some(gate.log()?), ..Default::default() };
/// assert_eq!(gated_linear_attention(&x, &x, &x, &options)?.dims(), [1, 2, 100, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gated_linear_attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &DeltaOptions<Tensor>) -> Result<Tensor> {
    call("gated_linear_attention", [q, k, v], RankOne::None, options, None)?.output()
}

/// [`gated_linear_attention`] over the next piece of a sequence: after `state`, S of `[B, max(Hk, Hv), D, E]` in the dtype of
/// sums (0 for `None`), and with the state that follows. Cutting a sequence anywhere and handing the state on gives the
/// output of the whole, and its gradients: states have them, both ways; `detach` one to end them there.
///
/// # Errors
/// As [`gated_linear_attention`]; a state of another shape or dtype.
pub fn gated_linear_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &DeltaOptions<Tensor>,
    state: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    call("gated_linear_attention_with_state", [q, k, v], RankOne::None, options, state)?.output_and_state()
}

/// Attention by the delta rule (DeltaNet, Schlag et al. 2021 and Yang et al. 2024): what the state holds under a key is
/// replaced by the value, to the part β. With a log-decay per head and token it is Gated DeltaNet (Yang et al. 2024), with
/// one per channel Kimi Delta Attention (Kimi Team 2025):
///
/// ```text
/// S'_t = Diag(e^{g_t}) S_{t−1},   S_t = S'_t + β_t k_t (v_t − S'_tᵀ k_t)ᵀ,   o_t = τ S_tᵀ q_t
/// ```
///
/// β is `[B, max(Hk, Hv), N]` in the dtype of sums; everything else as in [`gated_linear_attention`]. Gradients: q, k, v, β
/// and a log-decay per token or channel. Keys should have norms of about 1, as by [`DeltaOptions::normalize`]: the state
/// grows without bound where β‖k‖² is above 2.
///
/// # Errors
/// As [`gated_linear_attention`], but that the log-decay is optional and may be per head, token or channel; a bonus.
///
/// # Example
/// ```
/// use attn_kernels::{DeltaOptions, delta_attention};
/// use candle_core::{Device, Tensor};
///
/// // Gated DeltaNet with 2 heads of keys and 4 of values.
/// let keys = Tensor::randn(0f32, 1.0, (1, 2, 100, 8), &Device::Cpu)?;
/// let values = Tensor::randn(0f32, 1.0, (1, 4, 100, 16), &Device::Cpu)?;
/// let beta = candle_nn::ops::sigmoid(&Tensor::randn(0f32, 1.0, (1, 4, 100), &Device::Cpu)?)?;
/// let log_decay = (Tensor::rand(0f32, 1.0, (1, 4, 100), &Device::Cpu)? * -0.1)?;
/// let options = DeltaOptions { log_decay: Some(log_decay), normalize: Some(1e-6), ..Default::default() };
/// assert_eq!(delta_attention(&keys, &keys, &values, &beta, &options)?.dims(), [1, 4, 100, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn delta_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    beta: &Tensor,
    options: &DeltaOptions<Tensor>,
) -> Result<Tensor> {
    call("delta_attention", [q, k, v], RankOne::Rule { beta }, options, None)?.output()
}

/// [`delta_attention`] over the next piece of a sequence, as [`gated_linear_attention_with_state`].
///
/// # Errors
/// As [`delta_attention`]; a state of another shape or dtype.
///
/// # Example
/// ```
/// use attn_kernels::{DeltaOptions, delta_attention, delta_attention_with_state};
/// use candle_core::{Device, Tensor};
///
/// let options = DeltaOptions { normalize: Some(1e-6), ..Default::default() };
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 30, 8), &Device::Cpu)?;
/// let beta = Tensor::full(0.5f32, (1, 2, 30), &Device::Cpu)?;
/// let piece = |start, len| Ok::<_, candle_core::Error>((x.narrow(2, start, len)?, beta.narrow(2, start, len)?));
/// let ((prompt, its_beta), (token, last_beta)) = (piece(0, 29)?, piece(29, 1)?);
/// let (_, state) = delta_attention_with_state(&prompt, &prompt, &prompt, &its_beta, &options, None)?;
/// let (last, _) = delta_attention_with_state(&token, &token, &token, &last_beta, &options, Some(&state))?;
///
/// let whole = delta_attention(&x, &x, &x, &beta, &options)?;
/// let error = (whole.narrow(2, 29, 1)? - last)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(error < 1e-5);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn delta_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    beta: &Tensor,
    options: &DeltaOptions<Tensor>,
    state: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    call("delta_attention_with_state", [q, k, v], RankOne::Rule { beta }, options, state)?.output_and_state()
}

/// Linear attention with transitions of a diagonal and rank one (RWKV-7, Peng et al. 2025, with a = −(a ⊙ κ), b = κ and
/// scale 1):
///
/// ```text
/// S_t = Diag(e^{g_t}) S_{t−1} + a_t b_tᵀ S_{t−1} + k_t v_tᵀ,   o_t = τ S_tᵀ q_t
/// ```
///
/// a and b are `[B, Hk, N, D]`, as k; everything else as in [`gated_linear_attention`]. Gradients: q, k, v, a, b and a
/// log-decay per token or channel.
///
/// # Errors
/// As [`delta_attention`].
pub fn generalized_delta_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    [a, b]: [&Tensor; 2],
    options: &DeltaOptions<Tensor>,
) -> Result<Tensor> {
    call("generalized_delta_attention", [q, k, v], RankOne::Free { a, b }, options, None)?.output()
}

/// [`generalized_delta_attention`] over the next piece of a sequence, as [`gated_linear_attention_with_state`].
///
/// # Errors
/// As [`generalized_delta_attention`]; a state of another shape or dtype.
pub fn generalized_delta_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    [a, b]: [&Tensor; 2],
    options: &DeltaOptions<Tensor>,
    state: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let function = "generalized_delta_attention_with_state";
    call(function, [q, k, v], RankOne::Free { a, b }, options, state)?.output_and_state()
}

fn call(
    function: &'static str,
    operands: [&Tensor; 3],
    rank_one: RankOne<&Tensor>,
    options: &DeltaOptions<Tensor>,
    state: Option<&Tensor>,
) -> Result<DeltaCall> {
    let problem = options.problem(function, operands, rank_one)?;
    let [log_decay, bonus, key_mask] = [&options.log_decay, &options.bonus, &options.key_mask].map(Option::as_ref);
    DeltaCall::new(problem, operands, rank_one, DeltaTensors { log_decay, bonus, key_mask, state })
}
