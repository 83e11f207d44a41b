//! What the layers of a model hand on beside their rows.

use candle_core::{Result, Tensor};

use crate::Error;

/// What the first RWKV-7 layer of a model hands on to the others: its values `[B, N, heads · head_width]`, of the rows that
/// pass through the blocks.
#[derive(Default)]
pub(super) struct FirstValues(Option<Tensor>);

impl FirstValues {
    /// Takes values, unless a layer before has given its own.
    pub fn offer(&mut self, values: &Tensor) {
        self.0.get_or_insert_with(|| values.clone());
    }

    pub fn get(&self) -> Result<&Tensor> {
        let (got, needs) = ("of a layer behind the first", "a model, whose first rwkv7 layer hands its values on");
        let refused =
            || Error::Value { function: "Attention::forward", argument: "place", got: got.into(), needs: needs.into() };
        Ok(self.0.as_ref().ok_or_else(refused)?)
    }
}
