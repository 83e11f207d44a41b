//! The operations on candle tensors, with gradients.
//!
//! What holds for all of them:
//!
//! | | |
//! | --- | --- |
//! | shapes | q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]`, output `[B, H, N, E]`; query head h reads key head ⌊h·Hk/H⌋, H a multiple of Hk. In the linear family v may have more heads than q and k, or fewer: see each function |
//! | layout | any strides, offsets and broadcasts, read in place; only a last dimension that is not contiguous is copied. A `[B, N, H, D]` tensor is passed as `.transpose(1, 2)` |
//! | dtypes | f32, f64, f16, bf16, the same for q, k, v and bias; key masks are u8; log-decay, ω and states have the dtype of sums |
//! | sums | f32, f64 for f64 inputs; one rounding to the dtype of q at the end |
//! | sequences | [packed](crate::Sequences) into one batch entry on demand, with a state for each: on the CPU outputs have the bits that a sequence has alone, without rotary embedding; gradients are the same but for roundings |
//! | lengths | N ≠ M is causal from the bottom right: query i stands at key i + M − N |
//! | gradients | first order, for q, k, v, biases, sinks, a log-decay per token or channel, β, a and b of the delta rules, the bonus of gated linear attention and, on the CPU, a [state](LinearState). Other inputs receive none and are refused when tracked ([`Error::NoGradient`](crate::Error::NoGradient)): detach them |
//! | devices | the CPU, and CUDA with the feature `cuda`, on candle's stream (gated linear attention, the delta rules and the scans: the CPU alone); all tensors of a call on one device |
//! | memory | O(N) beside inputs and outputs, forward and backward: no N×M matrix exists |
//! | results | bit-identical from run to run with the same number of threads |
//! | errors | a [`crate::Error`] in a [`candle_core::Error`], which names the function and the argument; checked before anything is computed (on CUDA the numbers of a log-decay are not looked at) |
//!
//! Rows without a visible key give 0, log-sum-exp −∞ and no gradient. Keys and values that a key mask removes never
//! reach an output, not even as NaN.

mod convolution;
mod delta;
mod engine;
mod favor;
mod features;
mod gau;
mod linear;
pub mod nn;
mod own_gradient;
mod packing;
mod performer;
mod rotary;
mod rotary_config;
mod rotated;
mod scan;
mod softmax;
mod state;
mod storage;
mod transnormer;

pub use convolution::{causal_convolution, causal_convolution_with_state};
pub use delta::{
    delta_attention, delta_attention_with_state, gated_linear_attention, gated_linear_attention_with_state,
    generalized_delta_attention, generalized_delta_attention_with_state,
};
use gau::mixed_chunk_local;
pub use gau::{gau_attention, mixed_chunk_attention, mixed_chunk_attention_with_state};
pub use linear::{linear_attention, linear_attention_with_state};
pub use performer::{performer_attention, performer_attention_with_state};
pub use rotated::{
    rotary_linear_attention, rotary_linear_attention_with_state, rotary_norm_attention,
    rotary_norm_attention_with_state, rotary_performer_attention, rotary_performer_attention_with_state,
};
pub use scan::{
    complex_diagonal_scan, complex_diagonal_scan_with_state, diagonal_scan, diagonal_scan_with_state,
    discounted_returns, generalized_advantages, selective_scan, selective_scan_with_state,
};
pub use softmax::{softmax_attention, softmax_attention_with_lse};
pub use state::LinearState;
pub use transnormer::{diag_attention, norm_attention, norm_attention_with_state};

#[cfg(test)]
mod tests;
