use std::borrow::BorrowMut;

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::attention::Attention;
use super::batch::{Batch, gathered, packed_tokens};
use super::cache::Cache;
use super::feed_forward::FeedForward;
use super::first_values::FirstValues;
use super::model_config::LanguageModelConfig;
use super::norm::Norm;
use super::pieces::{Piece, cut};
use super::projection::Products;
use super::siblings::ensure_absent;
use crate::Sequences;

/// Where the norms of a [`Block`] stand, f being one of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// y = x + f(norm(x)): LLaMA, GPT-2.
    #[default]
    Before,
    /// y = x + norm(f(norm(x))): Gemma 2.
    Around,
    /// y = x + norm(f(x)): OLMo 2.
    Behind,
    /// y = norm(x + f(x)): the first transformer (Vaswani et al. 2017), BERT.
    After,
}

/// The norms of a part f, y = after(x + behind(f(before(x)))).
#[derive(Debug, Clone)]
struct Residual {
    before: Option<Norm>,
    behind: Option<Norm>,
    after: Option<Norm>,
}

impl Residual {
    /// With the norms of these names, before the part and behind it.
    fn new(config: &LanguageModelConfig, names: [Option<&str>; 2], weights: &VarBuilder) -> Result<Self> {
        let norm = |name: &str| Norm::new(config.attention.width, &config.norm, weights.pp(name));
        let [before, last] = names.map(|name| name.map(norm).transpose());
        let (before, last) = (before?, last?);
        let (behind, after) = if config.norms == NormPlacement::After { (None, last) } else { (last, None) };
        Ok(Self { before, behind, after })
    }

    fn forward(&self, x: &Tensor, part: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let through = |norm: &Option<Norm>, x: &Tensor| norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(x));
        let y = part(&through(&self.before, x)?)?;
        through(&self.after, &(x + through(&self.behind, &y)?)?)
    }
}

/// One block of a model: with RMS or layer norm before each part, or elsewhere by its [`NormPlacement`],
///
/// ```text
/// y = x + attention(norm(x))
/// z = y + feed_forward(norm(y))       not after a gated unit
/// ```
///
/// Weights: `self_attn`, `mlp`, and the norms by the names of LLaMA, Gemma 2 and OLMo 2 checkpoints:
///
/// | norms | of attention: before, behind | of the feed-forward part: before, behind |
/// | --- | --- | --- |
/// | before | `input_layernorm` | `post_attention_layernorm` |
/// | around | `input_layernorm`, `post_attention_layernorm` | `pre_feedforward_layernorm`, `post_feedforward_layernorm` |
/// | behind, after | `post_attention_layernorm` | `post_feedforward_layernorm` |
#[derive(Debug, Clone)]
pub struct Block {
    around_attention: Residual,
    pub(super) attention: Attention,
    feed_forward: Option<(Residual, FeedForward)>,
}

impl Block {
    /// Block `layer` of a model, from 0.
    ///
    /// # Errors
    /// A configuration out of range; weights that are missing or do not fit, or that the block would leave out.
    pub fn new(config: &LanguageModelConfig, layer: usize, weights: VarBuilder) -> Result<Self> {
        let attention = config.attention(layer);
        let inner = config.feed_forward.filter(|_| !attention.mechanism.is_gated_unit());
        let [of_attention, of_feed_forward] = norms(config.norms);
        let feed_forward = |inner| -> Result<_> {
            let residual = Residual::new(config, of_feed_forward, &weights)?;
            Ok((residual, FeedForward::new(attention.width, &inner, weights.pp("mlp"))?))
        };
        let block = Self {
            around_attention: Residual::new(config, of_attention, &weights)?,
            attention: Attention::new(&attention, weights.pp("self_attn"))?,
            feed_forward: inner.map(feed_forward).transpose()?,
        };
        ensure_used(config.norms, inner.is_some(), &weights)?;
        Ok(block)
    }

