//! A chunk on the way back.

use super::super::buffer::Buffer;
use super::super::rows::Number;
use super::super::tile::{Band, Left, Product};
use super::chunk::{Chunk, right, sign};
use super::fade::{FadeGradient, FadedRows};
use super::{CHUNK, Context};

/// Gradients of a chunk's rows and values.
pub struct ChunkGradient<T> {
    /// Of the results of each reading row; what the readers are given comes first.
    pub d_out: Vec<Buffer<T>>,
    pub reads: Vec<Buffer<T>>,
    pub sources: Vec<Buffer<T>>,
    pub values: Vec<Buffer<T>>,
    products: Vec<Buffer<T>>,
    /// Per token or channel.
    pub log_decay: Buffer<T>,
    state: Buffer<T>,
    panels: Buffer<T>,
    value_panels: Buffer<T>,
}

impl<T: Number> ChunkGradient<T> {
    pub fn new(context: &Context<'_, T>, chunk: &Chunk<T>) -> Self {
        let (verbs, (d, e)) = (context.verbs, context.padded());
        let zeros = |len| Buffer::zeros(len);
        let (reads, sources) = (chunk.reads.len(), chunk.sources.len());
        let all = |count, len| (0..count).map(|_| zeros(len)).collect();
        let (width, value_width) = (context.shapes().width, context.shapes().value_width);
        Self {
            d_out: all(reads, CHUNK * e),
            reads: all(reads, CHUNK * d),
            sources: all(sources, CHUNK * d),
            values: all(sources, CHUNK * e),
            products: all(reads * sources, CHUNK * verbs.padded(CHUNK)),
            log_decay: zeros(CHUNK * d),
            state: zeros(width),
            panels: zeros(verbs.panels_len(width, value_width)),
            value_panels: zeros(verbs.panels_len(CHUNK, value_width)),
        }
    }

    /// Gradients of all rows of a chunk that starts with `state`, given those of the results of the readers and, in
    /// `d_state`, of the state behind it, which becomes that of the state before.
    pub fn run(&mut self, context: &Context<'_, T>, chunk: &mut Chunk<T>, state: &[T], d_state: &mut [T]) {
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
        // Of rows under their decays.
        verbs.transpose(&mut self.panels, state, e, shapes.width, shapes.value_width);
        for (d_read, d_out) in self.reads.iter_mut().zip(&self.d_out) {
            let states = verbs.panels(&self.panels, shapes.value_width);
            verbs.multiply(d_read, d, Left::rows(d_out, e), states, size(rows, d, shapes.value_width, Band::Full));
        }
        verbs.transpose(&mut self.panels, d_state, e, shapes.width, shapes.value_width);
        for (source, d_source) in chunk.sources.iter().zip(&mut self.sources) {
            let states = verbs.panels(&self.panels, shapes.value_width);
            let left = Left::rows(&source.values[..], e);
            verbs.multiply(d_source, d, left, states, size(rows, d, shapes.value_width, Band::Full));
        }
        for (index, source) in chunk.sources.iter().enumerate() {
            verbs.transpose(&mut self.value_panels, &source.values, e, rows, shapes.value_width);
            for (read, d_out) in self.d_out.iter().enumerate() {
                let size = size(rows, verbs.padded(rows), shapes.value_width, Band::Result(1));
                let values = verbs.panels(&self.value_panels, shapes.value_width);
                verbs.multiply(&mut self.products[read * count + index], width, Left::rows(d_out, e), values, size);
            }
        }
        // Of the state before.
        verbs.row_pair_products(state, d_state, e, &mut self.state);
        chunk.fade.shrink(context, d_state);
        for (read, d_out) in chunk.reads.iter().zip(&self.d_out) {
            let left = Left::transposed(&read.faded[..], d);
            let size = Product { accumulate: true, ..size(shapes.width, e, rows, Band::Full) };
            verbs.multiply(d_state, e, left, right(verbs, d_out, e), size);
        }
        self.without_decay(context, chunk);
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
            .zip(&mut self.reads)
            .map(|(read, d_read)| {
                let rows = FadedRows { rows: &read.rows[..len], faded: &read.faded[..len] };
                (rows, &mut d_read[..len], read.reach)
            })
            .collect();
        let mut sources: Vec<_> = chunk
            .sources
            .iter()
            .zip(&mut self.sources)
            .map(|(source, d_source)| {
                (FadedRows { rows: &source.rows[..len], faded: &source.faded[..len] }, &mut d_source[..len])
            })
            .collect();
        let products = chunk.products.iter().zip(&mut self.products);
        let mut products: Vec<_> = products.map(|(product, d_product)| (&product[..], &mut d_product[..])).collect();
        let gradient =
            FadeGradient { reads: &mut reads, sources: &mut sources, state: &self.state, products: &mut products };
        chunk.fade.gradient(context, gradient, &mut self.log_decay);
    }
}
