//! A language model that has already written some length, ready for its next steps.

use attn_kernels::nn::{LanguageModel, LanguageModelConfig, ModelCache, seeded_weights};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarMap;

/// Tokens that are read at once on the way to a length.
const PIECE: usize = 512;

/// Byte-level, with random weights: time and memory do not depend on them. Beside it how many numbers every step reads of
/// the weights: all but the rows of an embedding of its own.
pub fn model(
    mechanism: &str,
    width: usize,
    layers: usize,
    heads: usize,
    device: &Device,
) -> Result<(LanguageModel, usize)> {
    let config = LanguageModelConfig::named(mechanism, 256, width, layers, heads)?;
    let variables = VarMap::new();
    let model = LanguageModel::new(&config, seeded_weights(&variables, 0, DType::F32, device))?;
    let all: usize = variables.all_vars().iter().map(|variable| variable.elem_count()).sum();
    let embedding = if config.tied { 0 } else { config.vocabulary * width };
    Ok((model, all - embedding))
}

/// A batch of sequences of the same length.
pub struct Decoding<'m> {
    pub model: &'m LanguageModel,
    pub cache: ModelCache,
    /// u32 `[batch, 1]`: what was chosen last.
    pub tokens: Tensor,
}

impl<'m> Decoding<'m> {
    /// One sequence, nothing read.
    pub fn new(model: &'m LanguageModel, device: &Device) -> Result<Self> {
        Ok(Self { model, cache: model.cache()?, tokens: Tensor::zeros((1, 1), DType::U32, device)? })
    }

    /// Reads tokens up to a length.
    pub fn read_to(&mut self, length: usize) -> Result<()> {
        while self.cache.len() < length {
            let count = PIECE.min(length - self.cache.len());
            let tokens: Vec<_> = (0..count as u32).map(|i| i * 7 % 256).collect();
            let tokens = Tensor::from_vec(tokens, (1, count), self.tokens.device())?;
            self.model.next_logits(&tokens, &mut self.cache)?;
        }
        Ok(())
    }

    /// The same sequence `batch` times, in memory of its own and without room to grow.
    pub fn repeated(&self, batch: usize) -> Result<Self> {
        let mut cache = self.cache.clone();
        cache.reorder(&vec![0; batch])?;
        Ok(Self { model: self.model, cache, tokens: self.tokens.repeat((batch, 1))? })
    }

    /// One more token for every sequence, the most likely one; returns when it is in main memory.
    pub fn step(&mut self) -> Result<Vec<u32>> {
        let logits = self.model.next_logits(&self.tokens, &mut self.cache)?;
        self.tokens = logits.argmax_keepdim(D::Minus1)?;
        self.tokens.flatten_all()?.to_vec1()
    }
}
