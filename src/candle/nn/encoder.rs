use candle_core::{D, DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::block::Block;
use super::body::Body;
use super::model_config::LanguageModelConfig;
use super::projection::{Products, Projection};
use super::siblings::ensure_absent;
use crate::problem::ensure_value;

/// What an [`Encoder`] has beside its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncoderConfig {
    /// Kinds of tokens, to whose rows learned ones are added: 2 in BERT, for the first and the second sentence. Default: none.
    pub token_types: Option<usize>,
    /// Whether there is a layer for the first token. Default: no.
    pub pooler: bool,
}

/// An encoder: tokens `[B, N]` (u32) → rows `[B, N, width]`, every token of a sequence seeing all of them.
///
/// ```text
/// x      = embedding(tokens) + types(token types) + positions
/// x      = block_l(x)                          for every block
/// pooled = tanh(x_0 W + b)                     of the first token, or the mean over the tokens
/// ```
///
/// Weights: those of a [`LanguageModel`](super::LanguageModel) without its head, `embed_types.weight` `[types, width]`,
/// `pooler.weight` `[width, width]` and `pooler.bias`. Gradients: all of them.
///
/// # Example
/// ```
/// use attn_kernels::nn::{AttentionConfig, Encoder, EncoderConfig, LanguageModelConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let variables = VarMap::new();
/// let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let mut config = LanguageModelConfig::named("softmax", 100, 32, 2, 2)?;
/// config.attention = AttentionConfig { causal: false, ..config.attention };
/// let encoder = Encoder::new(&config, &EncoderConfig::default(), weights)?;
/// // Two sentences of 5 and 3 tokens.
/// let tokens = Tensor::new(&[[7u32, 8, 9, 1, 2], [3, 4, 5, 0, 0]], &Device::Cpu)?;
/// let mask = Tensor::new(&[[1u8, 1, 1, 1, 1], [1, 1, 1, 0, 0]], &Device::Cpu)?;
/// let rows = encoder.forward_masked(&tokens, None, Some(&mask))?;
/// assert_eq!(encoder.mean(&rows, Some(&mask))?.dims(), [2, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Encoder {
    config: LanguageModelConfig,
    body: Body,
    types: Option<Tensor>,
    pooler: Option<Projection>,
}

impl Encoder {
    /// Takes the weights of the encoder, or makes them if `weights` come from a `VarMap` that has none.
    ///
    /// # Errors
    /// As [`LanguageModel::new`](super::LanguageModel::new); a causal layer, no token types.
    pub fn new(config: &LanguageModelConfig, parts: &EncoderConfig, weights: VarBuilder) -> Result<Self> {
        let function = "Encoder::new";
        let causal = (0..config.layers).find(|layer| config.attention(*layer).causal);
        let got = format!("true in block {}", causal.unwrap_or(0));
        ensure_value(causal.is_none(), function, "causal", got, "`false` in every block")?;
        ensure_value(parts.token_types != Some(0), function, "token_types", 0, "at least 1")?;
        let used = [("embed_types.weight", parts.token_types.is_some()), ("pooler.weight", parts.pooler)];
        let unused = used.into_iter().filter(|(_, is_used)| !is_used).map(|(name, _)| name);
        ensure_absent(&weights, unused, "an encoder of this configuration has no such part")?;
        let (body, width) = (Body::new(config, &weights)?, config.attention.width);
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let types = |count| weights.pp("embed_types").get_with_hints((count, width), "weight", init);
        let pooler = || Projection::new(width, width, true, weights.pp("pooler"));
        Ok(Self {
            config: config.clone(),
            body,
            types: parts.token_types.map(types).transpose()?,
            pooler: parts.pooler.then(pooler).transpose()?,
        })
    }

    /// The configuration of the blocks.
    pub fn config(&self) -> &LanguageModelConfig {
        &self.config
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.body.blocks
    }

    /// The rows `[B, N, width]` of all tokens; those whose entry of `key_mask` `[B, N]` (u8) is 0 are not seen. `types` `[B, N]`
    /// (u32) say of which kind the tokens are, 0 without.
    ///
    /// # Errors
    /// Tokens or types of another shape or dtype, beyond the vocabulary or the kinds; types for an encoder without; more
    /// tokens than there are learned positions; as [`Attention::forward_masked`](super::Attention::forward_masked).
    pub fn forward_masked(&self, tokens: &Tensor, types: Option<&Tensor>, key_mask: Option<&Tensor>) -> Result<Tensor> {
        let function = "Encoder::forward";
        let rows = self.body.embedding.rows(function, tokens)?;
        let rows = match (&self.types, types) {
            (None, None) => rows,
            (None, Some(_)) => {
                return Err(argument_error(function, "types", "given", "none: this encoder has no kinds"));
            }
            (Some(table), None) => rows.broadcast_add(&table.get(0)?)?,
            (Some(table), Some(types)) => {
                check_types(function, types, tokens, table.dim(0)?)?;
                (&rows + table.index_select(&types.flatten_all()?, 0)?.reshape(rows.shape())?)?
            }
        };
        self.body.forward_rows(function, &rows, key_mask)
    }

    /// The pooled rows `[B, width]`, tanh(x_0 W + b) of the first row of each sequence.
    ///
    /// # Errors
    /// Rows of another shape; an encoder without a pooler.
    pub fn pooled(&self, rows: &Tensor) -> Result<Tensor> {
        let function = "Encoder::pooled";
        let Some(pooler) = &self.pooler else {
            return Err(argument_error(function, "self", "an encoder without pooler", "one with; or `Encoder::mean`"));
        };
        let got = format!("shape {:?}", rows.dims());
        ensure_value(rows.rank() == 3 && rows.dims()[1] > 0, function, "rows", got, "[batch, tokens, width]")?;
        pooler.forward(&rows.narrow(1, 0, 1)?.squeeze(1)?, Products::Joint)?.tanh()
    }

    /// The mean `[B, width]` of the rows of each sequence whose entry of `key_mask` `[B, N]` is not 0; 0 where there is none.
    ///
    /// # Errors
    /// Rows or a mask of another shape.
    pub fn mean(&self, rows: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        let Some(mask) = key_mask else { return rows.mean(1) };
        let mask = mask.ne(0u8)?.to_dtype(rows.dtype())?.unsqueeze(D::Minus1)?;
        rows.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?.maximum(1.0)?)
    }
}

fn argument_error(function: &'static str, argument: &'static str, got: &str, needs: &str) -> candle_core::Error {
    crate::Error::Value { function, argument, got: got.into(), needs: needs.into() }.into()
}

fn check_types(function: &'static str, types: &Tensor, tokens: &Tensor, count: usize) -> crate::Result<()> {
    let argument = "types";
    if types.dims() != tokens.dims() {
        let (got, needs) = (format!("shape {:?}", types.dims()), format!("{:?}, as the tokens", tokens.dims()));
        return Err(crate::Error::Shape { function, argument, got, needs });
    }
    if types.dtype() != DType::U32 {
        let got = types.dtype().as_str().into();
        return Err(crate::Error::DType { function, argument, got, needs: "u32".into() });
    }
    let largest = types.flatten_all().and_then(|types| types.max(0)?.to_scalar::<u32>()).unwrap_or(0);
    let needs = format!("numbers below {count}");
    ensure_value((largest as usize) < count, function, argument, format!("{largest} somewhere"), &needs)
}

impl Module for Encoder {
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.forward_masked(tokens, None, None)
    }
}
