use std::borrow::BorrowMut;

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::attention::Attention;
use super::batch::{Batch, gathered, packed_tokens};
use super::cache::Cache;
use super::feed_forward::FeedForward;
use super::first_values::FirstValues;
use super::model_config::LanguageModelConfig;
use super::norm::Norm;
use super::pieces::{Piece, cut};
use super::projection::{Products, Projection};
use super::siblings::ensure_absent;
use crate::Sequences;
use crate::problem::ensure_value;

/// One block of a model: with RMS or layer norm before each part,
///
/// ```text
/// y = x + attention(norm(x))
/// z = y + feed_forward(norm(y))       not after a gated unit
/// ```
///
/// Weights: `input_layernorm`, `self_attn`, `post_attention_layernorm`, `mlp`, as in LLaMA checkpoints.
#[derive(Debug, Clone)]
pub struct Block {
    attention_norm: Norm,
    pub(super) attention: Attention,
    feed_forward: Option<(Norm, FeedForward)>,
}

impl Block {
    /// Block `layer` of a model, from 0.
    ///
    /// # Errors
    /// A configuration out of range; weights that are missing or do not fit, or that the block would leave out.
    pub fn new(config: &LanguageModelConfig, layer: usize, weights: VarBuilder) -> Result<Self> {
        let attention = config.attention(layer);
        let width = attention.width;
        let norm = |name: &str| Norm::new(width, &config.norm, weights.pp(name));
        let inner = config.feed_forward.filter(|_| !attention.mechanism.is_gated_unit());
        let feed_forward = |inner| -> Result<_> {
            Ok((norm("post_attention_layernorm")?, FeedForward::new(width, &inner, weights.pp("mlp"))?))
        };
        let block = Self {
            attention_norm: norm("input_layernorm")?,
            attention: Attention::new(&attention, weights.pp("self_attn"))?,
            feed_forward: inner.map(feed_forward).transpose()?,
        };
        let feed_forward =
            ["post_attention_layernorm.weight", "mlp.up_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"];
        let unused = feed_forward.into_iter().filter(|_| inner.is_none());
        let unused = unused.chain(["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"]);
        ensure_absent(&weights, unused, "a block of this configuration has no such part")?;
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

    fn forward_batch(&self, x: &Tensor, batch: Batch<'_>, first: &mut FirstValues) -> Result<Tensor> {
        let attended = self.attention.forward_batch(&self.attention_norm.forward(x)?, batch, first)?;
        self.finish(x, attended, Products::Joint)
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
        let attended = self.attention.forward_pieces(function, &self.attention_norm.forward(x)?, pieces, first)?;
        self.finish(x, attended, Products::Alone)
    }

    fn finish(&self, x: &Tensor, attended: Tensor, products: Products) -> Result<Tensor> {
        let x = (x + attended)?;
        match &self.feed_forward {
            Some((norm, feed_forward)) => &x + feed_forward.forward_by(&norm.forward(&x)?, products)?,
            None => Ok(x),
        }
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_masked(x, None)
    }
}

/// A decoder-only language model: tokens `[B, N]` (u32) → logits `[B, N, vocabulary]`.
///
/// ```text
/// x      = embedding(tokens)
/// x      = block_l(x)             for every block
/// logits = norm(x) W_head
/// ```
///
/// Weights: `embed_tokens.weight` `[vocabulary, width]`, `layers.<l>.…` (see [`Block`] and [`Attention`]), `norm`,
/// `lm_head.weight` `[vocabulary, width]` unless tied. Gradients: all of them.
///
/// # Example
/// ```
/// use attn_kernels::nn::{LanguageModel, LanguageModelConfig, Sampler, SamplerConfig};
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let variables = VarMap::new();
/// let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let model = LanguageModel::new(&LanguageModelConfig::named("retention", 256, 32, 2, 2)?, weights)?;
/// let tokens = Tensor::new(&[[72u32, 101, 108, 108]], &Device::Cpu)?;
/// assert_eq!(model.forward(&tokens)?.dims(), [1, 4, 256]);
///
/// let mut cache = model.cache()?;
/// let sampler = Sampler::new(SamplerConfig { temperature: 0.8, top_p: Some(0.95), ..Default::default() })?;
/// let continued = model.generate(&[72, 101, 108, 108], sampler, &mut cache)?;
/// let tokens: Vec<u32> = continued.take(5).collect::<Result<_, _>>()?;
/// assert_eq!(tokens.len(), 5);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LanguageModel {
    config: LanguageModelConfig,
    pub(super) embedding: Tensor,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: Norm,
    pub(super) head: Projection,
}

