//! A tile's keys and queries with their features.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::{HeadRows, Number, Rows};
use super::super::tile::{Decays, Right};
use super::{Context, TILE};
use crate::problem::{Decay, View};

/// A state head of a batch entry.
#[derive(Clone, Copy)]
pub struct StateHead {
    pub batch: usize,
    pub head: usize,
}

/// In which order tiles are visited, so that the next one can be fetched early.
#[derive(Clone, Copy)]
pub enum Direction {
    Forward,
    Backward,
}

impl Direction {
    fn next(self, rows: &Range<usize>) -> Range<usize> {
        match self {
            Self::Forward => rows.end..rows.end + rows.len(),
            Self::Backward => rows.start.saturating_sub(rows.len())..rows.start,
        }
    }
}

/// Rows of an operand at a tile: where they lie if they can be read there, else a copy.
pub struct OperandTile<'a, T> {
    there: Option<Rows<'a, T>>,
    copy: Buffer<T>,
    padded: usize,
}

impl<'a, T: Number> OperandTile<'a, T> {
    pub fn new(padded: usize) -> Self {
        Self { there: None, copy: Buffer::room(TILE * padded), padded }
    }

    pub fn rows(&self) -> Rows<'_, T> {
        self.there.unwrap_or(Rows { data: &self.copy, row: self.padded })
    }

    /// Brings the `rows` of an operand to the places from `first` on of a tile of `len` rows, the others being zeros, and
    /// those that `keep` refuses, if given.
    fn load(
        &mut self,
        source: &HeadRows<'a>,
        rows: &Range<usize>,
        (first, len): (usize, usize),
        keep: Option<&dyn Fn(usize) -> bool>,
    ) {
        let is_whole = rows.len() == len && keep.is_none();
        self.there = if is_whole { source.in_place(rows, self.padded) } else { None };
        if self.there.is_some() {
            return;
        }
        let (padded, last) = (self.padded, first + rows.len());
        self.copy[..first * padded].fill(T::ZERO);
        self.copy[last * padded..len * padded].fill(T::ZERO);
        let into = &mut self.copy[first * padded..last * padded];
        match keep {
            None => source.load(rows.clone(), into, padded),
            Some(keep) => source.load_kept(rows.clone(), into, padded, keep),
        }
    }
}

/// Keys of a tile; rows without a key, or whose key is masked, have zero features and values.
pub struct KeyTile<'a, T> {
    pub x: OperandTile<'a, T>,
    pub phi: Buffer<T>,
    pub v: OperandTile<'a, T>,
    pub present: [bool; TILE],
    pub direction: Direction,
    /// Whether anything shrinks on the way through the tile; what follows is only set if so.
    pub decays: bool,
    /// Log-decay of each row, at most 0; −∞ lets nothing through.
    pub logs: [f64; TILE],
    /// e^g of each row.
    pub factors: [f64; TILE],
    /// e^{G}: what is left at each row of the sums entering the tile.
    pub from_start: [T; TILE],
    /// e^{G_C − G}: what is left of each row at the tile's end.
    pub to_end: [T; TILE],
}

