use candle_core::{DType, Result, Tensor};

use super::LinearState;
use super::engine::{LinearCall, LinearTensors, QuadraticCall, accumulator};
use super::state::ensure_causal;
use crate::gau::{GauOptions, MixedChunkOptions};
use crate::problem::{ensure_same_rows, ensure_unpacked, ensure_whole_chunks};

/// Squared-ReLU attention of the gated attention unit (Hua et al. 2022, "Transformer Quality in Linear Time"):
///
/// ```text
/// o_i = Σ_j a_ij v_j,   a_ij = relu²(c ⟨q_i, k_j⟩ + bias[j − i])    over the keys j that query i sees
/// ```
///
/// with c and a factor or divisor of the row as [`GauNorm`](crate::gau::GauNorm) says. The unit's projections, its gate
/// U ⊙ (·) and its output projection are the caller's.
///
/// q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]` → `[B, H, N, E]` in their dtype, f32, f64, f16 or bf16; the
/// paper has one head. Mask, norm, key mask and bias are in [`GauOptions`]; what holds for every operation is in the
/// [module](crate::candle) documentation. Gradients: q, k, v, bias.
///
/// # Errors
/// Shapes or dtypes that do not fit together, a norm out of range, a bias that does not reach every visible distance, a
/// tracked key mask, tensors on different devices or on one that the build does not compute on.
///
/// # Example
/// ```
/// use attn_kernels::candle::gau_attention;
/// use attn_kernels::gau::GauOptions;
/// use candle_core::{DType, Device, Tensor, Var};
///
/// let x = Tensor::randn(0f32, 1.0, (1, 1, 20, 8), &Device::Cpu)?;
/// // One trained number per distance from −19 to 19.
/// let bias = Var::zeros((1, 39), DType::F32, &Device::Cpu)?;
/// let options = GauOptions { bias: Some(bias.as_tensor().clone()), ..Default::default() };
/// let gradients = gau_attention(&x, &x, &x, &options)?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&bias).map(|d_bias| d_bias.dims()), Some(bias.dims()));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gau_attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &GauOptions<Tensor>) -> Result<Tensor> {
    let problem = options.problem("gau_attention", q, k, v)?;
    QuadraticCall::new(problem, [q, k, v], options.key_mask.as_ref(), options.bias.as_ref())?.output()
}

/// Mixed chunk attention of FLASH (Hua et al. 2022, "Transformer Quality in Linear Time"): squared-ReLU attention
/// inside chunks of C positions and linear attention over chunks,
///
/// ```text
/// local_i  = Σ_j relu²(c ⟨q_i, k_j⟩ + bias[j − i]) v_j           j in the chunk of i, and j ≤ i when causal
/// global_i = norm_g · q'_i Σ_{chunks h < g} K'_hᵀ V_h             causal, i in chunk g
/// global_i = norm   · q'_i Σ_{all chunks}  K'_hᵀ V_h              not causal
/// o_i      = local_i + global_i
/// ```
///
/// in time and memory O(N·C). The unit's projections, its gate U ⊙ (·) and its output projection are the caller's.
///
/// q = `q_quad` and q' = `q_lin` `[B, H, N, D]`, k = `k_quad` and k' = `k_lin` `[B, Hk, M, D]`, v `[B, Hk, M, E]` →
/// `[B, H, N, E]` in their dtype, f32, f64, f16 or bf16. The paper has one head; D may differ between the branches;
/// causal needs M = N. The branches are added before the rounding to the dtype, and on the CPU so are their
/// gradients of v. C, c, the norm, key mask and bias are
/// in [`MixedChunkOptions`]; what holds for every operation is in the [module](crate::candle) documentation. Gradients: all five
/// tensors and the bias.
///
/// # Errors
/// Shapes or dtypes that do not fit together, a chunk size of 0, a bias that does not reach C − 1, a tracked key mask,
/// tensors on different devices or on one that the build does not compute on.
///
/// # Example
/// ```
/// use attn_kernels::candle::mixed_chunk_attention;
/// use attn_kernels::gau::MixedChunkOptions;
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::randn(0f32, 1.0, (2, 1, 100, 16), &Device::Cpu)?;
/// let v = Tensor::randn(0f32, 1.0, (2, 1, 100, 64), &Device::Cpu)?;
/// let options = MixedChunkOptions { chunk_size: 32, causal: true, ..Default::default() };
/// assert_eq!(mixed_chunk_attention(&x, &x, &x, &x, &v, &options)?.dims(), [2, 1, 100, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn mixed_chunk_attention(
    q_quad: &Tensor,
    k_quad: &Tensor,
    q_lin: &Tensor,
    k_lin: &Tensor,
    v: &Tensor,
    options: &MixedChunkOptions<Tensor>,
) -> Result<Tensor> {
    let names = ["mixed_chunk_attention (local branch)", "mixed_chunk_attention (global branch)"];
    let (local, global) = branches(names, [q_quad, k_quad, v], [q_lin, k_lin, v], options, None)?;
    let sums = accumulator(v.dtype());
    (local.output_in(sums)? + global.output_in(sums)?)?.to_dtype(v.dtype())
}

