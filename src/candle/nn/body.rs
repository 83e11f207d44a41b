//! What a model is without its head: embedding, blocks and the last norm.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::batch::{Batch, gathered, packed_tokens};
use super::block::{Block, NormPlacement};
use super::first_values::FirstValues;
use super::model_config::LanguageModelConfig;
use super::norm::Norm;
use super::siblings::ensure_absent;
use crate::Sequences;
use crate::problem::ensure_value;

#[derive(Debug, Clone)]
pub(super) struct Body {
    pub embedding: Embedding,
    pub blocks: Vec<Block>,
    /// None where the blocks end with one.
    norm: Option<Norm>,
}

impl Body {
    pub fn new(config: &LanguageModelConfig, weights: &VarBuilder) -> Result<Self> {
        config.check()?;
        let beyond = ["input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"];
        let beyond = beyond.map(|norm| format!("layers.{}.{norm}.weight", config.layers));
        let has_last_norm = config.norms != NormPlacement::After;
        let parts = [
            ("norm.weight", has_last_norm),
            ("embed_norm.weight", !has_last_norm),
            ("embed_positions.weight", config.positions.is_some()),
        ];
        let unused = parts.into_iter().filter(|(_, is_used)| !is_used).map(|(name, _)| name);
        let why = "a model of this configuration has no such part";
        ensure_absent(weights, beyond.iter().map(String::as_str).chain(unused), why)?;
        let embedding = Embedding::new(config, weights)?;
        let layers = weights.pp("layers");
        let blocks = (0..config.layers).map(|layer| Block::new(config, layer, layers.pp(layer)));
        let blocks = blocks.collect::<Result<_>>()?;
        let norm = || Norm::new(config.attention.width, &config.norm, weights.pp("norm"));
        Ok(Self { embedding, blocks, norm: has_last_norm.then(norm).transpose()? })
    }

    /// The last rows of tokens `[B, N]`; keys whose entry of `key_mask` `[B, N]` is 0 are not seen.
    pub fn forward(&self, function: &'static str, tokens: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        self.forward_rows(function, &self.embedding.rows(function, tokens)?, key_mask)
    }

    /// The same of the rows of tokens `[B, N, width]`.
    pub fn forward_rows(&self, function: &'static str, x: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        let through =
            |x: &Tensor, batch: Batch<'_>| self.through(&self.embedding.placed(function, x, &[(0, x.dim(1)?)])?, batch);
        self.finish(&gathered(x, key_mask, through)?)
    }

    /// The last rows of packed sequences, tokens `[1, T]`.
    pub fn forward_sequences(&self, function: &'static str, tokens: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        let x = self.embedding.rows(function, tokens)?;
        let ranges = sequences.aligned(function, packed_tokens(function, "tokens", tokens)?)?;
        let pieces: Vec<_> = ranges.into_iter().map(|range| (0, range.len())).collect();
        let x = self.embedding.placed(function, &x, &pieces)?;
        self.finish(&self.through(&x, Batch { sequences: Some(sequences), key_mask: None })?)
    }

    fn through(&self, x: &Tensor, batch: Batch<'_>) -> Result<Tensor> {
        let mut first = FirstValues::default();
        self.blocks.iter().try_fold(x.clone(), |x, block| block.forward_batch(&x, batch, &mut first))
    }

    /// What the head takes.
    pub fn finish(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(x))
    }
}

/// Rows of tokens: `embed_tokens.weight` `[vocabulary, width]`, with learned positions `embed_positions.weight`
/// `[positions, width]`.
#[derive(Debug, Clone)]
pub(super) struct Embedding {
    pub tokens: Tensor,
    positions: Option<Tensor>,
    /// Of the rows with their positions.
    norm: Option<Norm>,
    scale: Option<f64>,
}

impl Embedding {
    fn new(config: &LanguageModelConfig, weights: &VarBuilder) -> Result<Self> {
        let width = config.attention.width;
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let table = |count: usize, name: &str| weights.pp(name).get_with_hints((count, width), "weight", init);
        let norm = || Norm::new(width, &config.norm, weights.pp("embed_norm"));
        Ok(Self {
            tokens: table(config.vocabulary, "embed_tokens")?,
            positions: config.positions.map(|count| table(count, "embed_positions")).transpose()?,
            norm: (config.norms == NormPlacement::After).then(norm).transpose()?,
            scale: config.embedding_scale,
        })
    }

    /// Tokens `[B, N]` → `[B, N, width]`, without positions.
    pub fn rows(&self, function: &'static str, tokens: &Tensor) -> Result<Tensor> {
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
        let rows = self.tokens.index_select(&tokens.flatten_all()?, 0);
        let rows = rows.map_err(|error| self.beyond(function, tokens, error))?;
        let rows = rows.reshape((batch, count, self.tokens.dim(1)?))?;
        self.scale.map_or(Ok(rows.clone()), |scale| rows * scale)
    }

    /// Rows x `[B, N, width]` of tokens that are so many from a position on, piece by piece.
    pub fn placed(&self, function: &'static str, x: &Tensor, pieces: &[(usize, usize)]) -> Result<Tensor> {
        let Some(table) = &self.positions else { return self.normalized(x) };
        let kept = table.dim(0)?;
        let beyond = pieces.iter().map(|(first, count)| first + count).find(|end| *end > kept);
        let got = format!("{} in a sequence", beyond.unwrap_or(0));
        let needs = format!("at most {kept}, as many as there are learned positions");
        ensure_value(beyond.is_none(), function, "tokens", got, &needs)?;
        let positions: Vec<u32> =
            pieces.iter().flat_map(|&(first, count)| first as u32..(first + count) as u32).collect();
        let positions = table.index_select(&Tensor::new(positions, table.device())?, 0)?;
        self.normalized(&x.broadcast_add(&positions)?)
    }

    fn normalized(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(x))
    }

    /// Words what a device says of a token that is not in the vocabulary; other errors stay.
    fn beyond(&self, function: &'static str, tokens: &Tensor, error: candle_core::Error) -> candle_core::Error {
        let largest = tokens.flatten_all().and_then(|tokens| tokens.max(0)?.to_scalar::<u32>());
        let vocabulary = self.tokens.dims()[0];
        let Some(got) = largest.ok().filter(|token| *token as usize >= vocabulary) else { return error };
        let (got, needs) = (format!("{got} somewhere"), format!("numbers below the vocabulary of {vocabulary}"));
        crate::Error::Value { function, argument: "tokens", got, needs }.into()
    }
}
