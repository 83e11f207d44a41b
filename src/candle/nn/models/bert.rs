//! BERT (Devlin et al. 2018): an encoder with norms after the residual connections.

use candle_core::Result;

use super::fields::Fields;
use super::llama::activation;
use super::names::Rule;
use crate::nn::{
    AttentionConfig, EncoderConfig, FeedForwardConfig, LanguageModelConfig, Mechanism, NormConfig, NormKind,
    NormPlacement,
};

pub const RULES: &[Rule] = &[
    Rule::new("embed_tokens", "embeddings.word_embeddings"),
    Rule::new("embed_positions", "embeddings.position_embeddings"),
    Rule::new("embed_types", "embeddings.token_type_embeddings"),
    Rule::new("embed_norm", "embeddings.LayerNorm"),
    Rule::new("layers.*.self_attn.q_proj", "encoder.layer.*.attention.self.query"),
    Rule::new("layers.*.self_attn.k_proj", "encoder.layer.*.attention.self.key"),
    Rule::new("layers.*.self_attn.v_proj", "encoder.layer.*.attention.self.value"),
    Rule::new("layers.*.self_attn.o_proj", "encoder.layer.*.attention.output.dense"),
    Rule::new("layers.*.post_attention_layernorm", "encoder.layer.*.attention.output.LayerNorm"),
    Rule::new("layers.*.mlp.up_proj", "encoder.layer.*.intermediate.dense"),
    Rule::new("layers.*.mlp.down_proj", "encoder.layer.*.output.dense"),
    Rule::new("layers.*.post_feedforward_layernorm", "encoder.layer.*.output.LayerNorm"),
    Rule::new("pooler", "pooler.dense"),
];

pub fn bert(fields: &mut Fields) -> Result<(LanguageModelConfig, EncoderConfig)> {
    let (width, heads) = (fields.required("hidden_size")?, fields.required("num_attention_heads")?);
    fields.only("position_embedding_type", &["absolute".to_string()])?;
    for decoder in ["is_decoder", "add_cross_attention", "is_encoder_decoder"] {
        fields.only(decoder, &[false])?;
    }
    let plain = AttentionConfig::new(width, heads, Mechanism::default());
    let attention = AttentionConfig { causal: false, bias: true, ..plain };
    let feed_forward = FeedForwardConfig {
        hidden: fields.required("intermediate_size")?,
        gated: false,
        activation: activation(&fields.or("hidden_act", "gelu".to_string())?)?,
        bias: true,
    };
    let (vocabulary, layers) = (fields.required("vocab_size")?, fields.required("num_hidden_layers")?);
    let epsilon = fields.or("layer_norm_eps", 1e-12)?;
    let blocks = LanguageModelConfig {
        feed_forward: Some(feed_forward),
        norm: NormConfig { kind: NormKind::Layer, epsilon, ..NormConfig::default() },
        norms: NormPlacement::After,
        positions: Some(fields.required("max_position_embeddings")?),
        ..LanguageModelConfig::new(vocabulary, layers, attention)
    };
    Ok((blocks, EncoderConfig { token_types: Some(fields.required("type_vocab_size")?), ..EncoderConfig::default() }))
}