/// Causal [`mixed_chunk_attention`] over the next piece of a sequence, as
/// [`linear_attention_with_state`](super::linear_attention_with_state), with the difference that a piece must begin
/// where a chunk does: every piece but the last is a multiple of C long. With
/// [`GlobalNorm::Length`](crate::gau::GlobalNorm::Length) the length is that of the piece, and the pieces do not give
/// the output of the whole.
///
/// # Errors
/// As [`mixed_chunk_attention`]; options that are not causal; a state that
/// [`linear_attention_with_state`](super::linear_attention_with_state) refuses, or one that ends inside a chunk.
///
/// # Example
/// ```
/// use attn_kernels::candle::mixed_chunk_attention_with_state;
/// use attn_kernels::gau::MixedChunkOptions;
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::randn(0f32, 1.0, (1, 1, 96, 16), &Device::Cpu)?;
/// let options = MixedChunkOptions { chunk_size: 32, causal: true, ..Default::default() };
/// let (first, state) = mixed_chunk_attention_with_state(&x, &x, &x, &x, &x, &options, None)?;
/// let y = x.narrow(2, 0, 10)?;
/// let (second, state) = mixed_chunk_attention_with_state(&y, &y, &y, &y, &y, &options, Some(&state))?;
/// assert_eq!((first.dims(), second.dims(), state.position()), (x.dims(), y.dims(), 106));
/// // The last piece ended inside a chunk.
/// assert!(mixed_chunk_attention_with_state(&y, &y, &y, &y, &y, &options, Some(&state)).is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn mixed_chunk_attention_with_state(
    q_quad: &Tensor,
    k_quad: &Tensor,
    q_lin: &Tensor,
    k_lin: &Tensor,
    v: &Tensor,
    options: &MixedChunkOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<(Tensor, LinearState)> {
    let function = "mixed_chunk_attention_with_state";
    ensure_causal(function, options.causal)?;
    ensure_unpacked(function, options.sequences.as_ref())?;
    ensure_whole_chunks(function, state.map_or(0, LinearState::position), options.chunk_size)?;
    let names = ["mixed_chunk_attention_with_state (local branch)", "mixed_chunk_attention_with_state (global branch)"];
    let (local, global) = branches(names, [q_quad, k_quad, v], [q_lin, k_lin, v], options, state)?;
    let sums = accumulator(v.dtype());
    let (global, state) = global.output_and_state_in(sums)?;
    Ok(((local.output_in(sums)? + global)?.to_dtype(v.dtype())?, state))
}

fn branches(
    names: [&'static str; 2],
    quad: [&Tensor; 3],
    lin: [&Tensor; 3],
    options: &MixedChunkOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<(QuadraticCall, LinearCall)> {
    let key_mask = options.key_mask.as_ref();
    let local = options.local_problem(names[0], quad[0], quad[1], quad[2])?;
    let global = options.global_problem(names[1], lin[0], lin[1], lin[2])?;
    ensure_same_rows(&local, &global)?;
    let wide = wide_values(quad[2])?;
    let local = QuadraticCall::new(local, quad, key_mask, options.bias.as_ref())?;
    let global = LinearCall::new(global, lin, LinearTensors { key_mask, state, ..Default::default() })?;
    Ok((local.with_wide_v(wide.as_ref()), global.with_wide_v(wide.as_ref())))
}

/// v in the dtype of sums, where the gradients of both branches can be added up before they are rounded.
fn wide_values(v: &Tensor) -> Result<Option<Tensor>> {
    let is_narrow = matches!(v.dtype(), DType::F16 | DType::BF16);
    let adds = is_narrow && v.track_op() && v.device().is_cpu();
    adds.then(|| v.to_dtype(accumulator(v.dtype()))).transpose()
}

/// The local branch of [`mixed_chunk_attention`] in the dtype of sums, for queries at the end of a longer row of keys.
pub(super) fn mixed_chunk_local(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &MixedChunkOptions<Tensor>,
) -> Result<Tensor> {
    let problem = options.local_problem("mixed_chunk_attention_with_state (local branch)", q, k, v)?;
    let call = QuadraticCall::new(problem, [q, k, v], options.key_mask.as_ref(), options.bias.as_ref())?;
    call.output_in(accumulator(v.dtype()))
}
