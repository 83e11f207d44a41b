//! The mechanisms that are run, each with one set of options.

use attn_kernels::gau::{GauNorm, GauOptions, MixedChunkOptions};
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::Mask;
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{DiagOptions, NormOptions};
use clap::ValueEnum;

/// Random directions of Performer attention.
pub const DIRECTIONS: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Mechanism {
    /// Softmax attention, fused
    Softmax,
    /// Linear attention with φ = elu + 1, normalised
    Linear,
    /// Performer: linear attention on 256 positive FAVOR+ features
    Performer,
    /// TransNormer's NormAttention: φ = elu + 1, RMS norm in place of the denominator
    Norm,
    /// Linear attention with φ = identity and a decay per head, as in RetNet; causal only
    Retention,
    /// TransNormer's DiagAttention: softmax in blocks of 64
    Diag,
    /// Squared-ReLU attention of the gated attention unit
    Gau,
    /// FLASH: squared-ReLU attention in chunks of 256 and linear attention between them
    Flash,
}

impl Mechanism {
    pub const ALL: [Self; 8] =
        [Self::Softmax, Self::Linear, Self::Performer, Self::Norm, Self::Retention, Self::Diag, Self::Gau, Self::Flash];

    pub fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Linear => "linear",
            Self::Performer => "performer",
            Self::Norm => "norm",
            Self::Retention => "retention",
            Self::Diag => "diag",
            Self::Gau => "gau",
            Self::Flash => "flash",
        }
    }

    /// The public operation that it is a case of.
    pub fn operation(self) -> &'static str {
        match self {
            Self::Softmax => "softmax_attention",
            Self::Linear | Self::Retention => "linear_attention",
            Self::Performer => "performer_attention",
            Self::Norm => "norm_attention",
            Self::Diag => "diag_attention",
            Self::Gau => "gau_attention",
            Self::Flash => "mixed_chunk_attention",
        }
    }

    /// Whether it exists with (`causal`) or without causality.
    pub fn supports(self, causal: bool) -> bool {
        causal || self != Self::Retention
    }

    /// Whether the work grows with the square of the length.
    pub fn is_quadratic(self) -> bool {
        matches!(self, Self::Softmax | Self::Gau)
    }

    /// Whether it runs on the linear engine alone.
    pub fn is_recurrent(self) -> bool {
        matches!(self, Self::Linear | Self::Performer | Self::Norm | Self::Retention)
    }
}

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Pass {
    /// The output
    Fwd,
    /// The gradients, given the results of the forward pass
    Bwd,
}

impl Pass {
    pub const ALL: [Self; 2] = [Self::Fwd, Self::Bwd];

    /// A list of nothing else.
    pub fn alone(self) -> &'static [Self] {
        match self {
            Self::Fwd => &[Self::Fwd],
            Self::Bwd => &[Self::Bwd],
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Fwd => "fwd",
            Self::Bwd => "bwd",
        }
    }
}

pub fn visible_keys(causal: bool) -> Mask {
    if causal { Mask::Causal } else { Mask::Full }
}

pub fn softmax<T>(causal: bool, key_mask: Option<T>) -> SoftmaxOptions<T> {
    SoftmaxOptions { mask: visible_keys(causal), key_mask, ..Default::default() }
}

pub fn diag<T>(causal: bool, key_mask: Option<T>) -> DiagOptions<T> {
    DiagOptions { causal, key_mask, ..Default::default() }
}

/// `keys` is the length of the whole sequence, which the paper divides by.
pub fn gau<T>(causal: bool, key_mask: Option<T>, keys: usize) -> GauOptions<T> {
    let norm = GauNorm::Fixed { length: keys as f64 };
    GauOptions { mask: visible_keys(causal), norm, key_mask, ..Default::default() }
}

pub fn linear<T>(causal: bool, key_mask: Option<T>) -> LinearOptions<T> {
    LinearOptions { causal, key_mask, ..Default::default() }
}

pub fn retention<T>(key_mask: Option<T>, log_decay: Option<T>) -> LinearOptions<T> {
    LinearOptions { map: FeatureMap::Identity, causal: true, normalizer: None, log_decay, key_mask, sequences: None }
}

pub fn performer<T>(causal: bool, key_mask: Option<T>) -> PerformerOptions<T> {
    PerformerOptions { causal, key_mask, ..Default::default() }
}

pub fn norm<T>(causal: bool, key_mask: Option<T>) -> NormOptions<T> {
    NormOptions { causal, key_mask, ..Default::default() }
}

pub fn flash<T>(causal: bool, key_mask: Option<T>) -> MixedChunkOptions<T> {
    MixedChunkOptions { causal, key_mask, ..Default::default() }
}

/// RetNet's log-decays ln(1 − 2^(−5−h)), one per head.
pub fn retention_log_decay(heads: usize) -> Vec<f64> {
    (0..heads).map(|head| (-(-5.0 - head as f64).exp2()).ln_1p()).collect()
}