impl LanguageModel {
    /// Takes the weights of the model, or makes them if `weights` come from a `VarMap` that has none.
    ///
    /// # Errors
    /// A configuration that [`LanguageModelConfig::check`] refuses; weights that are missing or of another shape, or of
    /// another mechanism; weights that the model would leave out (of more layers, of a head of its own). The error names
    /// the tensor.
    pub fn new(config: &LanguageModelConfig, weights: VarBuilder) -> Result<Self> {
        config.check()?;
        let width = config.attention.width;
        let matrix = |name: &str| {
            let init = Init::Randn { mean: 0.0, stdev: 0.02 };
            weights.pp(name).get_with_hints((config.vocabulary, width), "weight", init)
        };
        let beyond = format!("layers.{}.input_layernorm.weight", config.layers);
        let why = "a model of this configuration has no such part";
        ensure_absent(&weights, [beyond.as_str(), "lm_head.bias", "embed_positions.weight"], why)?;
        let embedding = matrix("embed_tokens")?;
        if config.tied {
            ensure_tied(&weights, &embedding)?;
        }
        let layers = weights.pp("layers");
        let blocks = (0..config.layers).map(|layer| Block::new(config, layer, layers.pp(layer)));
        let blocks = blocks.collect::<Result<_>>()?;
        let head = if config.tied { embedding.clone() } else { matrix("lm_head")? };
        let norm = Norm::new(width, &config.norm, weights.pp("norm"))?;
        Ok(Self { config: config.clone(), embedding, blocks, norm, head: Projection::of(head) })
    }

