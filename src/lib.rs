//! | `causal_convolution` | short causal convolution of every channel | [`ConvolutionOptions`] |
//! Efficient attention with gradients, for candle tensors and for plain slices.
//!
//! | operation | mechanism | options |
//! | --- | --- | --- |
//! | `softmax_attention` | softmax, never N×M in memory | [`SoftmaxOptions`] |
//! | `linear_attention` | prefix sums of φ(K)ᵀV, optional decay | [`LinearOptions`] |
//! | `performer_attention` | FAVOR+ random features | [`PerformerOptions`] |
//! | `norm_attention` | TransNormer: RMS norm instead of a denominator | [`NormOptions`] |
//! | `diag_attention` | TransNormer: attention inside blocks | [`DiagOptions`] |
//! | `gau_attention` | gated attention unit: squared ReLU | [`GauOptions`] |
//! | `mixed_chunk_attention` | FLASH: squared ReLU inside chunks, linear across | [`MixedChunkOptions`] |
//! | `gated_linear_attention` | linear with a decay per channel (GLA; with a bonus RWKV-6) | [`DeltaOptions`] |
//! | `delta_attention` | delta rules: DeltaNet, Gated DeltaNet, Kimi Delta Attention | [`DeltaOptions`] |
//! | `generalized_delta_attention` | any transition of a diagonal and rank one: RWKV-7 | [`DeltaOptions`] |
//! | `diagonal_scan`, `complex_diagonal_scan` | h_t = a_t ⊙ h_{t−1} + b_t: LRU, S4D, discounted returns | [`ScanOptions`] |
//! | `selective_scan` | Mamba's, with states that no memory holds | [`SelectiveScanOptions`] |
//! | `rotary_linear_attention`, `…_performer_…`, `…_norm_…` | the same with rotary embedding behind the features | as without |
//!
//! With the feature `candle` (default) the operations take and return candle tensors and give gradients to every
//! differentiable input; they are in the module `candle` and at the crate's root. Without it [`cpu`] has a call for each
//! attention that takes views of slices and gives outputs, gradients and states as vectors. Beneath both an options struct describes
//! a problem ([`problem`]) and an engine of the backend computes it in memory of the caller.
//! The feature brings layers, caches for decoding and language models as well, in the module `nn`.
//! [`mod@reference`] holds the same operations as plain f64 loops: the definition that everything is tested against.
//!
//! # Conventions
//!
//! * q is [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, E], any strides with a contiguous last dimension; a tensor
//!   [B, N, H, D] is passed as `.transpose(1, 2)` without a copy. H is a multiple of Hk (grouped queries); the linear
//!   family also takes more value heads than query and key heads.
//! * Query i of N stands at position i + M − N: causal masks align at the end when lengths differ.
//! * A query that sees no key gives 0, log-sum-exp −∞ and gradient 0. NaN in masked keys or values reaches nothing.
//! * f32, f16 and bf16 are summed in f32, f64 in f64; outputs are rounded once; statistics and states are f32 (f64).
//! * Results are bit-identical on repeat, forward and backward.
//! * Gradients are of first order. An input that can receive none but is tracked is an error.
#![deny(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "candle")]
mod activation;
#[cfg(feature = "candle")]
pub mod candle;
mod convolution;
pub mod cpu;
pub mod delta;
mod error;
pub mod gau;
pub mod gpu;
pub mod linear;
pub mod performer;
pub mod problem;
pub mod random_features;
pub mod reference;
mod relative_bias;
pub mod scan;
pub mod softmax;
pub mod transnormer;

#[cfg(feature = "candle")]
#[doc(inline)]
pub use candle::nn;
#[cfg(feature = "candle")]
pub use candle::{
    LinearState, causal_convolution, causal_convolution_with_state, complex_diagonal_scan,
    complex_diagonal_scan_with_state, delta_attention, delta_attention_with_state, diag_attention, diagonal_scan,
    diagonal_scan_with_state, discounted_returns, gated_linear_attention, gated_linear_attention_with_state,
    gau_attention, generalized_advantages, generalized_delta_attention, generalized_delta_attention_with_state,
    linear_attention, linear_attention_with_state, mixed_chunk_attention, mixed_chunk_attention_with_state,
    norm_attention, norm_attention_with_state, performer_attention, performer_attention_with_state,
    rotary_linear_attention, rotary_linear_attention_with_state, rotary_norm_attention,
    rotary_norm_attention_with_state, rotary_performer_attention, rotary_performer_attention_with_state,
    selective_scan, selective_scan_with_state, softmax_attention, softmax_attention_with_lse,
};
pub use convolution::ConvolutionOptions;
pub use delta::DeltaOptions;
pub use error::{Error, Result};
pub use gau::{GauNorm, GauOptions, GlobalNorm, MixedChunkOptions};
pub use linear::{FeatureMap, LinearOptions};
pub use performer::{FavorMap, PerformerOptions};
pub use problem::{Dropout, Mask, Sequences};
pub use random_features::{FeatureKind, random_features};
pub use relative_bias::{T5Buckets, alibi_bias, alibi_slopes, t5_buckets};
pub use scan::{ScanOptions, SelectiveScanOptions, hippo_legs, s4d_lin};
pub use softmax::SoftmaxOptions;
pub use transnormer::{DiagOptions, DiagWeight, NormOptions, NormScope};

/// The README's examples, as tests.
#[cfg(all(doctest, feature = "candle"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// The guide's examples, as tests.
#[cfg(all(doctest, feature = "candle"))]
#[doc = include_str!("../docs/guide.md")]
struct Guide;

/// The examples of batches, as tests.
#[cfg(all(doctest, feature = "candle"))]
#[doc = include_str!("../docs/batches.md")]
struct Batches;
