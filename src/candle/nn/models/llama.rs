//! Decoders of LLaMA's skeleton: RMS norm before each part, rotary embedding, grouped heads, a gated feed-forward part.

use candle_core::Result;

use super::fields::Fields;
use super::rotary::rotary;
use crate::activation::Activation;
use crate::nn::{
    AttentionConfig, FeedForwardConfig, LanguageModelConfig, Mechanism, NormConfig, NormKind, NormPlacement,
    QueryKeyNorm,
};

/// What a family takes for fields that are missing.
#[derive(Default)]
struct Usual {
    /// As many as heads of queries without.
    key_heads: Option<usize>,
    /// All heads together are as wide as the model without.
    head_width: Option<usize>,
    tied: bool,
}

/// Touvron et al. 2023, Llama 2 and 3.
pub fn llama(fields: &mut Fields) -> Result<LanguageModelConfig> {
    fields.only("rope_interleaved", &[false])?;
    let mut model = decoder(fields, Usual::default())?;
    model.attention.bias = fields.or("attention_bias", false)?;
    if let Some(feed_forward) = &mut model.feed_forward {
        feed_forward.bias = fields.or("mlp_bias", false)?;
    }
    Ok(model)
}

/// Jiang et al. 2023: every layer has the window.
pub fn mistral(fields: &mut Fields) -> Result<LanguageModelConfig> {
    let mut model = decoder(fields, Usual { key_heads: Some(8), ..Usual::default() })?;
    let window = fields.unless_missing("sliding_window", Some(4096))?;
    model.attention.mechanism = Mechanism::Softmax { window, soft_cap: None };
    Ok(model)
}

/// Qwen team 2024: projections inwards have a bias.
pub fn qwen2(fields: &mut Fields) -> Result<LanguageModelConfig> {
    let mut model = decoder(fields, Usual { key_heads: Some(32), ..Usual::default() })?;
    (model.attention.bias, model.attention.unbiased) = (true, vec!["o_proj".into()]);
    windows(fields, &mut model)?;
    Ok(model)
}

/// Qwen team 2025: norms of the heads of queries and keys.
pub fn qwen3(fields: &mut Fields) -> Result<LanguageModelConfig> {
    let mut model = decoder(fields, Usual { key_heads: Some(32), head_width: Some(128), tied: false })?;
    model.attention.bias = fields.or("attention_bias", false)?;
    model.attention.query_key_norm = Some(QueryKeyNorm { norm: model.norm, joint: false });
    windows(fields, &mut model)?;
    Ok(model)
}

/// Gemma team 2024: norms around the parts with weights from −1 on, soft caps, windows in every other layer, scaled embedding.
pub fn gemma2(fields: &mut Fields) -> Result<LanguageModelConfig> {
    let mut model = decoder(fields, Usual { key_heads: Some(4), head_width: Some(256), tied: true })?;
    model.norm.unit_offset = true;
    model.norms = NormPlacement::Around;
    model.embedding_scale = Some((model.attention.width as f64).sqrt());
    model.logit_soft_cap = fields.unless_missing("final_logit_softcapping", Some(30.0))?;
    if let Some(feed_forward) = &mut model.feed_forward {
        feed_forward.activation = activation(&fields.or("hidden_activation", "gelu_pytorch_tanh".to_string())?)?;
    }
    model.attention.scale = Some(fields.or("query_pre_attn_scalar", 256.0f64)?.powf(-0.5));
    model.attention.bias = fields.or("attention_bias", false)?;
    let window = fields.unless_missing("sliding_window", Some(4096))?;
    let soft_cap = fields.unless_missing("attn_logit_softcapping", Some(50.0))?;
    let usual = |layer: usize| if layer.is_multiple_of(2) { "sliding_attention" } else { "full_attention" }.to_string();
    let kinds = fields.or("layer_types", (0..model.layers).map(usual).collect::<Vec<_>>())?;
    by_layer(&mut model, &kinds, |kind| match kind {
        "sliding_attention" => Some(Mechanism::Softmax { window, soft_cap }),
        "full_attention" => Some(Mechanism::Softmax { window: None, soft_cap }),
        _ => None,
    })?;
    Ok(model)
}

