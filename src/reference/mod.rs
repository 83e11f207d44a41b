//! The definition: every operation in plain f64 loops, written from its equations, for validation.
//!
//! Nothing here is fast and nothing is shared with the engines. Each operation has a dense form, which goes
//! through its N×M weights row by row, and a backward with hand-derived gradients. The linear family and mixed
//! chunk attention also have a recurrent form in O(N), token by token, which serves as the definition for long
//! sequences and carries the state from call to call.
//!
//! Tensors are [`Array`]s; options are those of the operations with `T = Array`, in four dimensions:
//!
//! | option | shape |
//! | --- | --- |
//! | `key_mask` | `[1, 1, B, M]`, 0 removes a key; such rows of k and v may hold NaN |
//! | `bias` | `[1, 1, 1 or H, 2R + 1]` |
//! | `attention_bias` | `[B, H, N, M]`, each of them or 1; a mask of pairs as 0 and −∞ |
//! | `sinks` | `[1, 1, 1, H]` |
//! | `log_decay` | `[1, 1, 1, Hs]` per head or `[1, B, Hs, M]` per head and token |
//!
//! Query i of N stands at position p = i + M − N among M keys. Masks, chunks, decays and bias distances are
//! measured from p. With H output heads, head h reads head h·Hx/H of an operand with Hx heads.

mod array;
mod convolution;
mod delta;
mod dense;
mod features;
mod finish;
mod gau;
mod linear;
mod mixed_chunk;
mod pairs;
mod performer;
mod quadratic;
mod recurrent;
mod recurrent_backward;
mod rotary;
mod scan;
mod softmax;
#[cfg(test)]
mod tests;
mod transnormer;

pub use array::Array;
pub use convolution::{
    ConvolutionGradients, ConvolutionInputs, causal_convolution, causal_convolution_backward, causal_convolution_state,
};
pub use delta::{DeltaGradients, delta_attention, delta_attention_backward};
pub use gau::{gau_attention, gau_attention_backward};
pub use linear::{
    linear_attention, linear_attention_backward, linear_attention_with_state, linear_attention_with_state_backward,
};
pub use mixed_chunk::{
    MixedChunkGradients, mixed_chunk_attention, mixed_chunk_attention_backward, mixed_chunk_attention_recurrent,
};
pub use performer::{
    performer_attention, performer_attention_backward, performer_attention_with_state,
    performer_attention_with_state_backward,
};
pub use recurrent::State;
pub use recurrent_backward::StateGradient;
pub use rotary::{
    rotary_linear_attention, rotary_linear_attention_backward, rotary_norm_attention, rotary_norm_attention_backward,
    rotary_performer_attention, rotary_performer_attention_backward,
};
pub use scan::{SelectiveScan, diagonal_scan, diagonal_scan_backward, selective_scan, selective_scan_backward};
pub use softmax::{SoftmaxOutput, softmax_attention, softmax_attention_backward};
pub use transnormer::{
    diag_attention, diag_attention_backward, norm_attention, norm_attention_backward, norm_attention_with_state,
    norm_attention_with_state_backward,
};

/// Derivatives of a loss by the inputs of an operation, each in the shape of its input.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// By q.
    pub q: Array,
    /// By k, summed over the heads that share a key head; 0 for masked keys.
    pub k: Array,
    /// By v, summed over the heads that share a value head; 0 for masked keys.
    pub v: Array,
    /// By the bias, when one was given.
    pub bias: Option<Array>,
    /// By the attention bias, when one was given.
    pub attention_bias: Option<Array>,
    /// By the sinks, when they were given.
    pub sinks: Option<Array>,
    /// By the log-decay, when one was given.
    pub log_decay: Option<Array>,
}
