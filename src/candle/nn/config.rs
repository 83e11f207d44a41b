use candle_core::Result;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::gau::{GauNorm, GlobalNorm};
use crate::linear::FeatureMap;
use crate::performer::FavorMap;
use crate::problem::ensure_value;
use crate::random_features::FeatureKind;
use crate::transnormer::{DiagWeight, NormScope};

/// What an attention layer computes, for [`Attention`](super::Attention).
///
/// In JSON (or another format of serde) unknown fields are errors, and all but `width` and `heads` may be left out.
///
/// # Example
/// ```
/// use attn_kernels::nn::{AttentionConfig, Mechanism};
///
/// let config: AttentionConfig = serde_json::from_str(
///     r#"{ "width": 64, "heads": 4, "key_heads": 2, "rotary": 10000.0, "mechanism": { "kind": "softmax", "window": 128 } }"#,
/// )?;
/// let mechanism = Mechanism::Softmax { window: Some(128), soft_cap: None };
/// let by_hand = AttentionConfig { key_heads: Some(2), rotary: Some(10000.0), ..AttentionConfig::new(64, 4, mechanism) };
/// assert_eq!(config, by_hand);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConfig {
    /// Width of the layer's input and output rows.
    pub width: usize,
    /// Query heads. GAU and FLASH have one head by construction and need 1 here.
    pub heads: usize,
    /// Heads of keys and values, a divisor of `heads`. Default: `heads`.
    #[serde(default)]
    pub key_heads: Option<usize>,
    /// Width of a head of queries, keys and values. Default: `width / heads`.
    #[serde(default)]
    pub head_width: Option<usize>,
    /// Whether a token sees only itself and those before it. Default: yes.
    #[serde(default = "yes")]
    pub causal: bool,
    /// Whether the projections have a bias. Default: no.
    #[serde(default)]
    pub bias: bool,
    /// Base of the rotary embedding of queries and keys, usually 10000; none without. Default: none.
    #[serde(default)]
    pub rotary: Option<f64>,
    /// The kind of attention. Default: softmax.
    #[serde(default)]
    pub mechanism: Mechanism,
}

fn yes() -> bool {
    true
}

impl AttentionConfig {
    /// Causal attention with as many key heads as query heads, without bias and rotary embedding.
    pub fn new(width: usize, heads: usize, mechanism: Mechanism) -> Self {
        Self { width, heads, key_heads: None, head_width: None, causal: true, bias: false, rotary: None, mechanism }
    }

    /// Heads of keys and values.
    pub fn key_heads(&self) -> usize {
        self.key_heads.unwrap_or(self.heads)
    }

    /// Width of a head.
    pub fn head_width(&self) -> usize {
        self.head_width.unwrap_or(self.width / self.heads.max(1))
    }