/// What they have in common.
fn decoder(fields: &mut Fields, usual: Usual) -> Result<LanguageModelConfig> {
    let (width, heads): (usize, usize) = (fields.required("hidden_size")?, fields.required("num_attention_heads")?);
    let head_width = fields.unless_missing("head_dim", usual.head_width)?;
    let rotated = head_width.unwrap_or(width / heads.max(1));
    let feed_forward = FeedForwardConfig {
        hidden: fields.required("intermediate_size")?,
        gated: true,
        activation: activation(&fields.or("hidden_act", "silu".to_string())?)?,
        bias: false,
    };
    let attention = AttentionConfig {
        key_heads: fields.unless_missing("num_key_value_heads", usual.key_heads)?,
        head_width,
        rotary: Some(rotary(fields, rotated)?),
        ..AttentionConfig::new(width, heads, Mechanism::default())
    };
    let (vocabulary, layers) = (fields.required("vocab_size")?, fields.required("num_hidden_layers")?);
    Ok(LanguageModelConfig {
        feed_forward: Some(feed_forward),
        norm: NormConfig { kind: NormKind::Rms, epsilon: fields.or("rms_norm_eps", 1e-6)?, ..NormConfig::default() },
        tied: fields.or("tie_word_embeddings", usual.tied)?,
        ..LanguageModelConfig::new(vocabulary, layers, attention)
    })
}

/// The activation of that name.
pub fn activation(name: &str) -> Result<Activation> {
    Ok(match name {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        other => {
            candle_core::bail!("activation `{other}`, supported are silu, gelu, gelu_new, gelu_pytorch_tanh, relu")
        }
    })
}

/// Windows as in Qwen, where `use_sliding_window` says so: by `layer_types`, or in all layers from `max_window_layers` on.
fn windows(fields: &mut Fields, model: &mut LanguageModelConfig) -> Result<()> {
    let (is_used, first) = (fields.or("use_sliding_window", false)?, fields.or("max_window_layers", 28)?);
    let window = fields.unless_missing("sliding_window", Some(4096))?.filter(|_| is_used);
    let usual = |layer: usize| if layer >= first { "sliding_attention" } else { "full_attention" }.to_string();
    let kinds = fields.or("layer_types", (0..model.layers).map(usual).collect::<Vec<_>>())?;
    by_layer(model, &kinds, |kind| match kind {
        "sliding_attention" => Some(Mechanism::Softmax { window, soft_cap: None }),
        "full_attention" => Some(Mechanism::default()),
        _ => None,
    })
}

/// Gives every block the mechanism of its kind, by the shortest pattern that repeats.
fn by_layer(
    model: &mut LanguageModelConfig,
    kinds: &[String],
    mechanism: impl Fn(&str) -> Option<Mechanism>,
) -> Result<()> {
    let of = |kind: &String| match mechanism(kind) {
        Some(mechanism) => Ok(AttentionConfig { mechanism, ..model.attention.clone() }),
        None => candle_core::bail!("field `layer_types` has a `{kind}`, which is not supported here"),
    };
    let layers = kinds.iter().map(of).collect::<Result<Vec<_>>>()?;
    if layers.len() != model.layers || layers.is_empty() {
        candle_core::bail!("kinds of {} layers, needs {}", layers.len(), model.layers);
    }
    let repeats = |period: &usize| layers.iter().enumerate().all(|(at, layer)| *layer == layers[at % period]);
    let period = (1..layers.len()).find(repeats).unwrap_or(layers.len());
    let mut layers = layers.into_iter().take(period);
    if let Some(first) = layers.next() {
        model.attention = first;
    }
    model.pattern = layers.collect();
    Ok(())
}
