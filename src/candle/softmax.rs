use candle_core::{Result, Tensor};

use super::engine::QuadraticCall;
use crate::softmax::SoftmaxOptions;

/// Softmax attention (Vaswani et al. 2017), computed online over tiles of keys (FlashAttention, Dao et al. 2022):
///
/// ```text
/// s_ij = cap(τ ⟨q_i, k_j⟩) + bias[j − i] + b_ij,   cap(x) = c·tanh(x/c)
/// o_i  = Σ_j softmax_j(s_ij) v_j                   over the keys j that query i sees, and a sink if there is one
/// ```
///
/// q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]` → `[B, H, N, E]` in their dtype, f32, f64, f16 or bf16.
/// Mask, τ, soft-cap c, key mask, bias, attention bias b and sinks are in [`SoftmaxOptions`]; what holds for every
/// operation is in the [module](crate::candle) documentation. Gradients: q, k, v, bias, b, sinks.
///
/// # Errors
/// Shapes or dtypes that do not fit together, a scale or soft-cap out of range, a bias that does not reach every
/// visible distance, a tracked mask, tensors on different devices or on one that the build does not compute on; on a GPU an
/// attention bias or sinks.
///
/// # Example
/// ```
/// use attn_kernels::candle::softmax_attention;
/// use attn_kernels::problem::Mask;
/// use attn_kernels::softmax::SoftmaxOptions;
/// use candle_core::{Device, Tensor, Var};
///
/// // [batch, tokens, heads, width], as a projection leaves it; four query heads share two key heads.
/// let q = Var::randn(0f32, 1.0, (2, 10, 4, 8), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1.0, (2, 10, 2, 8), &Device::Cpu)?;
/// let options = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
/// let k = k.transpose(1, 2)?;
/// let out = softmax_attention(&q.transpose(1, 2)?, &k, &k, &options)?;
/// assert_eq!(out.dims(), [2, 4, 10, 8]);
///
/// let gradients = out.sqr()?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&q).map(|dq| dq.dims()), Some(q.dims()));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn softmax_attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &SoftmaxOptions<Tensor>) -> Result<Tensor> {
    call("softmax_attention", q, k, v, options)?.output()
}

/// [`softmax_attention`] and the log-sum-exp of its scores,
///
/// ```text
/// L_i = ln Σ_j exp(s_ij)            over the keys j that query i sees, and a sink if there is one
/// ```
///
/// `[B, H, N]` in f32 (f64 for f64 inputs), −∞ where a query sees no key. With it results over parts of the keys
/// merge into the result over all: L = ln Σ_p exp(L_p), o = Σ_p exp(L_p − L) o_p (FlashAttention-2, Dao 2023).
/// Gradients: q, k, v, bias, b, sinks, through both results; a loss that uses both goes back through the attention twice.
///
/// # Errors
/// As [`softmax_attention`].
///
/// # Example
/// ```
/// use attn_kernels::candle::softmax_attention_with_lse;
/// use attn_kernels::softmax::SoftmaxOptions;
/// use candle_core::{Device, Tensor};
///
/// let q = Tensor::randn(0f32, 1.0, (1, 2, 3, 4), &Device::Cpu)?;
/// let k = Tensor::zeros_like(&q)?;
/// let (out, lse) = softmax_attention_with_lse(&q, &k, &q, &SoftmaxOptions::default())?;
/// assert_eq!(out.dims(), [1, 2, 3, 4]);
/// // Three keys with score 0.
/// assert!((lse.flatten_all()?.to_vec1::<f32>()?[0] - 3f32.ln()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn softmax_attention_with_lse(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &SoftmaxOptions<Tensor>,
) -> Result<(Tensor, Tensor)> {
    call("softmax_attention_with_lse", q, k, v, options)?.output_and_lse()
}

fn call(
    function: &'static str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &SoftmaxOptions<Tensor>,
) -> Result<QuadraticCall> {
    let problem = options.problem(function, q, k, v)?;
    let call = QuadraticCall::new(problem, [q, k, v], options.key_mask.as_ref(), options.bias.as_ref())?;
    call.with(options.attention_bias.as_ref(), options.sinks.as_ref())
}
