//! A chunk of tokens of a state head: its operands, its values, and its step of the state.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::finish::root_mean_square;
use super::super::rows::{HeadRows, Number};
use super::super::tile::{Band, Left, Product, Right, Verbs};
use super::bonus::Bonus;
use super::fade::{Fade, Reach};
use super::{CHUNK, Context, StateHead};
use crate::problem::RankOne;

/// Rows that read the state: queries of an output head, or b.
pub struct Read<T> {
    pub rows: Buffer<T>,
    pub faded: Buffer<T>,
    pub reach: Reach,
}

/// Rows that are added to the state, with their values.
pub struct Source<T> {
    pub rows: Buffer<T>,
    pub faded: Buffer<T>,
    pub values: Buffer<T>,
}

/// The tokens of a chunk.
pub struct Chunk<T> {
    pub rows: usize,
    /// Of each output head, then b, if there is a rank-one part.
    pub reads: Vec<Read<T>>,
    /// a, if there is a rank-one part, with the values to be solved for; then k, but by the delta rule.
    pub sources: Vec<Source<T>>,
    /// Products of each reading row with each added row, readings first.
    pub products: Vec<Buffer<T>>,
    pub fade: Fade<T>,
    pub bonus: Option<Bonus<T>>,
    /// By the delta rule, where b is the keys.
    pub beta: [T; CHUNK],
    /// What queries, per reading head, and then keys were multiplied with, their norms and τ.
    pub factors: Vec<[T; CHUNK]>,
}

/// Rows of numbers as a right operand.
pub fn right<'a, T: Number>(verbs: &Verbs<T>, data: &'a [T], row: usize) -> Right<'a, T> {
    Right { data, row, panel: verbs.panel }
}

/// How the unknown values of a enter: positive, or by the delta rule taken from the values.
pub fn sign<T: Number>(context: &Context<'_, T>) -> T {
    if matches!(context.shapes().rank_one, RankOne::Free { .. }) { T::ONE } else { -T::ONE }
}