    /// The attention layer.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// x `[B, N, width]` → `[B, N, width]`; keys whose entry of `key_mask` `[B, N]` is 0 are not seen, and positions
    /// count those that are: see [`Attention::forward_masked`].
    ///
    /// # Errors
    /// As [`Attention::forward_masked`].
    pub fn forward_masked(&self, x: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        gathered(x, key_mask, |x, batch| self.forward_batch(x, batch, &mut FirstValues::default()))
    }

    /// The packed sequences of x `[1, T, width]`, each as if it were alone.
    ///
    /// # Errors
    /// As [`Attention::forward_sequences`].
    pub fn forward_sequences(&self, x: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        self.forward_batch(x, Batch { sequences: Some(sequences), key_mask: None }, &mut FirstValues::default())
    }

    pub(super) fn forward_batch(&self, x: &Tensor, batch: Batch<'_>, first: &mut FirstValues) -> Result<Tensor> {
        let attend = |x: &Tensor| self.attention.forward_batch(x, batch, first);
        self.feed_forward(&self.around_attention.forward(x, attend)?, Products::Joint)
    }

    /// The next rows of the sequences in a cache, as [`Attention::forward_cached`].
    ///
    /// # Errors
    /// As [`Attention::forward_cached`].
    pub fn forward_cached(&self, x: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        let rows = 0..x.dims().get(1).copied().unwrap_or(0);
        self.forward_pieces("Block::forward_cached", x, vec![Piece { rows, cache }], &mut FirstValues::default())
    }

    /// The next rows of sequences of any lengths, as [`Attention::forward_sequences_cached`].
    ///
    /// # Errors
    /// As there.
    pub fn forward_sequences_cached<C: BorrowMut<Cache>>(
        &self,
        x: &Tensor,
        sequences: &Sequences,
        caches: &mut [C],
    ) -> Result<Tensor> {
        let function = "Block::forward_sequences_cached";
        let tokens = packed_tokens(function, "x", x)?;
        self.forward_pieces(function, x, cut(function, tokens, sequences, caches)?, &mut FirstValues::default())
    }

    pub(super) fn forward_pieces(
        &self,
        function: &'static str,
        x: &Tensor,
        pieces: Vec<Piece<&mut Cache>>,
        first: &mut FirstValues,
    ) -> Result<Tensor> {
        let attend = |x: &Tensor| self.attention.forward_pieces(function, x, pieces, first);
        self.feed_forward(&self.around_attention.forward(x, attend)?, Products::Alone)
    }

    fn feed_forward(&self, x: &Tensor, products: Products) -> Result<Tensor> {
        match &self.feed_forward {
            Some((residual, layer)) => residual.forward(x, |x| layer.forward_by(x, products)),
            None => Ok(x.clone()),
        }
    }
}

const NORMS: [&str; 4] =
    ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"];

/// Names of the norms before and behind attention, and before and behind the feed-forward part.
fn norms(placement: NormPlacement) -> [[Option<&'static str>; 2]; 2] {
    let [input, post_attention, pre_feed_forward, post_feed_forward] = NORMS.map(Some);
    match placement {
        NormPlacement::Before => [[input, None], [post_attention, None]],
        NormPlacement::Around => [[input, post_attention], [pre_feed_forward, post_feed_forward]],
        NormPlacement::Behind | NormPlacement::After => [[None, post_attention], [None, post_feed_forward]],
    }
}

/// Refuses weights of blocks that one of this configuration leaves out.
fn ensure_used(placement: NormPlacement, has_feed_forward: bool, weights: &VarBuilder) -> Result<()> {
    let [of_attention, of_feed_forward] = norms(placement);
    let used = [of_attention, if has_feed_forward { of_feed_forward } else { [None; 2] }].concat();
    let feed_forward = ["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"].into_iter().filter(|_| !has_feed_forward);
    let unused = NORMS.into_iter().filter(|name| !used.contains(&Some(name))).chain(feed_forward);
    let unused: Vec<_> = unused.map(|name| format!("{name}.weight")).collect();
    ensure_absent(weights, unused.iter().map(String::as_str), "a block of this configuration has no such part")
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_masked(x, None)
    }
}
