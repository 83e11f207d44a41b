use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::check::{check_mechanism, check_options, check_size};
use super::mechanism::Mechanism;
use super::norm::NormConfig;
use crate::candle::rotary_config::RotaryConfig;
use crate::problem::ensure_value;

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
/// let by_hand = AttentionConfig { key_heads: Some(2), rotary: Some(10000.0.into()), ..AttentionConfig::new(64, 4, mechanism) };
/// assert_eq!(config, by_hand);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConfig {
    /// Width of the layer's input and output rows.
    pub width: usize,
    /// Query heads. GAU, FLASH, Mamba, S4D and LRU have one head by construction and need 1 here. In Gated DeltaNet and Mamba-2 heads of values.
    pub heads: usize,
    /// Heads of keys and values, a divisor of `heads`. In Gated DeltaNet heads of queries and keys, in Mamba-2 groups of B and
    /// C; the other delta rules, lightning attention and RWKV-7 have as many as `heads`. Default: `heads`; 1 in Mamba-2.
    #[serde(default)]
    pub key_heads: Option<usize>,
    /// Width of a head of queries, keys and values; of values alone where the mechanism has a `key_width`. Default:
    /// `width / heads`, twice that in Mamba-2.
    #[serde(default)]
    pub head_width: Option<usize>,
    /// Whether a token sees only itself and those before it. Default: yes.
    #[serde(default = "yes")]
    pub causal: bool,
    /// Whether the projections have a bias, but for those in `unbiased`. Default: no.
    #[serde(default)]
    pub bias: bool,
    /// Projections that have no bias though `bias` is set, by the names of their weights: `["o_proj"]` in Qwen2,
    /// `["k_proj"]` in Whisper. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unbiased: Vec<String>,
    /// Rotary embedding of queries and keys: its base, usually 10000, or a [`RotaryConfig`]. Linear attention, norm and
    /// Performer rotate the features, [behind φ](crate::candle::rotary_linear_attention). Recurrent layers have none.
    /// Default: none.
    #[serde(default)]
    pub rotary: Option<RotaryConfig>,
    /// τ of softmax. Default: 1/√head_width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Norms of queries and keys before their rotation, in layers with heads. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Whether heads of softmax have a sink, a score of its own that all queries see (GPT-OSS, OpenAI 2025). Default: no.
    #[serde(default, skip_serializing_if = "is_not")]
    pub sinks: bool,
    /// Whether softmax has a gate: the output of each head is multiplied by sigmoid(x W), whose rows follow those of the head's
    /// queries in `q_proj`, as in Qwen3-Next. Default: no.
    #[serde(default, skip_serializing_if = "is_not")]
    pub output_gate: bool,
    /// The kind of attention. Default: softmax.
    #[serde(default)]
    pub mechanism: Mechanism,
}

/// Norms of queries and keys, `q_norm` and `k_norm`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QueryKeyNorm {
    /// The norm.
    pub norm: NormConfig,
    /// Whether it is of the rows of all heads together, as in OLMo 2, instead of each head's with weights for all, as in Qwen3.
    /// Default: no.
    pub joint: bool,
}

pub(super) fn yes() -> bool {
    true
}

fn is_not(choice: &bool) -> bool {
    !choice
}

impl AttentionConfig {
    /// Causal attention with as many key heads as query heads, without bias and rotary embedding.
    pub fn new(width: usize, heads: usize, mechanism: Mechanism) -> Self {
        Self {
            width,
            heads,
            key_heads: None,
            head_width: None,
            causal: true,
            bias: false,
            unbiased: Vec::new(),
            rotary: None,
            scale: None,
            query_key_norm: None,
            sinks: false,
            output_gate: false,
            mechanism,
        }
    }

