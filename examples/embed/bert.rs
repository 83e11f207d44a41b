//! BERT's encoder (Devlin et al. 2018) on this crate's attention, from the usual weight names.

use std::path::Path;

use attn_kernels::nn::Activation;
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear};
use serde::Deserialize;

use super::attention::Attention;

/// What is read of config.json.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    pub model_type: String,
    pub hidden_act: String,
    #[serde(default)]
    pub position_embedding_type: Option<String>,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
}

impl Config {
    /// # Errors
    /// A file that cannot be read, and models that this one is not.
    pub fn load(path: &Path) -> std::result::Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let config: Self = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        let refuse = |name, got: &str, needs| Err(format!("{}: {name} is {got}, needs {needs}", path.display()));
        if config.model_type != "bert" {
            return refuse("model_type", &config.model_type, "bert");
        }
        if config.hidden_act != "gelu" {
            return refuse("hidden_act", &config.hidden_act, "gelu");
        }
        if let Some(kind) = config.position_embedding_type.as_deref().filter(|&kind| kind != "absolute") {
            return refuse("position_embedding_type", kind, "absolute");
        }
        if config.num_attention_heads == 0 || !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            let needs = format!("a divisor of hidden_size {}", config.hidden_size);
            return refuse("num_attention_heads", &config.num_attention_heads.to_string(), &needs);
        }
        Ok(config)
    }
}

/// Token ids become hidden states `[batch, length, hidden_size]`.
pub struct Bert {
    words: Embedding,
    positions: Embedding,
    /// All tokens are of the first type.
    kind: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Bert {
    /// Reads weights as `transformers` stores them, in f32, with or without the prefix `bert.`.
    ///
    /// # Errors
    /// A file that cannot be read; a tensor that is missing or of another shape, by its name.
    pub fn load(path: &Path, config: &Config, device: &Device) -> std::result::Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let weights = VarBuilder::from_buffered_safetensors(bytes, DType::F32, device);
        let bert = weights.and_then(|weights| {
            let prefixed = weights.contains_tensor("bert.embeddings.word_embeddings.weight");
            Self::new(config, &if prefixed { weights.pp("bert") } else { weights })
        });
        bert.map_err(|error| format!("{}: {error}", path.display()))
    }

    fn new(config: &Config, weights: &VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let at = weights.pp("embeddings");
        let kinds = embedding(config.type_vocab_size, width, at.pp("token_type_embeddings"))?;
        let layer = |i: usize| Layer::new(config, &weights.pp("encoder.layer").pp(i));
        Ok(Self {
            words: embedding(config.vocab_size, width, at.pp("word_embeddings"))?,
            positions: embedding(config.max_position_embeddings, width, at.pp("position_embeddings"))?,
            kind: kinds.embeddings().get(0)?,
            norm: layer_norm(width, config.layer_norm_eps, at.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// `ids` u32 `[batch, length]`, `key_mask` u8 `[batch, length]`, 0 on padding.
    ///
    /// # Errors
    /// Ids out of the vocabulary, more tokens than positions.
    pub fn forward(&self, ids: &Tensor, key_mask: &Tensor, attention: &Attention) -> Result<Tensor> {
        let positions = Tensor::arange(0, ids.dim(1)? as u32, ids.device())?;
        let hidden = self.words.forward(ids)?.broadcast_add(&self.positions.forward(&positions)?)?;
        let mut hidden = self.norm.forward(&hidden.broadcast_add(&self.kind)?)?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden, key_mask, attention)?;
        }
        Ok(hidden)
    }
}

struct Layer {
    heads: usize,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

impl Layer {
    fn new(config: &Config, weights: &VarBuilder) -> Result<Self> {
        let (width, wide, epsilon) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let (attention, output) = (weights.pp("attention"), weights.pp("output"));
        Ok(Self {
            heads: config.num_attention_heads,
            query: linear(width, width, attention.pp("self.query"))?,
            key: linear(width, width, attention.pp("self.key"))?,
            value: linear(width, width, attention.pp("self.value"))?,
            out: linear(width, width, attention.pp("output.dense"))?,
            attention_norm: layer_norm(width, epsilon, attention.pp("output.LayerNorm"))?,
            up: linear(width, wide, weights.pp("intermediate.dense"))?,
            down: linear(wide, width, output.pp("dense"))?,
            norm: layer_norm(width, epsilon, output.pp("LayerNorm"))?,
        })
    }

    fn forward(&self, hidden: &Tensor, key_mask: &Tensor, attention: &Attention) -> Result<Tensor> {
        let (batch, length, width) = hidden.dims3()?;
        // [batch, heads, length, width / heads]: the transposed view is read in place.
        let heads = |projection: &Linear| {
            projection.forward(hidden)?.reshape((batch, length, self.heads, width / self.heads))?.transpose(1, 2)
        };
        let mixed = attention.forward(&heads(&self.query)?, &heads(&self.key)?, &heads(&self.value)?, key_mask)?;
        let mixed = mixed.transpose(1, 2)?.reshape((batch, length, width))?;
        let hidden = self.attention_norm.forward(&(hidden + self.out.forward(&mixed)?)?)?;
        let fed = self.down.forward(&Activation::Gelu.forward(&self.up.forward(&hidden)?)?)?;
        self.norm.forward(&(hidden + fed)?)
    }
}

/// The mean of the hidden states that are not padding, of length 1: `[batch, hidden_size]`.
pub fn mean_pool(hidden: &Tensor, key_mask: &Tensor) -> Result<Tensor> {
    let weights = key_mask.to_dtype(hidden.dtype())?.unsqueeze(D::Minus1)?;
    let mean = hidden.broadcast_mul(&weights)?.sum(1)?.broadcast_div(&weights.sum(1)?)?;
    mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)
}
