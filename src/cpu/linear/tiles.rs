//! A tile's keys and queries with their features, and the state that is carried along.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::{HeadRows, Number, store_rows};
use super::super::tile::{Band, Left, Product};
use super::{Context, StateMut, TILE};
use crate::problem::View;

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

/// Keys of a tile; rows without a key, or whose key is masked, have zero features and values.
pub struct KeyTile<T> {
    pub x: Buffer<T>,
    pub phi: Buffer<T>,
    pub v: Buffer<T>,
    pub present: [bool; TILE],
    pub direction: Direction,
    /// Whether anything shrinks on the way through the tile; what follows is only set if so.
    pub decays: bool,
    /// Log-decay of each row, at most 0; −∞ lets nothing through.
    pub logs: [f64; TILE],
    /// e^{G}: what is left at each row of the sums entering the tile.
    pub from_start: [T; TILE],
    /// e^{G_C − G}: what is left of each row at the tile's end.
    pub to_end: [T; TILE],
}

impl<T: Number> KeyTile<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (features, e) = context.padded();
        Self {
            x: Buffer::zeros(TILE * context.verbs.padded(context.shapes().width)),
            phi: Buffer::zeros(TILE * features),
            v: Buffer::zeros(TILE * e),
            present: [false; TILE],
            direction: Direction::Forward,
            decays: false,
            logs: [0.0; TILE],
            from_start: [T::ONE; TILE],
            to_end: [T::ONE; TILE],
        }
    }

    /// Loads the keys at `tile`; `stabilizer` is that of the keys before, and moves on.
    pub fn load(&mut self, context: &Context<'_, T>, at: StateHead, tile: &Range<usize>, stabilizer: &mut T) {
        let shapes = context.shapes();
        let (features, e) = context.padded();
        let d = context.verbs.padded(shapes.width);
        let keys = context.keys(tile);
        let first = (keys.start + context.first_key()).saturating_sub(tile.start).min(tile.len());
        let last = first + keys.len();
        let keep = |key: usize| context.keeps(at.batch, key);
        self.present.fill(false);
        for (present, key) in self.present[first..last].iter_mut().zip(keys.clone()) {
            *present = keep(key);
        }
        let of = |heads: usize| at.head * heads / shapes.state_heads();
        let next = self.direction.next(&keys);
        let load = |view: &View<'_>, heads: usize, into: &mut [T], padded: usize| {
            into[..first * padded].fill(T::ZERO);
            into[last * padded..].fill(T::ZERO);
            let (rows, into) = (HeadRows::new(view, at.batch, of(heads)), &mut into[first * padded..]);
            match &context.key_mask {
                None => rows.load(keys.clone(), into, padded),
                Some(_) => rows.load_kept(keys.clone(), into, padded, keep),
            }
            rows.prefetch(next.clone());
        };
        let rows = tile.len();
        load(&context.inputs.k, shapes.key_heads, &mut self.x[..rows * d], d);
        load(&context.inputs.v, shapes.value_heads, &mut self.v[..rows * e], e);
        let mut logs = [0.0; TILE];
        for (log, key) in logs[first..last].iter_mut().zip(keys.clone()) {
            *log = context.log_decay(at.batch, at.head, key);
        }
        let phi = &mut self.phi[..rows * features];
        context.features.apply(&self.x[..rows * d], phi, |shifts| {
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
        for (row, &present) in phi.chunks_exact_mut(features).zip(&self.present) {
            if !present {
                row.fill(T::ZERO);
            }
        }
        self.decays = logs.iter().any(|&log| log != 0.0);
        if self.decays {
            self.logs = logs;
            self.decay_rows();
        }
    }

    /// Sums from either end, as differences of one sum would lose what is small beside a large term.
    fn decay_rows(&mut self) {
        let (mut before, mut after) = (0.0, 0.0);
        for r in 0..TILE {
            before += self.logs[r];
            self.from_start[r] = T::from_f64(f64::exp(before));
        }
        for r in (0..TILE).rev() {
            self.to_end[r] = T::from_f64(f64::exp(after));
            after += self.logs[r];
        }
    }

    /// e^{G_C}: what is left at the tile's end of the sums entering it.
    pub fn decay(&self) -> T {
        self.from_start[TILE - 1]
    }

    /// Multiplies the features by what is left of them at the tile's end.
    pub fn scale_to_end(&mut self, context: &Context<'_, T>, rows: usize) {
        let features = context.features.padded;
        context.verbs.scale_rows(&mut self.phi[..rows * features], features, &self.to_end);
    }
}

