use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::config::AttentionConfig;
use super::feed_forward::FeedForwardConfig;
use super::mechanism::Mechanism;
use super::norm::NormConfig;
use crate::activation::Activation;
use crate::problem::ensure_value;

/// What a [`LanguageModel`](super::LanguageModel) is made of.
///
/// # Example
/// ```
/// use attn_kernels::nn::{LanguageModelConfig, Mechanism};
///
/// let config = LanguageModelConfig::named("transnormer", 256, 64, 4, 2)?;
/// assert_eq!((config.mechanism(1).name(), config.mechanism(2).name()), ("diag", "norm"));
/// let json = serde_json::to_string(&config).unwrap();
/// assert_eq!(serde_json::from_str::<LanguageModelConfig>(&json).unwrap(), config);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageModelConfig {
    /// Tokens are numbers below this.
    pub vocabulary: usize,
    /// Blocks.
    pub layers: usize,
    /// The attention of every block; its width is that of the model.
    pub attention: AttentionConfig,
    /// The mechanism of the second half of the blocks, if it is another (of L blocks, the last ⌈L/2⌉). Default: none.
    #[serde(default)]
    pub second_half: Option<Mechanism>,
    /// The feed-forward part of every block but those of gated units, which have none. Default: none.
    #[serde(default)]
    pub feed_forward: Option<FeedForwardConfig>,
    /// The norm before each part and at the end. Default: RMS.
    #[serde(default)]
    pub norm: NormConfig,
    /// Whether the head has the weights of the embedding. Default: no.
    #[serde(default)]
    pub tied: bool,
}

impl LanguageModelConfig {
    /// The names that [`named`](Self::named) knows.
    pub const NAMES: [&'static str; 9] =
        ["softmax", "linear", "performer", "norm", "diag", "retention", "gau", "flash", "transnormer"];

    /// The usual model of a mechanism, causal, with rotary embedding of base 10000:
    ///
    /// | name | blocks |
    /// | --- | --- |
    /// | `softmax`, `linear`, `performer`, `norm`, `diag`, `retention` | that attention; SwiGLU of hidden width 8/3 · width, in steps of 8 |
    /// | `gau`, `flash` | the gated unit alone (`heads` does not matter): two of them weigh as much as a block of the others |
    /// | `transnormer` | diag in the first half of the blocks, norm in the second; SwiGLU |
    ///
    /// # Errors
    /// A name that is not in [`NAMES`](Self::NAMES).
    pub fn named(name: &str, vocabulary: usize, width: usize, layers: usize, heads: usize) -> Result<Self> {
        let (first, second_half) = match name {
            "transnormer" => ("diag", Some(Mechanism::named("norm")?)),
            other => (other, None),
        };
        let mechanism = Mechanism::named(first)?;
        let is_gated = mechanism.is_gated_unit();
        let heads = if is_gated { 1 } else { heads };
        let attention = AttentionConfig { rotary: Some(10000.0), ..AttentionConfig::new(width, heads, mechanism) };
        let hidden = (8 * width).div_ceil(3).next_multiple_of(8);
        let swiglu = FeedForwardConfig { hidden, gated: true, activation: Activation::Silu, bias: false };
        let feed_forward = (!is_gated).then_some(swiglu);
        Ok(Self { vocabulary, layers, attention, second_half, feed_forward, norm: NormConfig::default(), tied: false })
    }

    /// The mechanism of block `layer`, from 0.
    pub fn mechanism(&self, layer: usize) -> &Mechanism {
        match &self.second_half {
            Some(second) if layer >= self.layers / 2 => second,
            _ => &self.attention.mechanism,
        }
    }

    /// The attention of block `layer`, from 0. Random features of a Performer are drawn from the seed plus `layer`.
    pub fn attention(&self, layer: usize) -> AttentionConfig {
        let mut mechanism = self.mechanism(layer).clone();
        if let Mechanism::Performer { seed, .. } = &mut mechanism {
            *seed = seed.wrapping_add(layer as u64);
        }
        AttentionConfig { mechanism, ..self.attention.clone() }
    }

    /// Refuses what no model can be.
    ///
    /// # Errors
    /// No tokens, no blocks, or an attention that [`AttentionConfig::check`] refuses.
    pub fn check(&self) -> Result<()> {
        let function = "LanguageModelConfig";
        ensure_value(self.vocabulary > 0, function, "vocabulary", self.vocabulary, "at least 1")?;
        ensure_value(self.layers > 0, function, "layers", self.layers, "at least 1")?;
        (0..self.layers).try_for_each(|layer| self.attention(layer).check())
    }
}
