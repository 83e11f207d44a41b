//! A model of the reader's own: blocks of this crate between other parts.

use attn_kernels::nn::{Attention, Block, LanguageModelConfig, Mechanism, Norm, NormConfig};
use candle_core::{Module, Result, Tensor};
use candle_nn::{Embedding, Linear, VarBuilder, embedding, linear_no_bias};

use super::task::KEYS;

/// Every position sees its token and the one before it, as behind the short convolution of recurrent models, so that
/// one block can do the rest: what is measured is how much its attention holds.
pub struct Recaller {
    token: Embedding,
    before: Embedding,
    block: Block,
    norm: Norm,
    head: Linear,
}

/// One head of width `state_width`; without positions, which the task does not need.
pub fn config(mechanism: &str, width: usize, state_width: usize) -> Result<LanguageModelConfig> {
    let mut config = LanguageModelConfig::named(mechanism, 2 * KEYS, width, 1, 1)?;
    config.attention.head_width = Some(state_width);
    config.attention.rotary = None;
    match &mut config.attention.mechanism {
        Mechanism::Performer { features, .. } => *features = 4 * state_width,
        // The slowest head of four in RetNet, γ = 1 − 2⁻⁸: after 192 tokens half of a pair is left.
        Mechanism::Retention { log_decay, .. } => *log_decay = Some(vec![(-1.0f64 / 256.0).ln_1p()]),
        Mechanism::Gla { key_width, .. } => *key_width = Some(state_width),
        Mechanism::Mamba2 { key_width, .. } => *key_width = state_width,
        Mechanism::Mamba { states, .. } | Mechanism::S4d { states } => {
            *states = state_width;
            config.attention.head_width = None;
        }
        // As many numbers as a state of that width.
        Mechanism::Lru { states, .. } => {
            *states = Some((state_width * state_width).div_ceil(2));
            config.attention.head_width = None;
        }
        _ => {}
    }
    Ok(config)
}

impl Recaller {
    pub fn new(config: &LanguageModelConfig, weights: &VarBuilder) -> Result<Self> {
        let width = config.attention.width;
        Ok(Self {
            token: embedding(2 * KEYS, width, weights.pp("token"))?,
            before: embedding(2 * KEYS, width, weights.pp("before"))?,
            block: Block::new(config, 0, weights.pp("block"))?,
            norm: Norm::new(width, &NormConfig::default(), weights.pp("norm"))?,
            head: linear_no_bias(width, KEYS, weights.pp("head"))?,
        })
    }

    /// tokens `[batch, length]` → `[batch, length, width]`
    fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        let before = self.before.forward(tokens)?.narrow(1, 0, tokens.dim(1)? - 1)?.pad_with_zeros(1, 1, 0)?;
        self.token.forward(tokens)? + before
    }

    /// Scores of the values for the last `asked` tokens: `[batch, asked, KEYS]`.
    pub fn forward(&self, tokens: &Tensor, asked: usize) -> Result<Tensor> {
        let hidden = self.block.forward(&self.embed(tokens)?)?;
        let hidden = hidden.narrow(1, tokens.dim(1)? - asked, asked)?.contiguous()?;
        self.head.forward(&self.norm.forward(&hidden)?)
    }

    /// Bytes that the attention holds of one sequence once it has been read.
    pub fn state_bytes(&self, tokens: &Tensor) -> Result<usize> {
        let attention: &Attention = self.block.attention();
        let mut cache = attention.cache()?;
        self.block.forward_cached(&self.embed(&tokens.narrow(0, 0, 1)?)?, &mut cache)?;
        Ok(cache.bytes())
    }
}
