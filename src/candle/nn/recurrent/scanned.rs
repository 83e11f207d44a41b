//! What layers around a scan have in common.

use std::ops::Range;

use candle_core::{Module, Result, Tensor};

use crate::activation::Activation;
use crate::candle::nn::batch::Batch;
use crate::candle::nn::projection::{Products, Projection};
use crate::problem::{DType, ensure_dtype, ensure_shape};

/// Refuses a key mask that does not fit. One that does is of no further use: removed tokens stand behind the others, which do
/// not see them.
pub(super) fn check_key_mask(x: &Tensor, batch: Batch<'_>) -> Result<()> {
    let Some(key_mask) = batch.key_mask else { return Ok(()) };
    let (function, needs) = ("Attention::forward_masked", [x.dim(0)?, x.dim(1)?].map(Some));
    ensure_shape(function, "key_mask", key_mask, &needs, "[batch, rows]")?;
    Ok(ensure_dtype(function, "key_mask", key_mask, DType::U8, "u8")?)
}

/// `scan` of the tokens of every sequence; of rows `[B, N, …]` if there are none.
pub(super) fn by_sequence(
    rows: &Tensor,
    batch: Batch<'_>,
    scan: impl Fn(Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let Some(sequences) = batch.sequences else { return scan(0..rows.dim(1)?) };
    let all: Vec<Tensor> = sequences.ranges().map(|[tokens, _]| scan(tokens)).collect::<Result<_>>()?;
    if all.is_empty() { Ok(rows.clone()) } else { Tensor::cat(&all, 1) }
}

/// Behind a scan: GELU and a gated linear unit, y = a W ⊙ sigmoid(a W_g) with a = gelu(x).
#[derive(Debug, Clone)]
pub(super) struct GatedOutput {
    pub value: Projection,
    pub gate: Projection,
}

impl GatedOutput {
    pub fn forward(&self, x: &Tensor, products: Products) -> Result<Tensor> {
        let x = Activation::Gelu.forward(x)?;
        Activation::Sigmoid.gate(&self.gate.forward(&x, products)?, &self.value.forward(&x, products)?)
    }
}
