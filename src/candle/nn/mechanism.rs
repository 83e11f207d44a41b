use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::config::yes;
use crate::Error;
use crate::gau::{GauNorm, GlobalNorm};
use crate::linear::FeatureMap;
use crate::performer::FavorMap;
use crate::random_features::FeatureKind;
use crate::transnormer::{DiagWeight, NormScope};

/// The kinds of attention and their choices.
///
/// In JSON a mechanism is an object with its `kind` in snake case, and every other field may be left out, as in
/// `{ "kind": "performer", "features": 128 }`. The layers' weights are listed at [`Attention`](super::Attention).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Mechanism {
    /// [Softmax attention](crate::candle::softmax_attention).
    Softmax {
        /// Keys that a token sees: itself and the w − 1 before it (and after it when not causal). Default: all.
        #[serde(default)]
        window: Option<usize>,
        /// Soft-cap c of the scores, c·tanh(s/c). Default: none.
        #[serde(default)]
        soft_cap: Option<f64>,
    },
    /// [Linear attention](crate::candle::linear_attention).
    Linear {
        /// φ. Default elu + 1.
        #[serde(default)]
        map: FeatureMap,
        /// Whether rows are divided by ⟨φ(q), z⟩ + 1e-6. Default: yes.
        #[serde(default = "yes")]
        normalized: bool,
    },
    /// [Performer attention](crate::candle::performer_attention).
    Performer {
        /// m, random directions. Default 256.
        #[serde(default = "default_features")]
        features: usize,
        /// How the directions are drawn. Default: orthogonal.
        #[serde(default = "default_feature_kind")]
        directions: FeatureKind,
        /// Seed of the directions of a new layer. A layer that is loaded has those of its checkpoint. Default 0.
        #[serde(default)]
        seed: u64,
        /// The features. Default: positive.
        #[serde(default)]
        map: FavorMap,
        /// ε ≥ 0, added to the divisor. Default 1e-6. The divisor is relative to the largest exponents seen, so with ε
        /// above 0 the gradient is inexact by as much as ε weighs in it.
        #[serde(default = "default_epsilon")]
        epsilon: f64,
    },
    /// [NormAttention](crate::candle::norm_attention) of TransNormer.
    Norm {
        /// φ. Default elu + 1.
        #[serde(default)]
        map: FeatureMap,
        /// ε > 0 under the root of the norm. Default 1e-6.
        #[serde(default = "default_epsilon")]
        epsilon: f64,
        /// Norm per head or over all heads. Default: per head.
        #[serde(default)]
        scope: NormScope,
    },
    /// [DiagAttention](crate::candle::diag_attention) of TransNormer.
    Diag {
        /// Positions in a block. Default 64.
        #[serde(default = "default_block")]
        block: usize,
        /// Softmax or ReLU. Default: softmax.
        #[serde(default = "default_diag_weight")]
        weight: DiagWeight,
    },
    /// Retention (RetNet, Sun et al. 2023): [NormAttention](crate::candle::norm_attention) of plain q and k with a decay
    /// per head, o = silu(x W_g) ⊙ RMSNorm(t).
    Retention {
        /// Log-decay g_h ≤ 0 of every head of keys and values. Default: ln γ_h with γ_h = 1 − 2^{−5−h}.
        #[serde(default)]
        log_decay: Option<Vec<f64>>,
        /// Whether the output passes the gate silu(x W_g). Default: yes.
        #[serde(default = "yes")]
        gate: bool,
        /// ε > 0 under the root of the norm per head. Default 1e-6.
        #[serde(default = "default_epsilon")]
        epsilon: f64,
    },
    /// Gated attention unit (Hua et al. 2022): [`gau_attention`](crate::candle::gau_attention) between gates, in the
    /// place of attention and feed-forward.
    Gau {
        /// s, the width of queries and keys. Default 128.
        #[serde(default = "default_key_width")]
        key_width: usize,
        /// Width of values and gate, in units of `width`. Default 2.
        #[serde(default = "default_expansion")]
        expansion: usize,
        /// Scaling of the weights. Default: the sum of the row with ε = 1e-6, which does not depend on the length.
        #[serde(default = "default_gau_norm")]
        norm: GauNorm,
        /// R ≥ 1 of the relative bias: distances up to R have a number each, those beyond share the last. `None`: no
        /// bias. Default 128.
        #[serde(default = "default_reach")]
        bias_reach: Option<usize>,
    },
    /// FLASH (Hua et al. 2022): [`mixed_chunk_attention`](crate::candle::mixed_chunk_attention) between gates, in the
    /// place of attention and feed-forward, with a relative bias inside chunks.
    Flash {
        /// C, positions in a chunk. Default 256.
        #[serde(default = "default_chunk")]
        chunk: usize,
        /// s, the width of queries and keys. Default 128.
        #[serde(default = "default_key_width")]
        key_width: usize,
        /// Width of values and gate, in units of `width`. Default 2.
        #[serde(default = "default_expansion")]
        expansion: usize,
        /// Scaling of the part between chunks. Default: the mean over finished chunks.
        #[serde(default)]
        global_norm: GlobalNorm,
    },
}

