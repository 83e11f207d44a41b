use candle_core::{DType, Module, Result, Tensor};

use super::Sizes;
use super::logits::Logits;
use crate::activation::Activation;
use crate::candle::nn::projection::Products;

/// How fast the state forgets.
#[derive(Debug, Clone)]
pub(super) enum Decay {
    /// Not at all.
    None,
    /// g `[heads]`
    Fixed(Tensor),
    /// g = ln sigmoid(logits)/divisor, for every channel of the keys.
    LogSigmoid { logits: Logits, divisor: f64 },
    /// g = −e^A Δ with Δ = softplus(logits + b).
    Softplus {
        logits: Logits,
        /// b, as wide as the logits.
        bias: Tensor,
        /// A, one number a head of any shape.
        a_log: Tensor,
        /// Whether there is a Δ for every channel of the keys, or for every head.
        by_channel: bool,
        /// Whether values are multiplied by Δ.
        has_steps: bool,
    },
}

/// What a decay is of some tokens.
#[derive(Default)]
pub(super) struct Decayed {
    /// As the operations take it, in the dtype of sums.
    pub log_decay: Option<Tensor>,
    /// Δ `[B, N, heads]`, where values are multiplied by it.
    pub steps: Option<Tensor>,
}

impl Decay {
    /// Whether it depends on the token.
    pub fn is_by_token(&self) -> bool {
        matches!(self, Self::LogSigmoid { .. } | Self::Softplus { .. })
    }

    pub fn is_by_channel(&self) -> bool {
        matches!(self, Self::LogSigmoid { .. } | Self::Softplus { by_channel: true, .. })
    }

    /// The logits of rows x.
    pub fn project(&self, x: &Tensor, products: Products) -> Result<Option<Tensor>> {
        match self {
            Self::None | Self::Fixed(_) => Ok(None),
            Self::LogSigmoid { logits, .. } | Self::Softplus { logits, .. } => logits.forward(x, products).map(Some),
        }
    }

    /// From the logits `[B, N, ·]`.
    pub fn of(&self, logits: Option<&Tensor>, sizes: &Sizes, sums: DType) -> Result<Decayed> {
        // [B, N, heads · width] → [B, heads, N, width]
        let channels = |rows: &Tensor| -> Result<Tensor> {
            let (batch, count, _) = rows.dims3()?;
            rows.reshape((batch, count, (), sizes.key_width))
        };
        match (self, logits) {
            (Self::None, _) => Ok(Decayed::default()),
            (Self::Fixed(log_decay), _) => Ok(Decayed { log_decay: Some(log_decay.clone()), steps: None }),
            (Self::LogSigmoid { divisor, .. }, Some(logits)) => {
                let minus = Activation::Softplus.forward(&logits.to_dtype(sums)?.neg()?)?;
                let log_decay = (channels(&minus)? * (-1.0 / divisor))?.transpose(1, 2)?;
                Ok(Decayed { log_decay: Some(log_decay), steps: None })
            }
            (Self::Softplus { bias, a_log, by_channel, has_steps, .. }, Some(logits)) => {
                let steps = Activation::Softplus.forward(&logits.to_dtype(sums)?.broadcast_add(bias)?)?;
                let rate = a_log.flatten_all()?.exp()?.neg()?;
                let log_decay = match by_channel {
                    true => channels(&steps)?.broadcast_mul(&rate.unsqueeze(1)?)?,
                    false => steps.broadcast_mul(&rate)?,
                };
                let log_decay = Some(log_decay.transpose(1, 2)?);
                Ok(Decayed { log_decay, steps: has_steps.then_some(steps) })
            }
            _ => candle_core::bail!("a decay without its logits"),
        }
    }
}
