use candle_core::{Result, Tensor};

use crate::candle::nn::projection::{Products, Projection};

/// Rows from which a gate or a decay is made.
#[derive(Debug, Clone)]
pub(super) enum Logits {
    Plain(Projection),
    /// By way of a narrow row.
    LowRank([Projection; 2]),
}

impl Logits {
    pub fn forward(&self, x: &Tensor, products: Products) -> Result<Tensor> {
        match self {
            Self::Plain(projection) => projection.forward(x, products),
            Self::LowRank([down, up]) => up.forward(&down.forward(x, products)?, products),
        }
    }
}
