//! Checks of whole calls, whatever their tensors are.

use super::{Linear, Mask, Quadratic, Sequences, ensure_value};
use crate::{Error, Result};

/// Refuses forms with state that are not causal: there the first piece would have to read the last one.
pub(crate) fn ensure_causal(function: &'static str, causal: bool) -> Result<()> {
    ensure_value(causal, function, "causal", causal, "`true` to carry a state")
}

/// Refuses a state that ends inside a chunk.
pub(crate) fn ensure_whole_chunks(function: &'static str, position: usize, chunk: usize) -> Result<()> {
    let got = format!("at position {position}");
    let needs = format!("a position at the end of a chunk of {chunk}");
    ensure_value(position.is_multiple_of(chunk.max(1)), function, "state", got, &needs)
}

/// Refuses packed sequences with a state, which has one position for all.
pub(crate) fn ensure_unpacked(function: &'static str, sequences: Option<&Sequences>) -> Result<()> {
    let needs = "none with a state, which has one position for all";
    ensure_value(sequences.is_none(), function, "sequences", "given", needs)
}

impl Quadratic {
    /// Refuses what the kernels of the quadratic engine do not have, so that their plans would leave it out: packed sequences,
    /// an attention bias, sinks, dropout, prefixes and masks with gaps.
    pub fn ensure_on_gpu(&self) -> Result<()> {
        let (function, shapes) = (self.function, &self.shapes);
        ensure_alone(function, shapes.sequences.as_ref())?;
        let needs = "none on a GPU, whose kernels do not have it";
        ensure_value(shapes.attention_bias.is_none(), function, "attention_bias", "given", needs)?;
        ensure_value(shapes.sinks.is_none(), function, "sinks", "given", needs)?;
        ensure_value(self.dropout.is_none(), function, "dropout", "given", needs)?;
        let is_range = !self.mask.has_gaps() && !matches!(self.mask, Mask::Prefix { .. });
        let needs = "full, causal, a window or blocks on a GPU, whose kernels have no others";
        ensure_value(is_range, function, "mask", format!("{:?}", self.mask), needs)
    }
}

/// Refuses packed sequences where a launch computes one.
pub(crate) fn ensure_alone(function: &'static str, sequences: Option<&Sequences>) -> Result<()> {
    ensure_value(sequences.is_none(), function, "sequences", "given", "none on a GPU: a call for each sequence")
}

/// Refuses branches of mixed chunk attention whose outputs cannot be added.
pub(crate) fn ensure_same_rows(local: &Quadratic, global: &Linear) -> Result<()> {
    let (got, needs) = (global.shapes(), local.shapes());
    let (got, needs) = ([got.batch, got.heads(), got.queries], [needs.batch, needs.heads, needs.queries]);
    if got == needs {
        return Ok(());
    }
    let describe = |[batch, heads, rows]: [usize; 3]| format!("{batch} × {heads} heads × {rows} queries");
    let needs = format!("{} as in the local branch", describe(needs));
    Err(Error::Shape { function: global.function, argument: "q", got: describe(got), needs })
}