/// Queries of a tile; rows without a query are zeros.
pub struct QueryTile<T> {
    pub x: Buffer<T>,
    pub phi: Buffer<T>,
    pub direction: Direction,
}

impl<T: Number> QueryTile<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let d = context.verbs.padded(context.shapes().width);
        let phi = Buffer::zeros(TILE * context.features.padded);
        Self { x: Buffer::zeros(TILE * d), phi, direction: Direction::Forward }
    }

    /// Loads the queries of output head `head` at `tile`.
    pub fn load(&mut self, context: &Context<'_, T>, batch: usize, head: usize, tile: &Range<usize>) {
        let shapes = context.shapes();
        let d = context.verbs.padded(shapes.width);
        let rows = tile.len();
        let source = HeadRows::new(&context.inputs.q, batch, head * shapes.query_heads / shapes.heads());
        load_queries(context, &source, tile, &mut self.x[..rows * d], d, self.direction);
        context.features.apply(&self.x[..rows * d], &mut self.phi[..rows * context.features.padded], |_| ());
    }
}

/// Loads the rows of a query-shaped operand at `tile`, zeros where there is no query.
pub fn load_queries<T: Number>(
    context: &Context<'_, T>,
    source: &HeadRows<'_>,
    tile: &Range<usize>,
    into: &mut [T],
    padded: usize,
    direction: Direction,
) {
    let queries = context.queries(tile);
    let first = first_row(context, tile);
    into[..first * padded].fill(T::ZERO);
    into[(first + queries.len()) * padded..].fill(T::ZERO);
    source.prefetch(direction.next(&queries));
    source.load(queries, &mut into[first * padded..], padded);
}

/// The tile's first row with a query.
pub fn first_row<T: Number>(context: &Context<'_, T>, tile: &Range<usize>) -> usize {
    (context.queries(tile).start + context.first_query()).saturating_sub(tile.start).min(tile.len())
}

/// S, z and the stabiliser of a state head.
pub struct State<T> {
    pub s: Buffer<T>,
    pub z: Buffer<T>,
    pub stabilizer: T,
    /// Log-decay of everything that came since these sums were begun, the stabiliser's share included.
    pub log_decay: f64,
}

impl<T: Number> Clone for State<T> {
    fn clone(&self) -> Self {
        Self { s: self.s.clone(), z: self.z.clone(), ..*self }
    }

    fn clone_from(&mut self, source: &Self) {
        self.s.clone_from(&source.s);
        self.z.clone_from(&source.z);
        (self.stabilizer, self.log_decay) = (source.stabilizer, source.log_decay);
    }
}

impl<T: Number> State<T> {
    fn with_len(len: usize, features: usize) -> Self {
        Self { s: Buffer::zeros(len), z: Buffer::zeros(features), stabilizer: T::NEG_INFINITY, log_decay: 0.0 }
    }

    /// The empty sums.
    pub fn zero(context: &Context<'_, T>) -> Self {
        let (features, e) = context.padded();
        Self::with_len(context.features.count * e, features)
    }

    /// The empty sums with S as its transpose, E × D'.
    pub fn zero_transposed(context: &Context<'_, T>) -> Self {
        let (features, _) = context.padded();
        Self::with_len(context.shapes().value_width * features, features)
    }