    /// The configuration.
    pub fn config(&self) -> &LanguageModelConfig {
        &self.config
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Draws the random directions of all Performer layers anew, as [`Attention::redraw`]: block l from `seed + l`.
    ///
    /// # Errors
    /// A model without Performer layers.
    pub fn redraw(&mut self, seed: u64) -> Result<()> {
        let layers = (0u64..).zip(self.blocks.iter_mut().map(|block| &mut block.attention));
        let layers: Vec<_> = layers.filter(|(_, layer)| layer.config().mechanism.name() == "performer").collect();
        let (function, needs) = ("LanguageModel::redraw", "a model with performer layers");
        ensure_value(!layers.is_empty(), function, "self", "a model without random features", needs)?;
        layers.into_iter().try_for_each(|(index, layer)| layer.redraw(seed.wrapping_add(index)))
    }

    /// The logits after every token; keys whose entry of `key_mask` `[B, N]` (u8) is 0 are not seen, and positions
    /// count those that are, so that sequences may be padded on either side: see [`Attention::forward_masked`]. Without
    /// a mask this is `Module::forward`.
    ///
    /// # Errors
    /// Tokens of another rank or dtype, or beyond the vocabulary; as [`Attention::forward_masked`].
    pub fn forward_masked(&self, tokens: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        let x = self.embed("LanguageModel::forward", tokens)?;
        let x = gathered(&x, key_mask, |x, batch| self.forward_batch(x, batch))?;
        self.head.forward(&self.norm.forward(&x)?, Products::Joint)
    }

    /// The logits `[1, T, vocabulary]` after every token of packed sequences, `tokens` `[1, T]`, each as if it were alone:
    /// a batch for training without padding.
    ///
    /// # Errors
    /// Tokens of another rank or dtype, or beyond the vocabulary; as [`Attention::forward_sequences`].
    pub fn forward_sequences(&self, tokens: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        let x = self.embed("LanguageModel::forward_sequences", tokens)?;
        let x = self.forward_batch(&x, Batch { sequences: Some(sequences), key_mask: None })?;
        self.head.forward(&self.norm.forward(&x)?, Products::Joint)
    }

    fn forward_batch(&self, x: &Tensor, batch: Batch<'_>) -> Result<Tensor> {
        let mut first = FirstValues::default();
        self.blocks.iter().try_fold(x.clone(), |x, block| block.forward_batch(&x, batch, &mut first))
    }

    /// Words what a device says of a token that is not in the vocabulary; other errors stay.
    fn beyond(&self, tokens: &Tensor, error: candle_core::Error) -> candle_core::Error {
        let largest = tokens.flatten_all().and_then(|tokens| tokens.max(0)?.to_scalar::<u32>());
        let vocabulary = self.config.vocabulary;
        let Some(got) = largest.ok().filter(|token| *token as usize >= vocabulary) else { return error };
        let (got, needs) = (format!("{got} somewhere"), format!("numbers below the vocabulary of {vocabulary}"));
        crate::Error::Value { function: "LanguageModel::forward", argument: "tokens", got, needs }.into()
    }

    /// [B, N] → [B, N, width]
    pub(super) fn embed(&self, function: &'static str, tokens: &Tensor) -> Result<Tensor> {
        let (batch, count) = match *tokens.dims() {
            [batch, count] => (batch, count),
            ref dims => {
                let (got, needs) = (format!("shape {dims:?}"), "[batch, tokens]".to_string());
                return Err(crate::Error::Shape { function, argument: "tokens", got, needs }.into());
            }
        };
        if tokens.dtype() != DType::U32 {
            let (got, needs) = (tokens.dtype().as_str().to_string(), "u32".to_string());
            return Err(crate::Error::DType { function, argument: "tokens", got, needs }.into());
        }
        let rows =
            self.embedding.index_select(&tokens.flatten_all()?, 0).map_err(|error| self.beyond(tokens, error))?;
        rows.reshape((batch, count, self.config.attention.width))
    }
}

/// Refuses a head that is not the embedding. (Some files hold the shared weights twice.)
fn ensure_tied(weights: &VarBuilder, embedding: &Tensor) -> Result<()> {
    let head = weights.pp("lm_head");
    if ensure_absent(&head, ["weight"], "").is_ok() {
        return Ok(());
    }
    let weight = head.get_with_hints(embedding.shape(), "weight", Init::Const(0.0))?;
    let difference = (weight - embedding)?.abs()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    match difference == 0.0 {
        true => Ok(()),
        false => ensure_absent(&head, ["weight"], "the configuration says `tied`, and this is not the embedding"),
    }
}

impl Module for LanguageModel {
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.forward_masked(tokens, None)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::VarMap;

    use super::*;
    use crate::nn::seeded_weights;

    /// A second layer that fails leaves the first as it was, to go on from there.
    #[test]
    fn a_failure_changes_no_layer() -> Result<()> {
        for name in LanguageModelConfig::NAMES {
            let config = LanguageModelConfig::named(name, 7, 8, 2, 1)?;
            let model = LanguageModel::new(&config, seeded_weights(&VarMap::new(), 0, DType::F64, &Device::Cpu))?;
            let tokens = Tensor::new(&[[1u32, 2, 6, 3, 5, 1, 0, 4]], &Device::Cpu)?;
            let whole = model.forward(&tokens)?.narrow(1, 5, 3)?;
            let mut cache = model.cache()?;
            model.forward_cached(&tokens.narrow(1, 0, 5)?, &mut cache)?;
            // Two sequences where the layer before has one.
            let good = cache.clone();
            cache.layers_mut()[1].reorder(&[0, 0])?;
            let refused = model.forward_cached(&tokens.narrow(1, 0, 3)?, &mut cache);
            assert!(refused.is_err_and(|error| error.to_string().contains("as in the cache")), "{name}");
            cache.layers_mut()[1] = good.layers()[1].clone();
            assert!(cache.layers().iter().all(|layer| layer.len() == 5), "{name}");
            let out = model.forward_cached(&tokens.narrow(1, 5, 3)?, &mut cache)?;
            let error = (out - whole)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-12, "{name}: {error}");
        }
        Ok(())
    }
}