    /// Refuses what no layer can be.
    ///
    /// # Errors
    /// A width or number of heads of 0, heads that do not divide, a rotary embedding of an odd width, a retention that
    /// is not causal, a value of the mechanism out of range. The error names the field.
    pub fn check(&self) -> Result<()> {
        let function = "AttentionConfig";
        let at_least_one = [("width", self.width), ("heads", self.heads), ("key_heads", self.key_heads())];
        for (argument, value) in at_least_one {
            ensure_value(value > 0, function, argument, value, "at least 1")?;
        }
        let needs = format!("a divisor of {} heads", self.heads);
        ensure_value(self.heads.is_multiple_of(self.key_heads()), function, "key_heads", self.key_heads(), &needs)?;
        if self.head_width.is_none() {
            let needs = format!("a divisor of the width {}, or a `head_width`", self.width);
            ensure_value(self.width.is_multiple_of(self.heads), function, "heads", self.heads, &needs)?;
        }
        ensure_value(self.head_width() > 0, function, "head_width", 0, "at least 1")?;
        if let Some(base) = self.rotary {
            ensure_value(base.is_finite() && base > 1.0, function, "rotary", base, "a finite base above 1")?;
            let (argument, width) =
                self.mechanism.key_width().map_or(("head_width", self.head_width()), |s| ("key_width", s));
            ensure_value(width.is_multiple_of(2), function, argument, width, "an even number with rotary embedding")?;
        }
        Ok(self.mechanism.check(self)?)
    }
}

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
        /// R of the relative bias: distances up to R have a number each, those beyond share the last. `None`: no
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
        self.key_width().is_some()
    }

    /// s of a gated unit.
    fn key_width(&self) -> Option<usize> {
        match *self {
            Self::Gau { key_width, .. } | Self::Flash { key_width, .. } => Some(key_width),
            _ => None,
        }
    }

    fn check(&self, config: &AttentionConfig) -> crate::Result<()> {
        let function = "AttentionConfig";
        let positive = |argument, value: usize| ensure_value(value > 0, function, argument, value, "at least 1");
        let above_zero = |argument, value: f64| {
            ensure_value(value.is_finite() && value > 0.0, function, argument, value, "a finite number above 0")
        };
        let at_least_zero = |value: f64| {
            ensure_value(value.is_finite() && value >= 0.0, function, "epsilon", value, "a finite number, at least 0")
        };
        match self {
            Self::Softmax { window, soft_cap } => {
                window.map_or(Ok(()), |window| positive("window", window))?;
                soft_cap.map_or(Ok(()), |cap| above_zero("soft_cap", cap))
            }
            Self::Linear { .. } => Ok(()),
            Self::Performer { features, directions, epsilon, .. } => {
                positive("features", *features)?;
                at_least_zero(*epsilon)?;
                let fits = *directions != FeatureKind::HyperbolicPairs || features.is_multiple_of(2);
                ensure_value(fits, function, "features", features, "an even number for hyperbolic pairs")
            }
            Self::Norm { epsilon, .. } => above_zero("epsilon", *epsilon),
            Self::Diag { block, weight } => {
                positive("block", *block)?;
                match weight {
                    DiagWeight::Softmax => Ok(()),
                    DiagWeight::Relu { epsilon } => above_zero("epsilon", *epsilon),
                }
            }
            Self::Retention { log_decay, epsilon, .. } => {
                above_zero("epsilon", *epsilon)?;
                ensure_value(config.causal, function, "causal", "false", "`true` for retention")?;
                let Some(log_decay) = log_decay else { return Ok(()) };
                let needs = format!("one number for each of {} heads of keys", config.key_heads());
                let count = log_decay.len();
                ensure_value(count == config.key_heads(), function, "log_decay", format!("{count} numbers"), &needs)?;
                let bad = log_decay.iter().find(|decay| !(**decay <= 0.0));
                ensure_value(bad.is_none(), function, "log_decay", bad.copied().unwrap_or(0.0), "at most 0")
            }
            Self::Gau { key_width, expansion, norm, .. } => {
                positive("key_width", *key_width)?;
                positive("expansion", *expansion)?;
                match *norm {
                    GauNorm::Fixed { length } => above_zero("length", length)?,
                    GauNorm::RowSum { epsilon } => at_least_zero(epsilon)?,
                    GauNorm::Length | GauNorm::LengthWidth => {}
                }
                one_head(config)
            }
            Self::Flash { chunk, key_width, expansion, .. } => {
                positive("chunk", *chunk)?;
                positive("key_width", *key_width)?;
                positive("expansion", *expansion)?;
                one_head(config)
            }
        }
    }
}

/// Gated units have one head, whose width is their key width.
fn one_head(config: &AttentionConfig) -> crate::Result<()> {
    let (function, kind) = ("AttentionConfig", config.mechanism.name());
    ensure_value(config.heads == 1, function, "heads", config.heads, &format!("1 for {kind}"))?;
    ensure_value(config.key_heads() == 1, function, "key_heads", config.key_heads(), &format!("1 for {kind}"))?;
    let given = config.head_width;
    let got = given.unwrap_or_default();
    ensure_value(given.is_none(), function, "head_width", got, &format!("none for {kind}: its width is `key_width`"))
}