    /// The state handed in, or the empty sums.
    pub fn initial(context: &Context<'_, T>, at: StateHead) -> Self {
        let mut state = Self::zero(context);
        if let Some(given) = &context.inputs.state {
            let (_, e) = context.padded();
            let count = context.features.count;
            HeadRows::new(&given.s, at.batch, at.head).load(0..count, &mut state.s, e);
            let element = |view: &View<'_>| at.batch * view.strides()[0] + at.head * view.strides()[1];
            T::load(given.z.data(), element(&given.z), &mut state.z[..count]);
            if let Some(stabilizer) = &given.stabilizer {
                let into = std::slice::from_mut(&mut state.stabilizer);
                T::load(stabilizer.data(), element(stabilizer), into);
            }
        }
        state
    }

    /// [`Self::initial`] with S as its transpose.
    pub fn initial_transposed(context: &Context<'_, T>, at: StateHead) -> Self {
        let (features, e) = context.padded();
        let (given, mut state) = (Self::initial(context, at), Self::zero_transposed(context));
        for (f, row) in given.s.chunks_exact(e).enumerate() {
            for (c, &x) in row[..context.shapes().value_width].iter().enumerate() {
                state.s[c * features + f] = x;
            }
        }
        state.z.copy_from_slice(&given.z);
        state.stabilizer = given.stabilizer;
        state
    }

    /// Empties the sums.
    pub fn restart(&mut self, stabilizer: T) {
        self.s.fill(T::ZERO);
        self.z.fill(T::ZERO);
        (self.stabilizer, self.log_decay) = (stabilizer, 0.0);
    }

    /// Lets the sums shrink on their way through a tile.
    pub fn shrink(&mut self, keys: &KeyTile<T>) {
        if keys.decays {
            let decay = keys.decay();
            self.s.iter_mut().chain(self.z.iter_mut()).for_each(|x| *x = *x * decay);
            self.log_decay += keys.logs.iter().sum::<f64>();
        }
    }

    /// Adds the keys of a tile of `rows`, scaling their features by their decay on the way.
    pub fn absorb(&mut self, context: &Context<'_, T>, keys: &mut KeyTile<T>, rows: usize) {
        let (features, e) = context.padded();
        self.shrink(keys);
        if keys.decays {
            keys.scale_to_end(context, rows);
        }
        let phi = &keys.phi[..rows * features];
        let size = Product { m: context.features.count, n: e, k: rows, accumulate: true, band: Band::Full };
        context.verbs.multiply(&mut self.s, e, Left::transposed(phi, features), context.verbs.rows(&keys.v, e), size);
        context.verbs.add_rows(&mut self.z, phi, features, &[T::ONE; TILE]);
    }

    /// Adds the sums of a later segment, which these meet at its end.
    pub fn append(&mut self, later: &Self) {
        let decay = T::from_f64(later.log_decay.exp());
        let add = |x: &mut T, y: &T| *x = *x * decay + *y;
        self.s.iter_mut().zip(later.s.iter()).for_each(|(x, y)| add(x, y));
        self.z.iter_mut().zip(later.z.iter()).for_each(|(x, y)| add(x, y));
        self.stabilizer = later.stabilizer;
    }

    /// What [`Self::append`] makes of `earlier`.
    pub fn sum(&mut self, earlier: &Self, later: &Self) {
        let decay = T::from_f64(later.log_decay.exp());
        let add = |sum: &mut T, x: &T, y: &T| *sum = *x * decay + *y;
        let s = self.s.iter_mut().zip(earlier.s.iter()).zip(later.s.iter());
        s.for_each(|((sum, x), y)| add(sum, x, y));
        let z = self.z.iter_mut().zip(earlier.z.iter()).zip(later.z.iter());
        z.for_each(|((sum, x), y)| add(sum, x, y));
    }

    /// Writes a head's state to the outputs.
    pub fn store(&self, context: &Context<'_, T>, into: &mut StateMut<'_>) {
        let (_, e) = context.padded();
        store_rows(&self.s, e, context.shapes().value_width, &mut into.s, 0);
        T::store(&self.z[..context.features.count], &mut into.z, 0);
        if let Some(stabilizer) = &mut into.stabilizer {
            T::store(&[self.stabilizer], stabilizer, 0);
        }
    }
}
