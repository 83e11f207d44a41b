use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::block::NormPlacement;
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
    /// The attention of every block, or of the first of a `pattern`; its width is that of the model.
    pub attention: AttentionConfig,
    /// Attention layers that take turns with `attention`: the blocks have that, then these in their order, then that again and
    /// so on. Three delta rules to one softmax are a delta rule in `attention` and two of it and softmax here. A pattern may be
    /// as long as the model. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pattern: Vec<AttentionConfig>,
    /// The mechanism of the second half of the blocks, if it is another (of L blocks, the last ⌈L/2⌉). Default: none.
    #[serde(default)]
    pub second_half: Option<Mechanism>,
    /// The feed-forward part of every block but those of gated units, which have none. Default: none.
    #[serde(default)]
    pub feed_forward: Option<FeedForwardConfig>,
    /// The norm of each part and at the end. Default: RMS.
    #[serde(default)]
    pub norm: NormConfig,
    /// Where the blocks have their norms. Default: before each part.
    #[serde(default)]
    pub norms: NormPlacement,
    /// Learned positions, added to the rows of tokens, of so many tokens in a sequence at most. Default: none.
    #[serde(default)]
    pub positions: Option<usize>,
    /// What the rows of the embedding are multiplied with: the root of the width in Gemma. Default: none.
    #[serde(default)]
    pub embedding_scale: Option<f64>,
    /// c of logits c · tanh(logits / c). Default: none.
    #[serde(default)]
    pub logit_soft_cap: Option<f64>,
    /// Whether the head has the weights of the embedding. Default: no.
    #[serde(default)]
    pub tied: bool,
}

impl LanguageModelConfig {
    /// The names that [`named`](Self::named) knows.
    pub const NAMES: [&'static str; Mechanism::NAMES.len() + 2] = {
        let mut names = [""; Mechanism::NAMES.len() + 2];
        let mut at = 0;
        while at < Mechanism::NAMES.len() {
            names[at] = Mechanism::NAMES[at];
            at += 1;
        }
        (names[at], names[at + 1]) = ("transnormer", "hybrid");
        names
    };

    /// Blocks of that attention alone, with an RMS norm before it and at the end, and a head of its own.
    pub fn new(vocabulary: usize, layers: usize, attention: AttentionConfig) -> Self {
        Self {
            vocabulary,
            layers,
            attention,
            pattern: Vec::new(),
            second_half: None,
            feed_forward: None,
            norm: NormConfig::default(),
            norms: NormPlacement::Before,
            positions: None,
            embedding_scale: None,
            logit_soft_cap: None,
            tied: false,
        }
    }

    /// The usual model of a mechanism, causal, with rotary embedding of base 10000 where the mechanism takes one:
    ///
    /// | name | blocks |
    /// | --- | --- |
    /// | `softmax`, `linear`, `performer`, `norm`, `diag`, `retention` | that attention; SwiGLU of hidden width 8/3 · width, in steps of 8 |
    /// | `gau`, `flash` | the gated unit alone (`heads` does not matter): two of them weigh as much as a block of the others |
    /// | `gla`, `deltanet`, `gated_deltanet`, `kda`, `lightning`, `rwkv7` | that recurrent layer; SwiGLU |
    /// | `mamba2` | that layer alone, with `heads` heads of twice the width |
    /// | `mamba` | that layer alone, of twice the width (`heads` does not matter) |
    /// | `s4d`, `lru` | that layer alone (`heads` does not matter) |
    /// | `hybrid` | `gated_deltanet`, but every fourth and the last `softmax`, as in Qwen3-Next and Kimi Linear; SwiGLU |
    /// | `transnormer` | diag in the first half of the blocks, norm in the second; SwiGLU |
    ///
    /// # Errors
    /// A name that is not in [`NAMES`](Self::NAMES).
    pub fn named(name: &str, vocabulary: usize, width: usize, layers: usize, heads: usize) -> Result<Self> {
        let (first, second_half) = match name {
            "transnormer" => ("diag", Some(Mechanism::named("norm")?)),
            "hybrid" => ("gated_deltanet", None),
            other => (other, None),
        };
        let mechanism = Mechanism::named(first)?;
        let heads = if mechanism.has_one_head() { 1 } else { heads };
        let stands_alone = mechanism.stands_alone();
        let of = |mechanism: Mechanism| {
            let rotary = (!mechanism.is_recurrent()).then_some(10000.0.into());
            AttentionConfig { rotary, ..AttentionConfig::new(width, heads, mechanism) }
        };
        let block = |layer: usize| match layer % 4 == 3 || layer + 1 == layers {
            true => of(Mechanism::default()),
            false => of(mechanism.clone()),
        };
        let (attention, pattern) = match name {
            "hybrid" => {
                let turns = if layers.is_multiple_of(4) { layers.min(4) } else { layers };
                (block(0), (1..turns).map(block).collect())
            }
            _ => (of(mechanism), Vec::new()),
        };
        let hidden = (8 * width).div_ceil(3).next_multiple_of(8);
        let swiglu = FeedForwardConfig { hidden, gated: true, activation: Activation::Silu, bias: false };
        let feed_forward = (!stands_alone).then_some(swiglu);
        Ok(Self { pattern, second_half, feed_forward, ..Self::new(vocabulary, layers, attention) })
    }

