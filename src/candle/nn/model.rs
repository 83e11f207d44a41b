use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::block::Block;
use super::body::Body;
use super::model_config::LanguageModelConfig;
use super::projection::{Products, Projection};
use super::siblings::ensure_absent;
use crate::Sequences;
use crate::problem::ensure_value;

/// A decoder-only language model: tokens `[B, N]` (u32) → logits `[B, N, vocabulary]`.
///
/// ```text
/// x      = scale · embedding(tokens)      + positions, where they are learned
/// x      = block_l(x)                     for every block
/// logits = norm(x) W_head                 c · tanh(… / c) with a soft cap c
/// ```
///
/// Weights: `embed_tokens.weight` `[vocabulary, width]`, `layers.<l>.…` (see [`Block`] and [`Attention`](super::Attention)),
/// `norm`, `lm_head.weight` `[vocabulary, width]` unless tied; `embed_positions.weight` `[positions, width]` where positions
/// are learned, and where blocks end with their norm `embed_norm` instead of `norm`. Gradients: all of them.
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
    pub(super) body: Body,
    head: Projection,
}

impl LanguageModel {
    /// Takes the weights of the model, or makes them if `weights` come from a `VarMap` that has none.
    ///
    /// # Errors
    /// A configuration that [`LanguageModelConfig::check`] refuses; weights that are missing or of another shape, or of
    /// another mechanism; weights that the model would leave out (of more layers, of a head of its own). The error names
    /// the tensor.
    pub fn new(config: &LanguageModelConfig, weights: VarBuilder) -> Result<Self> {
        let body = Body::new(config, &weights)?;
        ensure_absent(&weights, ["lm_head.bias"], "a head has no bias here")?;
        let embedding = &body.embedding.tokens;
        let head = match config.tied {
            true => {
                ensure_tied(&weights, embedding)?;
                embedding.clone()
            }
            false => {
                let init = Init::Randn { mean: 0.0, stdev: 0.02 };
                weights.pp("lm_head").get_with_hints(embedding.shape(), "weight", init)?
            }
        };
        Ok(Self { config: config.clone(), body, head: Projection::of(head) })
    }

    /// The configuration.
    pub fn config(&self) -> &LanguageModelConfig {
        &self.config
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.body.blocks
    }

    /// Draws the random directions of all Performer layers anew, as [`Attention::redraw`](super::Attention::redraw): block l from `seed + l`.
    ///
    /// # Errors
    /// A model without Performer layers.
    pub fn redraw(&mut self, seed: u64) -> Result<()> {
        let layers = (0u64..).zip(self.body.blocks.iter_mut().map(|block| &mut block.attention));
        let layers: Vec<_> = layers.filter(|(_, layer)| layer.config().mechanism.name() == "performer").collect();
        let (function, needs) = ("LanguageModel::redraw", "a model with performer layers");
        ensure_value(!layers.is_empty(), function, "self", "a model without random features", needs)?;
        layers.into_iter().try_for_each(|(index, layer)| layer.redraw(seed.wrapping_add(index)))
    }

    /// The logits after every token; keys whose entry of `key_mask` `[B, N]` (u8) is 0 are not seen, and positions
    /// count those that are, so that sequences may be padded on either side: see [`Attention::forward_masked`](super::Attention::forward_masked). Without
    /// a mask this is `Module::forward`.
    ///
    /// # Errors
    /// Tokens of another rank or dtype, or beyond the vocabulary; as [`Attention::forward_masked`](super::Attention::forward_masked).
    pub fn forward_masked(&self, tokens: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        let rows = self.body.forward("LanguageModel::forward", tokens, key_mask)?;
        self.logits(&rows, Products::Joint)
    }

    /// What the head takes, `[B, N, width]`: the rows behind the last norm, as [`Self::forward_masked`] makes them; for a
    /// classifier or an embedder on top.
    ///
    /// # Errors
    /// As [`Self::forward_masked`].
    pub fn hidden(&self, tokens: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        self.body.forward("LanguageModel::hidden", tokens, key_mask)
    }

    /// The embedding `[vocabulary, width]`.
    pub fn embedding(&self) -> &Tensor {
        &self.body.embedding.tokens
    }

    /// The head's weights `[vocabulary, width]`; the embedding if tied.
    pub fn head(&self) -> &Tensor {
        self.head.weight()
    }

    /// The logits `[1, T, vocabulary]` after every token of packed sequences, `tokens` `[1, T]`, each as if it were alone:
    /// a batch for training without padding.
    ///
    /// # Errors
    /// Tokens of another rank or dtype, or beyond the vocabulary; as [`Attention::forward_sequences`](super::Attention::forward_sequences).
    pub fn forward_sequences(&self, tokens: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        let rows = self.body.forward_sequences("LanguageModel::forward_sequences", tokens, sequences)?;
        self.logits(&rows, Products::Joint)
    }

    /// Logits of rows behind the last norm.
    pub(super) fn logits(&self, rows: &Tensor, products: Products) -> Result<Tensor> {
        let logits = self.head.forward(rows, products)?;
        self.config.logit_soft_cap.map_or(Ok(logits.clone()), |cap| (logits / cap)?.tanh()? * cap)
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
