//! One token: the state is read where it lies by all rows together, and written where it goes.

use super::super::buffer::Buffer;
use super::super::rows::Number;
use super::super::tile::StoredRows;
use super::Context;
use super::chunk::{Chunk, sign};
use super::strips::Room;
use crate::problem::SliceMut;

/// Scratch of a step.
pub struct Token<T> {
    /// The rows that read, under the token's decay.
    rows: Buffer<T>,
    /// What they read.
    read: Buffer<T>,
    decays: Buffer<T>,
}

impl<T: Number> Token<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (d, e) = context.padded();
        let count = if context.shapes().tokens == 1 { context.readers() + 1 } else { 0 };
        Self { rows: Buffer::zeros(count * d), read: Buffer::zeros(count * e), decays: Buffer::zeros(d) }
    }

    /// The outputs of the readers and the state behind a chunk of one token, to the last place those of the chunk's own steps.
    pub fn run(
        &mut self,
        context: &Context<'_, T>,
        chunk: &mut Chunk<T>,
        (state, next): (StoredRows<'_, T>, &mut SliceMut<'_>),
        out: &mut [Room<'_>],
    ) {
        let (verbs, (d, e), width) = (context.verbs, context.padded(), context.shapes().value_width);
        let (readers, own) = (context.readers(), chunk.own_read(context));
        let rows = &mut self.rows[..chunk.reads.len() * d];
        for (row, read) in rows.chunks_exact_mut(d).zip(&chunk.reads) {
            row.copy_from_slice(&read.faded[..d]);
        }
        if own.is_some() {
            verbs.scale_rows(&mut rows[readers * d..], d, &[sign(context)]);
        }
        let read = &mut self.read[..chunk.reads.len() * e];
        read.fill(T::ZERO);
        verbs.add_weighted(read, rows, d, state);
        let (outputs, held) = read.split_at_mut(readers * e);
        if own.is_some() {
            // By the delta rule the values lie there already, and what was held is taken from them.
            if chunk.sources.len() > 1 {
                chunk.sources[0].values.fill(T::ZERO);
            }
            verbs.add_outer(&mut chunk.sources[0].values, e, &[T::ONE], held);
        }
        for (reader, (row, out)) in outputs.chunks_exact_mut(e).zip(out).enumerate() {
            chunk.add_own(context, reader, row);
            out.store(row, e, width, 0);
        }
        let outer: Vec<_> = chunk.sources.iter().map(|source| (&source.faded[..d], &source.values[..e])).collect();
        let decays = chunk.fade.whole(context, &mut self.decays);
        if let Some(next) = T::own_mut(next) {
            verbs.faded_rows(next, width, state, decays, &outer);
        }
    }
}
