use candle_core::{Module, Result, Tensor};

use super::Operands;
use super::logits::Logits;
use crate::activation::Activation;
use crate::candle::engine::accumulator;
use crate::candle::nn::norm::Norm;
use crate::candle::nn::projection::{Products, Projection};

/// What follows the recurrence: skip, norm, gate and projection.
#[derive(Debug, Clone)]
pub(super) struct Output {
    /// D `[heads]`: D ⊙ v is added.
    pub skip: Option<Tensor>,
    pub norm: Norm,
    /// Whether the norm is of the row of all heads, or of each head.
    pub is_whole: bool,
    pub gate: Option<Gate>,
    pub projection: Projection,
}

#[derive(Debug, Clone)]
pub(super) struct Gate {
    pub logits: Logits,
    pub activation: Activation,
    /// Whether it stands before the norm.
    pub is_first: bool,
}

impl Output {
    /// `out` `[B, heads, N, E]` with the skip.
    pub fn skipped(&self, out: Tensor, operands: &Operands) -> Result<Tensor> {
        let Some(skip) = &self.skip else { return Ok(out) };
        let sums = accumulator(out.dtype());
        let v = operands.unscaled.as_ref().unwrap_or(&operands.v).to_dtype(sums)?;
        let skipped = v.broadcast_mul(&skip.reshape((1, (), 1, 1))?)?;
        (out.to_dtype(sums)? + skipped)?.to_dtype(out.dtype())
    }

    /// The rows of the layer, from its input x `[B, N, width]` and `out` `[B, heads, N, E]`.
    pub fn forward(&self, x: &Tensor, out: &Tensor, products: Products) -> Result<Tensor> {
        let rows = out.transpose(1, 2)?.contiguous()?;
        let rows = if self.is_whole { rows.flatten_from(2)? } else { rows };
        let gated = |rows: &Tensor, gate: &Gate| {
            gate.activation.gate(&gate.logits.forward(x, products)?.reshape(rows.shape())?, rows)
        };
        let rows = match &self.gate {
            None => self.norm.forward(&rows)?,
            Some(gate) if gate.is_first => self.norm.forward(&gated(&rows, gate)?)?,
            Some(gate) => gated(&self.norm.forward(&rows)?, gate)?,
        };
        self.projection.forward(&rows.flatten_from(2)?, products)
    }
}
