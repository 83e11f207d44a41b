//! States of recurrent layers.

use candle_core::{Result, Tensor};

/// What a recurrent layer keeps.
#[derive(Debug, Clone)]
pub struct Recurrence {
    /// S `[B, heads, D, E]`, of Mamba `[B, channels, states]`, of S4D and LRU real and imaginary parts `[B, channels, 2 · states]`
    /// and `[B, 2 · states]`; in the dtype of sums.
    pub s: Tensor,
    /// The last rows `[B, taps − 1, channels]` before each short convolution, or shift of tokens.
    pub inputs: Vec<Tensor>,
}

impl Recurrence {
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.s).chain(&self.inputs)
    }

    pub fn bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }

    /// Row `rows[b]` of the batch becomes row b.
    pub fn reordered(&self, rows: &Tensor) -> Result<Self> {
        let select = |tensor: &Tensor| tensor.contiguous()?.index_select(rows, 0);
        Ok(Self { s: select(&self.s)?, inputs: self.inputs.iter().map(select).collect::<Result<_>>()? })
    }

    /// Those of several batches as one.
    pub fn cat(all: &[&Self]) -> Result<Option<Self>> {
        let Some(first) = all.first() else { return Ok(None) };
        let joined = |of: &dyn Fn(&Self) -> Option<&Tensor>| {
            Tensor::cat(&all.iter().filter_map(|one| of(one)).collect::<Vec<_>>(), 0)
        };
        let inputs = (0..first.inputs.len()).map(|index| joined(&|one| one.inputs.get(index)));
        Ok(Some(Self { s: joined(&|one| Some(&one.s))?, inputs: inputs.collect::<Result<_>>()? }))
    }
}