    /// Names of the projections among the weights of the layer.
    pub(super) fn projections(&self) -> &'static [&'static str] {
        match self.mechanism {
            Mechanism::Retention { gate: true, .. } => &["q_proj", "k_proj", "v_proj", "o_proj", "g_proj"],
            Mechanism::Gau { .. } | Mechanism::Flash { .. } => &["z_proj", "u_proj", "v_proj", "o_proj"],
            Mechanism::Gla { .. } => &["q_proj", "k_proj", "v_proj", "o_proj", "g_proj"],
            Mechanism::Deltanet { gate: false, .. } => &["q_proj", "k_proj", "v_proj", "o_proj", "b_proj"],
            Mechanism::Deltanet { .. } => &["q_proj", "k_proj", "v_proj", "o_proj", "b_proj", "g_proj"],
            Mechanism::GatedDeltanet { .. } => &["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"],
            Mechanism::Kda { .. } => {
                &["q_proj", "k_proj", "v_proj", "o_proj", "b_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"]
            }
            Mechanism::Mamba2 { .. } | Mechanism::Mamba { .. } => &["in_proj", "out_proj"],
            Mechanism::Lightning { .. } => &["qkv_proj", "output_gate", "out_proj"],
            Mechanism::Rwkv7 { .. } => &["r_proj", "k_proj", "v_proj", "o_proj"],
            Mechanism::S4d { .. } => &["output_linear.0"],
            Mechanism::Lru { .. } => &["out1", "out2"],
            _ => &["q_proj", "k_proj", "v_proj", "o_proj"],
        }
    }

    /// The field that says how wide the rows are that a rotary embedding rotates, and how wide.
    pub(super) fn rotated_width(&self) -> (&'static str, usize) {
        match self.mechanism {
            Mechanism::Performer { features, map, .. } => ("features", map.feature_width(features)),
            Mechanism::Gau { key_width, .. } | Mechanism::Flash { key_width, .. } => ("key_width", key_width),
            _ => ("head_width", self.head_width()),
        }
    }

    /// Whether that projection has a bias.
    pub(super) fn has_bias(&self, projection: &str) -> bool {
        self.bias && !self.unbiased.iter().any(|name| name == projection)
    }

    /// Heads of keys and values.
    pub fn key_heads(&self) -> usize {
        let usual = if matches!(self.mechanism, Mechanism::Mamba2 { .. }) { 1 } else { self.heads };
        self.key_heads.unwrap_or(usual)
    }

    /// Width of a head.
    pub fn head_width(&self) -> usize {
        self.head_width.unwrap_or(self.inner_width() / self.heads.max(1))
    }

    /// Width of all heads, where `head_width` does not say otherwise.
    fn inner_width(&self) -> usize {
        match self.mechanism {
            Mechanism::Mamba2 { .. } | Mechanism::Mamba { .. } => self.width.saturating_mul(2),
            _ => self.width,
        }
    }

    /// Refuses what no layer can be.
    ///
    /// # Errors
    /// A width or number of heads of 0, heads that do not divide, a rotary embedding of an odd width, `unbiased`
    /// projections that the layer does not have or without `bias`, a retention or a recurrent layer that is not causal, a
    /// rotary embedding or key heads that a recurrent layer does not have, a scale, norms, sinks or a gate that the mechanism does
    /// not have, a value of the mechanism out of range. The error names the field.
    pub fn check(&self) -> Result<()> {
        let function = "AttentionConfig";
        let sizes = [("width", self.width), ("heads", self.heads), ("key_heads", self.key_heads())];
        for (argument, value) in sizes {
            check_size(argument, value)?;
        }
        let needs = format!("a divisor of {} heads", self.heads);
        ensure_value(self.heads.is_multiple_of(self.key_heads()), function, "key_heads", self.key_heads(), &needs)?;
        if self.head_width.is_none() {
            let width = self.inner_width();
            let needs = format!("a divisor of the width {width}, or a `head_width`");
            ensure_value(width.is_multiple_of(self.heads), function, "heads", self.heads, &needs)?;
        }
        check_size("head_width", self.head_width())?;
        for name in &self.unbiased {
            let got = format!("`{name}`");
            ensure_value(self.bias, function, "unbiased", &got, "`bias` to be set")?;
            let names = self.projections();
            let needs = format!("projections of the layer, {}", names.join(", "));
            ensure_value(names.contains(&name.as_str()), function, "unbiased", &got, &needs)?;
        }
        if let Some(rotary) = &self.rotary {
            let (argument, width) = self.rotated_width();
            rotary.rotated(function, argument, width)?;
        }
        check_options(self)?;
        Ok(check_mechanism(self)?)
    }
}