impl<'a, T: Number> KeyTile<'a, T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (features, e) = context.padded();
        Self {
            x: OperandTile::new(context.verbs.padded(context.shapes().width)),
            phi: Buffer::room(TILE * features),
            v: OperandTile::new(e),
            present: [false; TILE],
            direction: Direction::Forward,
            decays: false,
            logs: [0.0; TILE],
            factors: [1.0; TILE],
            from_start: [T::ONE; TILE],
            to_end: [T::ONE; TILE],
        }
    }

    /// Loads the keys at `tile`; `stabilizer` is that of the keys before, and moves on.
    pub fn load(&mut self, context: &Context<'a, T>, at: StateHead, tile: &Range<usize>, stabilizer: &mut T) {
        let shapes = context.shapes();
        let features = context.features.padded;
        let keys = context.keys(tile);
        let first = (keys.start + context.first_key()).saturating_sub(tile.start).min(tile.len());
        let last = first + keys.len();
        let keep = |key: usize| context.keeps(at.batch, key);
        self.present.fill(false);
        for (present, key) in self.present[first..last].iter_mut().zip(keys.clone()) {
            *present = keep(key);
        }
        let rows = tile.len();
        let next = self.direction.next(&keys);
        let load = |view: &View<'a>, heads: usize, into: &mut OperandTile<'a, T>| {
            let source = HeadRows::new(view, at.batch, at.head * heads / shapes.state_heads());
            let keep: Option<&dyn Fn(usize) -> bool> = if context.key_mask.is_some() { Some(&keep) } else { None };
            into.load(&source, &keys, (first, rows), keep);
            source.prefetch(next.clone());
        };
        load(&context.inputs.k, shapes.key_heads, &mut self.x);
        load(&context.inputs.v, shapes.value_heads, &mut self.v);
        let mut logs = [0.0; TILE];
        if shapes.decay != Decay::None {
            for (log, key) in logs[first..last].iter_mut().zip(keys.clone()) {
                *log = context.log_decay(at.batch, at.head, key);
            }
        }
        let phi = &mut self.phi[..rows * features];
        context.features.apply(self.x.rows(), rows, phi, |shifts| {
            for ((shift, &present), log) in shifts.iter_mut().zip(&self.present).zip(&mut logs) {
                let old = *stabilizer;
                if present {
                    *stabilizer = old.larger(*shift);
                }
                if old > T::NEG_INFINITY {
                    *log += old.to_f64() - stabilizer.to_f64();
                }
                *shift = *stabilizer;
            }
        });
        if keys.len() < rows || context.key_mask.is_some() {
            for (row, &present) in phi.chunks_exact_mut(features).zip(&self.present) {
                if !present {
                    row.fill(T::ZERO);
                }
            }
        }
        self.decays = logs.iter().any(|&log| log != 0.0);
        if self.decays {
            self.logs = logs;
            self.decay_rows();
        }
    }

    /// From either end, as what is small beside a strong decay would be lost in a difference over both.
    fn decay_rows(&mut self) {
        for (factor, &log) in self.factors.iter_mut().zip(&self.logs) {
            *factor = if log == 0.0 { 1.0 } else { log.exp() };
        }
        let (mut before, mut after) = ((0.0, 1.0), (0.0, 1.0));
        let decay = |(log, factor): (f64, f64)| T::from_f64(if T::IS_NARROW { factor } else { log.exp() });
        let through = |(log, factor), r: usize| (log + self.logs[r], factor * self.factors[r]);
        for r in 0..TILE {
            before = through(before, r);
            self.from_start[r] = decay(before);
        }
        for r in (0..TILE).rev() {
            self.to_end[r] = decay(after);
            after = through(after, r);
        }
    }

    /// e^{G_C}: what is left at the tile's end of the sums entering it.
    pub fn decay(&self) -> T {
        self.from_start[TILE - 1]
    }

    /// The decays of the rows, if anything shrinks.
    pub fn row_decays(&self) -> Option<Decays<'_>> {
        self.decays.then_some(Decays { logs: &self.logs, factors: &self.factors })
    }

    /// The values as the right operand of a product.
    pub fn values(&self, context: &Context<'_, T>) -> Right<'_, T> {
        let rows = self.v.rows();
        context.verbs.rows(rows.data, rows.row)
    }

    /// Multiplies the features by what is left of them at the tile's end.
    pub fn scale_to_end(&mut self, context: &Context<'_, T>, rows: usize) {
        let features = context.features.padded;
        context.verbs.scale_rows(&mut self.phi[..rows * features], features, &self.to_end);
    }
}

/// Queries of a tile; rows without a query are zeros.
pub struct QueryTile<'a, T> {
    pub x: OperandTile<'a, T>,
    pub phi: Buffer<T>,
    pub direction: Direction,
}

impl<'a, T: Number> QueryTile<'a, T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let x = OperandTile::new(context.verbs.padded(context.shapes().width));
        Self { x, phi: Buffer::room(TILE * context.features.padded), direction: Direction::Forward }
    }

    /// Loads the queries of output head `head` at `tile`.
    pub fn load(&mut self, context: &Context<'a, T>, batch: usize, head: usize, tile: &Range<usize>) {
        let shapes = context.shapes();
        let source = HeadRows::new(&context.inputs.q, batch, head * shapes.query_heads / shapes.heads());
        load_queries(context, &source, tile, &mut self.x, self.direction);
        let phi = &mut self.phi[..tile.len() * context.features.padded];
        context.features.apply(self.x.rows(), tile.len(), phi, |_| ());
    }
}

/// Brings the rows of a query-shaped operand at `tile`, zeros where there is no query.
pub fn load_queries<'a, T: Number>(
    context: &Context<'_, T>,
    source: &HeadRows<'a>,
    tile: &Range<usize>,
    into: &mut OperandTile<'a, T>,
    direction: Direction,
) {
    let queries = context.queries(tile);
    source.prefetch(direction.next(&queries));
    into.load(source, &queries, (first_row(context, tile), tile.len()), None);
}

/// The tile's first row with a query.
pub fn first_row<T: Number>(context: &Context<'_, T>, tile: &Range<usize>) -> usize {
    (context.queries(tile).start + context.first_query()).saturating_sub(tile.start).min(tile.len())
}
