//! A chunk on the way back.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::{HeadRows, Number};
use super::super::tile::{Band, Left, Product, Verbs};
use super::chunk::{Chunk, right, sign};
use super::fade::{FadeGradient, FadedRows};
use super::strips::{BLOCK, blocks};
use super::{CHUNK, Context, StateHead};
use crate::problem::View;

/// What is summed over the columns of values. Sums are those of blocks of columns, added in order, so that they are the same
/// whoever computes them.
pub struct RowGradients<T> {
    /// Of the rows that read, and of those that are added, under their decays.
    pub reads: Vec<Buffer<T>>,
    pub sources: Vec<Buffer<T>>,
    /// Of each product of two rows.
    products: Vec<Buffer<T>>,
    /// Σ_e S ⊙ its gradient behind the chunk, per channel.
    state: Buffer<T>,
}

impl<T: Number> RowGradients<T> {
    pub fn new(context: &Context<'_, T>, chunk: &Chunk<T>) -> Self {
        let (d, width) = (context.padded().0, context.verbs.padded(CHUNK));
        let all = |count, len| (0..count).map(|_| Buffer::zeros(len)).collect();
        Self {
            reads: all(chunk.reads.len(), CHUNK * d),
            sources: all(chunk.sources.len(), CHUNK * d),
            products: all(chunk.products.len(), CHUNK * width),
            state: Buffer::zeros(d),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Buffer<T>> {
        self.reads.iter().chain(&self.sources).chain(&self.products).chain([&self.state])
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Buffer<T>> {
        self.reads.iter_mut().chain(&mut self.sources).chain(&mut self.products).chain([&mut self.state])
    }

    pub fn copy_from(&mut self, other: &Self) {
        self.all_mut().zip(other.all()).for_each(|(to, from)| to.copy_from_slice(from));
    }

    pub fn add(&mut self, verbs: &Verbs<T>, other: &Self) {
        self.all_mut().zip(other.all()).for_each(|(to, from)| verbs.add_outer(to, from.len(), &[T::ONE], from));
    }
}

/// Gradients of a chunk's rows and values.
pub struct ChunkGradient<T> {
    /// Of the results of each reading row; what the readers are given comes first.
    pub d_out: Vec<Buffer<T>>,
    pub values: Vec<Buffer<T>>,
    pub rows: RowGradients<T>,
    /// Per token or channel.
    pub log_decay: Buffer<T>,
    panels: Buffer<T>,
    value_panels: Buffer<T>,
}

impl<T: Number> ChunkGradient<T> {
    pub fn new(context: &Context<'_, T>, chunk: &Chunk<T>) -> Self {
        let (verbs, (d, e)) = (context.verbs, context.padded());
        let all = |count, len| (0..count).map(|_| Buffer::zeros(len)).collect();
        let (width, block) = (context.shapes().width, BLOCK.min(context.shapes().value_width));
        Self {
            d_out: all(chunk.reads.len(), CHUNK * e),
            values: all(chunk.sources.len(), CHUNK * e),
            rows: RowGradients::new(context, chunk),
            log_decay: Buffer::zeros(CHUNK * d),
            panels: Buffer::zeros(verbs.panels_len(width, block)),
            value_panels: Buffer::zeros(verbs.panels_len(CHUNK, block)),
        }
    }

    /// The gradients of the results of the readers.
    pub fn load(&mut self, context: &Context<'_, T>, d_out: &View<'_>, at: StateHead, tokens: Range<usize>) {
        let (e, readers) = (context.padded().1, context.readers());
        for (reader, rows) in self.d_out[..readers].iter_mut().enumerate() {
            HeadRows::new(d_out, at.batch, at.head * readers + reader).load(tokens.clone(), rows, e);
        }
    }

    /// Gradients of the values of a chunk that starts with `state`, and what those of rows are made from, given those of the
    /// results of the readers and, in `d_state`, of the state behind it, which becomes that of the state before.
    pub fn columns(&mut self, context: &Context<'_, T>, chunk: &Chunk<T>, state: &[T], d_state: &mut [T]) {
        let rows = chunk.rows;
        let (verbs, (d, e)) = (context.verbs, context.padded());
        let (width, count, readers) = (verbs.padded(CHUNK), chunk.sources.len(), context.readers());
        let shapes = context.shapes();
        let size = |m, n, k, band| Product { m, n, k, accumulate: false, band };
        // Of the values, by the state behind and the readers.
        for (index, (source, d_values)) in chunk.sources.iter().zip(&mut self.values).enumerate() {
            let left = Left::rows(&source.faded[..rows * d], d);
            verbs.multiply(d_values, e, left, right(verbs, d_state, e), size(rows, e, shapes.width, Band::Full));
            for reader in 0..readers {
                let left = Left::transposed(&chunk.products[reader * count + index], width);
                let size = Product { accumulate: true, ..size(rows, e, rows, Band::Transposed(1)) };
                verbs.multiply(d_values, e, left, right(verbs, &self.d_out[reader], e), size);
            }
        }
        if let Some(own) = chunk.own_read(context) {
            self.solve(context, chunk, own);
        }
        for block in blocks(shapes.value_width) {
            self.block(context, chunk, [state, d_state], block);
        }
        // Of the state before.
        chunk.fade.shrink(context, d_state);
        for (read, d_out) in chunk.reads.iter().zip(&self.d_out) {
            let left = Left::transposed(&read.faded[..], d);
            let size = Product { accumulate: true, ..size(shapes.width, e, rows, Band::Full) };
            verbs.multiply(d_state, e, left, right(verbs, d_out, e), size);
        }
    }

    /// Adds what some columns give to the gradients of rows under their decays, of products and of decays.
    fn block(&mut self, context: &Context<'_, T>, chunk: &Chunk<T>, states: [&[T]; 2], columns: Range<usize>) {
        let (verbs, (d, e), rows) = (context.verbs, context.padded(), chunk.rows);
        let (width, count) = (context.shapes().width, chunk.sources.len());
        let (first, k) = (columns.start, columns.len());
        let size = |n, band| Product { m: rows, n, k, accumulate: first > 0, band };
        let [state, d_state] = states.map(|state| &state[first..]);
        let RowGradients { reads, sources, products, state: d_decay } = &mut self.rows;
        let panels = &mut self.panels;
        verbs.transpose(panels, state, e, width, k);
        for (d_read, d_out) in reads.iter_mut().zip(&self.d_out) {
            let left = Left::rows(&d_out[first..], e);
            verbs.multiply(d_read, d, left, verbs.panels(panels, k), size(d, Band::Full));
        }
        verbs.transpose(panels, d_state, e, width, k);
        for (source, d_source) in chunk.sources.iter().zip(sources) {
            let left = Left::rows(&source.values[first..], e);
            verbs.multiply(d_source, d, left, verbs.panels(panels, k), size(d, Band::Full));
        }
        let panels = &mut self.value_panels;
        for (index, source) in chunk.sources.iter().enumerate() {
            verbs.transpose(panels, &source.values[first..], e, rows, k);
            for (read, d_out) in self.d_out.iter().enumerate() {
                let (left, right) = (Left::rows(&d_out[first..], e), verbs.panels(panels, k));
                let d_product = &mut products[read * count + index];
                verbs.multiply(d_product, verbs.padded(CHUNK), left, right, size(verbs.padded(rows), Band::Result(1)));
            }
        }
        if first == 0 {
            d_decay.fill(T::ZERO);
        }
        verbs.add_row_pair_products(&mut d_decay[..width], [state, d_state], e, verbs.padded(k));
    }

    /// Gradients of all rows, of the log-decay and of the bonus, from the sums over the columns.
    pub fn rows(&mut self, context: &Context<'_, T>, chunk: &mut Chunk<T>, at: StateHead) {
        let (len, width, readers) = (chunk.rows * context.padded().0, context.verbs.padded(CHUNK), context.readers());
        let diagonal = |products: &Buffer<T>| std::array::from_fn::<T, CHUNK, _>(|i| products[i * width + i]);
        let own: Vec<_> = self.rows.products[..chunk.bonus.iter().len() * readers].iter().map(diagonal).collect();
        self.without_decay(context, chunk);
        let Some(bonus) = &mut chunk.bonus else { return };
        bonus.clear();
        for ((read, d_read), d_products) in chunk.reads.iter().zip(&mut self.rows.reads).zip(&own) {
            bonus.add_queries(context, &read.rows[..len], &mut d_read[..len], d_products);
        }
        bonus.add_keys(context, at, &chunk.sources[0].rows[..len], &mut self.rows.sources[0][..len]);
    }

    /// The unknown values depend on each other and, through b, on the state: their gradient becomes that of what they are
    /// solved from.
    fn solve(&mut self, context: &Context<'_, T>, chunk: &Chunk<T>, own: usize) {
        let (verbs, (_, e), rows) = (context.verbs, context.padded(), chunk.rows);
        let (width, count, sign) = (verbs.padded(CHUNK), chunk.sources.len(), sign(context));
        let (unknown, known) = self.values.split_at_mut(1);
        let d_values = &mut unknown[0][..rows * e];
        let products = &chunk.products[own * count];
        for i in (1..rows).rev() {
            let (before, row) = d_values.split_at_mut(i * e);
            let factors = std::array::from_fn::<T, CHUNK, _>(|j| sign * products[i * width + j]);
            verbs.add_outer(before, e, &factors[..i], &row[..e]);
        }
        verbs.scaled_rows(&mut self.d_out[own][..rows * e], d_values, e, &[sign; CHUNK]);
        if let Some(known) = known.first_mut() {
            let left = Left::transposed(&chunk.products[own * count + 1], width);
            let size = Product { m: rows, n: e, k: rows, accumulate: true, band: Band::Transposed(0) };
            verbs.multiply(known, e, left, right(verbs, &self.d_out[own], e), size);
        }
    }

    fn without_decay(&mut self, context: &Context<'_, T>, chunk: &mut Chunk<T>) {
        let len = chunk.rows * context.padded().0;
        let mut reads: Vec<_> = chunk
            .reads
            .iter()
            .zip(&mut self.rows.reads)
            .map(|(read, d_read)| {
                let rows = FadedRows { rows: &read.rows[..len], faded: &read.faded[..len] };
                (rows, &mut d_read[..len], read.reach)
            })
            .collect();
        let mut sources: Vec<_> = chunk
            .sources
            .iter()
            .zip(&mut self.rows.sources)
            .map(|(source, d_source)| {
                (FadedRows { rows: &source.rows[..len], faded: &source.faded[..len] }, &mut d_source[..len])
            })
            .collect();
        let products = chunk.products.iter().zip(&mut self.rows.products);
        let mut products: Vec<_> = products.map(|(product, d_product)| (&product[..], &mut d_product[..])).collect();
        let gradient =
            FadeGradient { reads: &mut reads, sources: &mut sources, state: &self.rows.state, products: &mut products };
        chunk.fade.gradient(context, gradient, &mut self.log_decay);
    }
}