impl<T: Number> Chunk<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (d, e) = context.padded();
        let zeros = Buffer::zeros;
        let rows = context.rows();
        let read = |reach| Read { rows: zeros(rows * d), faded: zeros(rows * d), reach };
        let own = if context.shapes().bonus { Reach::Before } else { Reach::Own };
        let mut reads: Vec<_> = (0..context.readers()).map(|_| read(own)).collect();
        let sources = match context.shapes().rank_one {
            RankOne::None => 1,
            RankOne::Rule { .. } => {
                reads.push(read(Reach::After));
                1
            }
            RankOne::Free { .. } => {
                reads.push(read(Reach::Before));
                2
            }
        };
        let source = |_| Source { rows: zeros(rows * d), faded: zeros(rows * d), values: zeros(rows * e) };
        Self {
            rows: 0,
            products: (0..reads.len() * sources).map(|_| zeros(rows * context.verbs.padded(CHUNK))).collect(),
            reads,
            sources: (0..sources).map(source).collect(),
            fade: Fade::new(context),
            bonus: context.shapes().bonus.then(|| Bonus::new(context)),
            beta: [T::ZERO; CHUNK],
            factors: vec![[T::ONE; CHUNK]; context.readers() + 1],
        }
    }

    /// The reading rows of b, if there is a rank-one part.
    pub fn own_read(&self, context: &Context<'_, T>) -> Option<usize> {
        (self.reads.len() > context.readers()).then_some(context.readers())
    }

    /// Loads the operands of some tokens.
    pub fn load(&mut self, context: &Context<'_, T>, at: StateHead, tokens: Range<usize>, reads_queries: bool) {
        let (d, e) = context.padded();
        let (inputs, readers) = (context.inputs, context.readers());
        self.rows = tokens.len();
        let keep = |token| context.keeps(at.batch, token);
        let load = |rows: HeadRows<'_>, into: &mut [T], width| rows.load_kept(tokens.clone(), into, width, keep);
        self.fade.load(context, at, tokens.clone());
        if reads_queries {
            for reader in 0..readers {
                let head = at.head * readers + reader;
                let head = head * context.shapes().query_heads / context.shapes().heads();
                let rows = &mut self.reads[reader].rows[..tokens.len() * d];
                HeadRows::new(&inputs.q, at.batch, head).load(tokens.clone(), rows, d);
                self.factors[reader] = normalize(context, rows, T::from_f64(context.problem.scale));
            }
        }
        let keys = context.operand(&inputs.k, at);
        let values = context.operand(&inputs.v, at);
        load(values, &mut self.sources.last_mut().expect("at least one").values, e);
        match &inputs.rank_one {
            RankOne::None => {
                let rows = &mut self.sources[0].rows;
                load(keys, rows, d);
                self.factors[readers] = normalize(context, &mut rows[..tokens.len() * d], T::ONE);
            }
            RankOne::Rule { .. } => {
                let rows = &mut self.reads[readers].rows[..tokens.len() * d];
                load(keys, rows, d);
                self.factors[readers] = normalize(context, rows, T::ONE);
                let first = (at.batch * context.shapes().state_heads() + at.head) * context.shapes().tokens;
                for (to, token) in self.beta.iter_mut().zip(tokens.clone()) {
                    *to = if keep(token) { context.beta[first + token] } else { T::ZERO };
                }
                let into = &mut self.sources[0].rows[..tokens.len() * d];
                context.verbs.scaled_rows(into, &self.reads[readers].rows, d, &self.beta);
            }
            RankOne::Free { a, b } => {
                let rows = &mut self.sources[1].rows;
                load(keys, rows, d);
                self.factors[readers] = normalize(context, &mut rows[..tokens.len() * d], T::ONE);
                load(context.operand(a, at), &mut self.sources[0].rows, d);
                load(context.operand(b, at), &mut self.reads[readers].rows, d);
            }
        }
        self.multiply(context, if reads_queries { 0 } else { readers });
        let Some(bonus) = self.bonus.as_mut().filter(|_| reads_queries) else { return };
        let len = tokens.len() * d;
        bonus.load(context, at, &self.sources[0].rows[..len]);
        for (read, products) in self.reads.iter().zip(&mut self.products) {
            bonus.multiply(context, &read.rows[..len], products);
        }
    }

    /// Rows under their decays, and their products, from one of the reading rows on.
    fn multiply(&mut self, context: &Context<'_, T>, first: usize) {
        let len = self.rows * context.padded().0;
        for read in &mut self.reads[first..] {
            self.fade.reading(context, &read.rows[..len], read.reach, &mut read.faded[..len]);
        }
        let reads: Vec<(&[T], Reach)> =
            self.reads[first..].iter().map(|read| (&read.rows[..len], read.reach)).collect();
        let count = self.sources.len();
        for (index, source) in self.sources.iter_mut().enumerate() {
            self.fade.added(context, &source.rows[..len], &mut source.faded[..len]);
            let of_source = self.products.iter_mut().skip(first * count + index).step_by(count);
            let mut products: Vec<&mut [T]> = of_source.map(|products| &mut products[..]).collect();
            self.fade.products(context, &reads, &source.rows[..len], &mut products);
        }
    }

    /// The values of a, from the state that the chunk starts with.
    pub fn solve(&mut self, context: &Context<'_, T>, state: &[T]) {
        let Some(own) = self.own_read(context) else { return };
        let (verbs, (d, e), rows) = (context.verbs, context.padded(), self.rows);
        let (width, sign, count) = (verbs.padded(CHUNK), sign(context), self.sources.len());
        let (unknown, known) = self.sources.split_at_mut(1);
        let values = &mut unknown[0].values[..rows * e];
        // By the delta rule the values lie there already, and all else is taken from them.
        if !known.is_empty() {
            values.fill(T::ZERO);
        }
        let left = &mut self.reads[own].faded[..rows * d];
        verbs.scale_rows(left, d, &[sign; CHUNK]);
        let size = Product { m: rows, n: e, k: context.shapes().width, accumulate: true, band: Band::Full };
        verbs.multiply(values, e, Left::rows(left, d), right(verbs, state, e), size);
        verbs.scale_rows(left, d, &[sign; CHUNK]);
        if let Some(known) = known.first() {
            let products = &self.products[own * count + 1];
            let size = Product { k: rows, band: Band::Left(0), ..size };
            verbs.multiply(values, e, Left::rows(products, width), right(verbs, &known.values, e), size);
        }
        let products = &self.products[own * count];
        for i in 1..rows {
            let (before, row) = values.split_at_mut(i * e);
            let factors = std::array::from_fn::<T, CHUNK, _>(|j| sign * products[i * width + j]);
            verbs.add_rows(&mut row[..e], before, e, &factors[..i]);
        }
    }

    /// The output rows of a reading head.
    pub fn read(&self, context: &Context<'_, T>, reader: usize, state: &[T], out: &mut [T]) {
        let (verbs, (d, e), rows) = (context.verbs, context.padded(), self.rows);
        let size = Product { m: rows, n: e, k: context.shapes().width, accumulate: false, band: Band::Full };
        let left = Left::rows(&self.reads[reader].faded[..rows * d], d);
        verbs.multiply(out, e, left, right(verbs, state, e), size);
        self.add_own(context, reader, out);
    }

    /// Adds what the chunk's own tokens give to the output rows of a reading head.
    pub fn add_own(&self, context: &Context<'_, T>, reader: usize, out: &mut [T]) {
        let (verbs, e, rows) = (context.verbs, context.padded().1, self.rows);
        let (width, count) = (verbs.padded(CHUNK), self.sources.len());
        for (index, source) in self.sources.iter().enumerate() {
            let left = Left::rows(&self.products[reader * count + index][..], width);
            let size = Product { m: rows, n: e, k: rows, accumulate: true, band: Band::Left(1) };
            verbs.multiply(out, e, left, right(verbs, &source.values, e), size);
        }
    }

    /// Moves the state behind the chunk.
    pub fn step(&self, context: &Context<'_, T>, state: &mut [T]) {
        let (verbs, (d, e)) = (context.verbs, context.padded());
        self.fade.shrink(context, state);
        for source in &self.sources {
            let left = Left::transposed(&source.faded[..], d);
            let band = Band::Full;
            let size = Product { m: context.shapes().width, n: e, k: self.rows, accumulate: true, band };
            verbs.multiply(state, e, left, right(verbs, &source.values, e), size);
        }
    }
}

/// Divides rows by their norms, if the problem has it so, and multiplies them with a factor; returns by what they are
/// multiplied.
fn normalize<T: Number>(context: &Context<'_, T>, rows: &mut [T], factor: T) -> [T; CHUNK] {
    let (d, width) = (context.padded().0, context.shapes().width);
    let mut factors = [factor; CHUNK];
    if let Some(epsilon) = context.problem.normalize {
        let root = T::from_f64((width as f64).sqrt());
        for (row, factor) in rows.chunks_exact(d).zip(&mut factors) {
            *factor = *factor / (root_mean_square(&row[..width], epsilon / width as f64) * root);
        }
    } else if factor == T::ONE {
        return factors;
    }
    context.verbs.scale_rows(rows, d, &factors);
    factors
}
