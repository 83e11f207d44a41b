//! GPT-2 (Radford et al. 2019): layer norm before each part, learned positions, matrices stored `[input, output]`.

use candle_core::Result;

use super::fields::Fields;
use super::llama::activation;
use super::names::{Part, Rule};
use crate::nn::{AttentionConfig, FeedForwardConfig, LanguageModelConfig, Mechanism, NormConfig, NormKind};

pub const RULES: &[Rule] = &[
    Rule::new("embed_tokens", "wte"),
    Rule::new("embed_positions", "wpe"),
    Rule::new("layers.*.input_layernorm", "h.*.ln_1"),
    Rule::new("layers.*.self_attn.q_proj", "h.*.attn.c_attn").part(Part::PieceAcross(0, 3)),
    Rule::new("layers.*.self_attn.k_proj", "h.*.attn.c_attn").part(Part::PieceAcross(1, 3)),
    Rule::new("layers.*.self_attn.v_proj", "h.*.attn.c_attn").part(Part::PieceAcross(2, 3)),
    Rule::new("layers.*.self_attn.o_proj", "h.*.attn.c_proj").part(Part::Across),
    Rule::new("layers.*.post_attention_layernorm", "h.*.ln_2"),
    Rule::new("layers.*.mlp.up_proj", "h.*.mlp.c_fc").part(Part::Across),
    Rule::new("layers.*.mlp.down_proj", "h.*.mlp.c_proj").part(Part::Across),
    Rule::new("norm", "ln_f"),
];

pub fn gpt2(fields: &mut Fields) -> Result<LanguageModelConfig> {
    let (width, heads) = (fields.required("n_embd")?, fields.required("n_head")?);
    fields.only("scale_attn_weights", &[true])?;
    fields.only("scale_attn_by_inverse_layer_idx", &[false])?;
    fields.only("add_cross_attention", &[false])?;
    let attention = AttentionConfig { bias: true, ..AttentionConfig::new(width, heads, Mechanism::default()) };
    let feed_forward = FeedForwardConfig {
        hidden: fields.optional("n_inner")?.unwrap_or(width.saturating_mul(4)),
        gated: false,
        activation: activation(&fields.or("activation_function", "gelu_new".to_string())?)?,
        bias: true,
    };
    let (vocabulary, layers) = (fields.required("vocab_size")?, fields.required("n_layer")?);
    let epsilon = fields.or("layer_norm_epsilon", 1e-5)?;
    Ok(LanguageModelConfig {
        feed_forward: Some(feed_forward),
        norm: NormConfig { kind: NormKind::Layer, epsilon, ..NormConfig::default() },
        positions: Some(fields.or("n_positions", 1024)?),
        tied: fields.or("tie_word_embeddings", true)?,
        ..LanguageModelConfig::new(vocabulary, layers, attention)
    })
}
