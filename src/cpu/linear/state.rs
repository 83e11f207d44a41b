//! The sums that are carried along the positions.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::{HeadRows, Number};
use super::super::tile::{Band, Left, Product};
use super::tiles::{KeyTile, StateHead};
use super::{Context, LinearSaved, StateMut, TILE};
use crate::problem::View;

/// Which way round S lies, for the products that read it.
#[derive(Clone, Copy, PartialEq)]
pub enum Order {
    /// D' × E
    Plain,
    /// E × D'
    Transposed,
}

/// S, z and the stabiliser of a state head.
pub struct State<T> {
    order: Order,
    /// In panels, as the right operand that it is of products.
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
    /// The empty sums.
    pub fn zero(context: &Context<'_, T>, order: Order) -> Self {
        let (features, e) = context.padded();
        let len = match order {
            Order::Plain => context.verbs.panels_len(e, context.features.count),
            Order::Transposed => context.verbs.panels_len(features, context.shapes().value_width),
        };
        let (s, z) = (Buffer::zeros(len), Buffer::zeros(features));
        Self { order, s, z, stabilizer: T::NEG_INFINITY, log_decay: 0.0 }
    }

    /// The state handed in, or the empty sums.
    pub fn initial(context: &Context<'_, T>, at: StateHead, order: Order) -> Self {
        let Some(given) = &context.inputs.state else { return Self::zero(context, order) };
        let mut state = Self::of(context, [&given.s, &given.z], at, order);
        if let Some(stabilizer) = &given.stabilizer {
            let room = std::slice::from_mut(&mut state.stabilizer);
            T::load(stabilizer.data(), first_element(stabilizer, at), room);
        }
        state
    }

    /// The gradient of the state after the last key.
    pub fn last_gradient(context: &Context<'_, T>, saved: &LinearSaved<'_>, at: StateHead) -> Self {
        match &saved.d_state {
            Some(given) => Self::of(context, [&given.s, &given.z], at, Order::Plain),
            None => Self::zero(context, Order::Plain),
        }
    }

    /// S and z as given.
    fn of(context: &Context<'_, T>, [s, z]: [&View<'_>; 2], at: StateHead, order: Order) -> Self {
        let mut state = Self::zero(context, order);
        let (_, e) = context.padded();
        let (count, value_width) = (context.features.count, context.shapes().value_width);
        T::load(z.data(), first_element(z, at), &mut state.z[..count]);
        let mut rows = Buffer::zeros(count * e);
        HeadRows::new(s, at.batch, at.head).load(0..count, &mut rows, e);
        match order {
            Order::Transposed => context.verbs.transpose(&mut state.s, &rows, e, count, value_width),
            Order::Plain => {
                for (f, row) in rows.chunks_exact(e).enumerate() {
                    for (p, part) in row.chunks(context.verbs.panel).enumerate() {
                        let at = panel_index(context, count, (f, p * context.verbs.panel));
                        state.s[at..at + part.len()].copy_from_slice(part);
                    }
                }
            }
        }
        state
    }

    /// Empties the sums.
    pub fn restart(&mut self, stabilizer: T) {
        self.s.fill(T::ZERO);
        self.z.fill(T::ZERO);
        (self.stabilizer, self.log_decay) = (stabilizer, 0.0);
    }

    /// Multiplies the sums.
    pub fn rescale(&mut self, context: &Context<'_, T>, factor: T) {
        for sums in [&mut self.s, &mut self.z] {
            let len = sums.len();
            context.verbs.scale_rows(sums, len, &[factor]);
        }
    }

    /// Lets the sums shrink on their way through a tile.
    pub fn shrink(&mut self, context: &Context<'_, T>, keys: &KeyTile<'_, T>) {
        if keys.decays {
            self.rescale(context, keys.decay());
            self.log_decay += keys.logs.iter().sum::<f64>();
        }
    }

    /// S ← e^{G_C} S + (φ(k) e^{G_C−G})ᵀ v, and z, for the keys of a tile of `rows`, whose features are used up.
    pub fn absorb(&mut self, context: &Context<'_, T>, keys: &mut KeyTile<'_, T>, rows: usize) {
        let (verbs, (features, e)) = (context.verbs, context.padded());
        let (count, value_width) = (context.features.count, context.shapes().value_width);
        self.shrink(context, keys);
        if keys.decays {
            keys.scale_to_end(context, rows);
        }
        let (phi, v) = (&keys.phi[..rows * features], keys.v.rows());
        let size = |m, n| Product { m, n, k: rows, accumulate: true, band: Band::Full };
        match self.order {
            Order::Plain => {
                let left = Left::transposed(phi, features);
                verbs.multiply_panels(&mut self.s, count, left, keys.values(context), size(count, e));
            }
            Order::Transposed => {
                let (left, right) = (Left::transposed(v.data, v.row), verbs.rows(phi, features));
                verbs.multiply_panels(&mut self.s, value_width, left, right, size(value_width, features));
            }
        }
        if context.reads_z() || self.order == Order::Plain {
            verbs.add_rows(&mut self.z, phi, features, &[T::ONE; TILE]);
        }
    }

    /// Adds all keys of a segment.
    pub fn absorb_segment<'a>(
        &mut self,
        context: &Context<'a, T>,
        at: StateHead,
        segment: &Range<usize>,
        keys: &mut KeyTile<'a, T>,
    ) {
        for tile in context.tiles(segment.clone()) {
            keys.load(context, at, &tile, &mut self.stabilizer);
            self.absorb(context, keys, tile.len());
        }
    }

    /// Adds the sums of a later segment, which these meet at its end.
    pub fn append(&mut self, context: &Context<'_, T>, later: &Self) {
        let earlier = self.clone();
        self.sum(context, &earlier, later);
        self.stabilizer = later.stabilizer;
    }

    /// What [`Self::append`] makes of `earlier`.
    pub fn sum(&mut self, context: &Context<'_, T>, earlier: &Self, later: &Self) {
        let decay = T::from_f64(later.log_decay.exp());
        context.verbs.combine(&mut self.s, &earlier.s, decay, &later.s);
        context.verbs.combine(&mut self.z, &earlier.z, decay, &later.z);
    }

    /// Writes a head's state to the outputs.
    pub fn store(&self, context: &Context<'_, T>, into: &mut StateMut<'_>) {
        let (count, value_width) = (context.features.count, context.shapes().value_width);
        let mut row = vec![T::ZERO; value_width];
        for f in 0..count {
            for (p, part) in row.chunks_mut(context.verbs.panel).enumerate() {
                let at = panel_index(context, count, (f, p * context.verbs.panel));
                part.copy_from_slice(&self.s[at..at + part.len()]);
            }
            T::store(&row, &mut into.s, f * value_width);
        }
        T::store(&self.z[..count], &mut into.z, 0);
        if let Some(stabilizer) = &mut into.stabilizer {
            T::store(&[self.stabilizer], stabilizer, 0);
        }
    }
}

/// Where a state head begins.
fn first_element(view: &View<'_>, at: StateHead) -> usize {
    at.batch * view.strides()[0] + at.head * view.strides()[1]
}

/// Where a number of a matrix of `rows` rows lies in its panels.
pub fn panel_index<T: Number>(context: &Context<'_, T>, rows: usize, (row, column): (usize, usize)) -> usize {
    let panel = context.verbs.panel;
    column / panel * rows * panel + row * panel + column % panel
}
