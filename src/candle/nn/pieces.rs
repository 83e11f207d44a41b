//! The next tokens of sequences that have a cache each.

use std::borrow::BorrowMut;
use std::ops::Range;

use candle_core::{Result, Tensor};

use super::cache::Cache;
use crate::cpu::parallel::run_calls;
use crate::problem::ensure_value;
use crate::{Result as CoreResult, Sequences};

/// Rows `[B, rows, …]` of a tensor, the next tokens of the B sequences of a cache.
pub(super) struct Piece<C> {
    pub rows: Range<usize>,
    pub cache: C,
}

/// The pieces that `sequences` cut `tokens` rows into.
pub(super) fn cut<'c, C: BorrowMut<T>, T: 'c>(
    function: &'static str,
    tokens: usize,
    sequences: &Sequences,
    caches: &'c mut [C],
) -> CoreResult<Vec<Piece<&'c mut T>>> {
    let ranges = sequences.aligned(function, tokens)?;
    let needs = format!("{}, one for each sequence", ranges.len());
    ensure_value(caches.len() == ranges.len(), function, "caches", caches.len(), &needs)?;
    let pieces = ranges.into_iter().zip(caches);
    Ok(pieces.map(|(rows, cache)| Piece { rows, cache: cache.borrow_mut() }).collect())
}

/// Where the rows of the pieces stand in their sequences: so many from a position on.
pub(super) fn positions(pieces: &[Piece<&mut Cache>]) -> Vec<(usize, usize)> {
    pieces.iter().map(|piece| (piece.cache.position, piece.rows.len())).collect()
}

/// A piece's call: operands, cache, and room for what it gives.
type Call<'p> = (Vec<Tensor>, &'p mut Cache, &'p mut Option<Result<Tensor>>);

/// `attend` of the rows `[B, H, rows, …]` of each piece of the operands, one behind another; on the CPU side by side. What
/// a piece gives does not depend on the others.
pub(super) fn side_by_side(
    operands: &[&Tensor],
    pieces: &mut [Piece<&mut Cache>],
    attend: impl Fn(&[Tensor], &mut Cache) -> Result<Tensor> + Sync,
) -> Result<Tensor> {
    let rows_of = |rows: &Range<usize>| -> Result<Vec<Tensor>> {
        operands.iter().map(|operand| operand.narrow(2, rows.start, rows.len())).collect()
    };
    if let [piece] = pieces {
        return attend(&rows_of(&piece.rows)?, piece.cache);
    }
    let is_cpu = operands.iter().all(|operand| operand.device().is_cpu());
    let mut outs: Vec<Option<Result<Tensor>>> = pieces.iter().map(|_| None).collect();
    let mut calls: Vec<Call<'_>> = Vec::with_capacity(pieces.len());
    for (piece, out) in pieces.iter_mut().zip(&mut outs) {
        calls.push((rows_of(&piece.rows)?, piece.cache, out));
    }
    let run = |(operands, cache, out): Call<'_>| *out = Some(attend(&operands, cache));
    if is_cpu {
        let work = |(operands, cache, _): &Call<'_>| {
            let rows = operands.first().map_or(0, |operand| operand.dims()[2]);
            rows.saturating_mul(cache.position + rows)
        };
        run_calls(calls, work, |isa, call| isa.force(|| run(call)).unwrap_or(()));
    } else {
        calls.into_iter().for_each(run);
    }
    Tensor::cat(&outs.into_iter().flatten().collect::<Result<Vec<_>>>()?, 2)
}
