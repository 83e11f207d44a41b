//! The model of a folder, or one of random weights.

use std::path::Path;

use attn_kernels::nn::models::Published;
use attn_kernels::nn::{
    AttentionConfig, FeedForwardConfig, LanguageModel, LanguageModelConfig, Mechanism, seeded_weights,
};
use candle_core::{DType, Device, Result};
use candle_nn::VarMap;

pub struct Model {
    pub language_model: LanguageModel,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// Bytes of all weights, and of those that a token reads.
    pub bytes: usize,
    pub read_bytes: usize,
}

impl Model {
    /// With a mechanism in the place of softmax.
    ///
    /// # Errors
    /// Those of the folder.
    pub fn open(folder: Option<&Path>, swap: Option<&Mechanism>, dtype: DType, device: &Device) -> Result<Self> {
        let (language_model, ends, elements) = match folder {
            Some(folder) => {
                let published = Published::open(folder)?;
                let config = swapped(published.config(), swap);
                let published = published.with_config(config);
                (published.language_model(dtype, device)?, published.end_tokens().to_vec(), published.elements())
            }
            None => {
                let variables = VarMap::new();
                let weights = seeded_weights(&variables, 0, dtype, device);
                let model = LanguageModel::new(&swapped(&random(), swap), weights)?;
                let elements = variables.all_vars().iter().map(|variable| variable.elem_count()).sum();
                (model, Vec::new(), elements)
            }
        };
        // Of an embedding that is not the head a token reads one row.
        let embedding = if language_model.config().tied { 0 } else { language_model.embedding().elem_count() };
        let bytes = |elements: usize| elements * dtype.size_in_bytes();
        Ok(Self { language_model, ends, bytes: bytes(elements), read_bytes: bytes(elements - embedding) })
    }
}

/// A LLaMA of 100 million weights.
fn random() -> LanguageModelConfig {
    let plain = AttentionConfig::new(768, 12, Mechanism::default());
    let attention = AttentionConfig { key_heads: Some(4), rotary: Some(10000.0.into()), ..plain };
    let feed_forward = FeedForwardConfig { hidden: 2560, gated: true, activation: Default::default(), bias: false };
    LanguageModelConfig {
        feed_forward: Some(feed_forward),
        tied: true,
        ..LanguageModelConfig::new(16_000, 12, attention)
    }
}

fn swapped(config: &LanguageModelConfig, swap: Option<&Mechanism>) -> LanguageModelConfig {
    let mut config = config.clone();
    let layers = std::iter::once(&mut config.attention).chain(&mut config.pattern);
    for layer in layers.filter(|layer| matches!(layer.mechanism, Mechanism::Softmax { .. })) {
        match (swap, &mut layer.mechanism) {
            (Some(Mechanism::Softmax { window, .. }), Mechanism::Softmax { window: own, .. }) => *own = *window,
            (Some(other), own) => {
                *own = other.clone();
                // Of scores, which others do not have.
                layer.scale = None;
            }
            (None, _) => {}
        }
    }
    config
}