fn default_features() -> usize {
    256
}

fn default_feature_kind() -> FeatureKind {
    FeatureKind::Orthogonal
}

fn default_epsilon() -> f64 {
    1e-6
}

fn default_block() -> usize {
    64
}

fn default_diag_weight() -> DiagWeight {
    DiagWeight::Softmax
}

fn default_key_width() -> usize {
    128
}

fn default_expansion() -> usize {
    2
}

fn default_gau_norm() -> GauNorm {
    GauNorm::RowSum { epsilon: 1e-6 }
}

fn default_reach() -> Option<usize> {
    Some(128)
}

fn default_chunk() -> usize {
    256
}

impl Default for Mechanism {
    /// Softmax over all keys.
    fn default() -> Self {
        Self::Softmax { window: None, soft_cap: None }
    }
}

impl Mechanism {
    /// The names of all kinds.
    pub const NAMES: [&'static str; 8] =
        ["softmax", "linear", "performer", "norm", "diag", "retention", "gau", "flash"];

    /// The mechanism of that [name](Self::NAMES) with its defaults.
    ///
    /// # Errors
    /// A name that is not in the list.
    pub fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "softmax" => Self::default(),
            "linear" => Self::Linear { map: FeatureMap::EluPlusOne, normalized: true },
            "performer" => Self::Performer {
                features: default_features(),
                directions: default_feature_kind(),
                seed: 0,
                map: FavorMap::Positive,
                epsilon: default_epsilon(),
            },
            "norm" => Self::Norm { map: FeatureMap::EluPlusOne, epsilon: default_epsilon(), scope: NormScope::Head },
            "diag" => Self::Diag { block: default_block(), weight: default_diag_weight() },
            "retention" => Self::Retention { log_decay: None, gate: true, epsilon: default_epsilon() },
            "gau" => Self::Gau {
                key_width: default_key_width(),
                expansion: default_expansion(),
                norm: default_gau_norm(),
                bias_reach: default_reach(),
            },
            "flash" => Self::Flash {
                chunk: default_chunk(),
                key_width: default_key_width(),
                expansion: default_expansion(),
                global_norm: GlobalNorm::Mean,
            },
            _ => {
                let (got, needs) = (format!("`{name}`"), format!("one of {}", Self::NAMES.join(", ")));
                return Err(Error::Value { function: "Mechanism::named", argument: "name", got, needs }.into());
            }
        })
    }

    /// The name of the kind, as in a configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Softmax { .. } => "softmax",
            Self::Linear { .. } => "linear",
            Self::Performer { .. } => "performer",
            Self::Norm { .. } => "norm",
            Self::Diag { .. } => "diag",
            Self::Retention { .. } => "retention",
            Self::Gau { .. } => "gau",
            Self::Flash { .. } => "flash",
        }
    }

    /// Whether the layer has gates of its own and stands in the place of attention and feed-forward.
    pub fn is_gated_unit(&self) -> bool {
        matches!(self, Self::Gau { .. } | Self::Flash { .. })
    }
}