    /// The mechanism of block `layer`, from 0.
    pub fn mechanism(&self, layer: usize) -> &Mechanism {
        match &self.second_half {
            Some(second) if layer >= self.layers / 2 => second,
            _ => &self.turn(layer).mechanism,
        }
    }

    /// Whose turn it is.
    fn turn(&self, layer: usize) -> &AttentionConfig {
        match layer % (self.pattern.len() + 1) {
            0 => &self.attention,
            turn => &self.pattern[turn - 1],
        }
    }

    /// The attention of block `layer`, from 0. Random features of a Performer are drawn from the seed plus `layer`; lightning
    /// attention without a place has that of the block, RWKV-7 that among the blocks of its kind.
    pub fn attention(&self, layer: usize) -> AttentionConfig {
        let mut mechanism = self.mechanism(layer).clone();
        match &mut mechanism {
            Mechanism::Performer { seed, .. } => *seed = seed.wrapping_add(layer as u64),
            Mechanism::Lightning { place, .. } => *place = Some(place.unwrap_or([layer, self.layers])),
            Mechanism::Rwkv7 { place, .. } => {
                let among = |blocks: std::ops::Range<usize>| {
                    blocks.filter(|block| matches!(self.mechanism(*block), Mechanism::Rwkv7 { .. })).count()
                };
                *place = Some(place.unwrap_or_else(|| [among(0..layer), among(0..self.layers)]));
            }
            _ => {}
        }
        AttentionConfig { mechanism, ..self.turn(layer).clone() }
    }

    /// Refuses what no model can be.
    ///
    /// # Errors
    /// No tokens, no blocks, no positions, a scale or a cap that is no number above 0, a pattern beside a second half or of layers of another width, more layers in it than blocks, or an
    /// attention that [`AttentionConfig::check`] refuses.
    pub fn check(&self) -> Result<()> {
        let function = "LanguageModelConfig";
        ensure_value(self.vocabulary > 0, function, "vocabulary", self.vocabulary, "at least 1")?;
        ensure_value(self.layers > 0, function, "layers", self.layers, "at least 1")?;
        ensure_value(self.positions != Some(0), function, "positions", 0, "at least 1")?;
        let factors = [("embedding_scale", self.embedding_scale), ("logit_soft_cap", self.logit_soft_cap)];
        for (argument, factor) in factors {
            let is_one = factor.is_none_or(|factor| factor.is_finite() && factor > 0.0);
            ensure_value(is_one, function, argument, factor.unwrap_or_default(), "a finite number above 0")?;
        }
        let is_one = self.pattern.is_empty() || self.second_half.is_none();
        ensure_value(is_one, function, "second_half", "given", "none beside a `pattern`")?;
        let (turns, needs) =
            (self.pattern.len() + 1, format!("at most {} layers in turn, as many as blocks", self.layers));
        let got = format!("of {turns} layers with `attention`");
        ensure_value(self.pattern.is_empty() || turns <= self.layers, function, "pattern", got, &needs)?;
        let width = self.attention.width;
        let other = self.pattern.iter().map(|layer| layer.width).find(|other| *other != width);
        let got = format!("of a layer of width {}", other.unwrap_or_default());
        ensure_value(
            other.is_none(),
            function,
            "pattern",
            got,
            &format!("layers of width {width}, that of `attention`"),
        )?;
        (0..self.layers).try_for_each(|layer| self.attention(layer).check())?;
        self.check_first_values()
    }

    /// RWKV-7 layers behind the first need its values, as wide as their own.
    fn check_first_values(&self) -> Result<()> {
        let (function, mut first) = ("LanguageModelConfig", None);
        for attention in (0..self.layers).map(|layer| self.attention(layer)) {
            let Mechanism::Rwkv7 { place: Some(place), .. } = attention.mechanism else { continue };
            let width = attention.heads * attention.head_width();
            let (of_first, is_behind) = (first.unwrap_or(width), place[0] > 0);
            let needs = "a layer of number 0 before the others, whose values these take";
            ensure_value(!is_behind || first.is_some(), function, "place", format!("{place:?}"), needs)?;
            let needs = format!("heads of width {of_first} together, as in the first rwkv7 layer");
            ensure_value(!is_behind || width == of_first, function, "heads", format!("of width {width}"), &needs)?;
            first = Some(of_first);
        }
        Ok(())
    }
}
