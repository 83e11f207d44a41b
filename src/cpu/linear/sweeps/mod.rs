//! The two sweeps of the backward pass over one state head.
//!
//! With W_ij = ⟨φ(q_i), φ(k_j)⟩ and V_ij = ⟨dT_i, v_j⟩ + dn_i inside a tile, both times their decay:
//!
//! ```text
//! forward   dφ(q) = e^G (dT Sᵀ + dn zᵀ) + V φ(k)          S ← e^{G_C} S + (φ(k) e^{G_C−G})ᵀ v
//! backward  dφ(k) = e^{G_C−G} (v Rᵀ + r) + Vᵀ φ(q)        dv = e^{G_C−G} φ(k) R + Wᵀ dT
//!           R ← e^{G_C} R + (φ(q) e^G)ᵀ dT                r ← e^{G_C} r + (φ(q) e^G)ᵀ dn
//! ```

mod keys;
mod queries;

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::{Number, Rows};
use super::super::tile::{Band, Left, Product};
use super::backward::Gradients;
use super::carried::Carried;
use super::d_log;
use super::d_sums::{Statistics, SumsTile};
use super::gradients::Gradient;
use super::state::{Order, State};
use super::tiles::{Direction, KeyTile, QueryTile, StateHead};
use super::{Context, LinearSaved, TILE};

/// What a sweep reads.
pub struct Sweep<'a, T: 'static> {
    pub context: &'a Context<'a, T>,
    pub saved: &'a LinearSaved<'a>,
    pub statistics: &'a Statistics<T>,
    pub at: StateHead,
    /// The positions that gradients are wanted for, whole segments.
    pub span: Range<usize>,
}

impl<T: Number> Sweep<'_, T> {
    fn reader(&self, index: usize) -> usize {
        self.at.head * self.context.readers() + index
    }

    /// Whether this is the last tile of the line, and the state after it has a gradient.
    fn ends_in_gradient(&self, tile: &Range<usize>) -> bool {
        self.context.ends_in_gradient && tile.end == self.context.positions()
    }
}

/// What a head's segments need of others; nothing where the segments are the whole line.
pub struct Around<'a, T> {
    /// Sums entering the first segment, `None` at the line's start; those of the whole line with a full scan.
    pub state: Option<&'a State<T>>,
    /// Gradients entering the last segment from its end, `None` at the line's end; those of the whole line with a full
    /// scan.
    pub d_state: Option<&'a State<T>>,
    /// Sums after the last segment, `None` at the line's end.
    pub end: Option<&'a State<T>>,
}

impl<T> Clone for Around<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Around<'_, T> {}

/// Tiles of one worker.
pub struct Worker<'a, T> {
    /// S as its transpose, E × D', and z.
    before: Carried<T>,
    /// R and r.
    pub after: Carried<T>,
    keys: KeyTile<'a, T>,
    queries: QueryTile<'a, T>,
    sums: SumsTile<'a, T>,
    phi_panels: Buffer<T>,
    v_panels: Buffer<T>,
    d_s_panels: Buffer<T>,
    weights: Buffer<T>,
    /// ⟨φ(q_i), φ(k_j)⟩ without decay; only where the log-decay has a gradient.
    scores: Buffer<T>,
    /// What pairs of the tile give to the gradients of its log-decays.
    crossing: [f64; TILE],
    /// What passes from the tokens before the last tile to the gradient of the last state.
    past: f64,
    d_phi: Buffer<T>,
    d_x: Buffer<T>,
    dv: Buffer<T>,
}

impl<'a, T: Number> Worker<'a, T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (verbs, shapes) = (context.verbs, context.shapes());
        let (features, e) = context.padded();
        let zeros = |len| Buffer::zeros(len);
        Self {
            before: Carried::new(State::zero(context, Order::Transposed)),
            after: Carried::new(State::zero(context, Order::Plain)),
            keys: KeyTile::new(context),
            queries: QueryTile::new(context),
            sums: SumsTile::new(context),
            phi_panels: zeros(verbs.panels_len(TILE, context.features.count)),
            v_panels: zeros(verbs.panels_len(TILE, shapes.value_width)),
            d_s_panels: zeros(verbs.panels_len(context.features.count, shapes.value_width)),
            weights: zeros(TILE * verbs.padded(TILE)),
            scores: zeros(TILE * verbs.padded(TILE)),
            crossing: [0.0; TILE],
            past: 0.0,
            d_phi: zeros(TILE * features),
            d_x: zeros(TILE * verbs.padded(shapes.width)),
            dv: zeros(TILE * e),
        }
    }

    /// Both sweeps over segments of a head. `d_log`, of zeros, receives the gradient of the log-decay per key; S and z have
    /// theirs in [`Self::first_gradient`].
    pub fn head(
        &mut self,
        sweep: &Sweep<'a, T>,
        segments: &[Range<usize>],
        around: Around<'_, T>,
        gradients: &mut Gradients<'_, T>,
        mut d_log: Option<&mut [f64]>,
    ) {
        let (context, is_full) = (sweep.context, sweep.context.is_full());
        self.begin(sweep, segments, around);
        let collects = is_full && around.d_state.is_none();
        let mut ends = Vec::new();
        let mut stabilizer = self.before.own.stabilizer;
        let mut stabilizers = Vec::new();
        self.face(Direction::Forward);
        for (index, segment) in segments.iter().enumerate() {
            if index > 0 && !is_full {
                self.before.next_segment(context);
                if d_log.is_some() {
                    ends.extend(self.before.entering.clone());
                }
            }
            if index > 0 && collects {
                self.after.next_segment(context);
            }
            for tile in context.tiles(segment.clone()) {
                stabilizers.push(stabilizer);
                self.query_tile(sweep, &tile, &mut stabilizer, gradients, d_log.as_deref_mut(), collects);
            }
        }
        if collects {
            let all = self.after.last(context);
            self.after.begin(all);
        }
        self.face(Direction::Backward);
        for (index, segment) in segments.iter().enumerate().rev() {
            if index + 1 < segments.len() && !is_full {
                self.after.next_segment(context);
            }
            let end = ends.get(index).or(around.end.filter(|_| index + 1 == segments.len()));
            let mut passing = match d_log.is_some() && sweep.ends_in_gradient(segment) {
                true => self.past,
                false => d_log::across(context, self.after.entering.as_ref(), end),
            };
            let tiles: Vec<_> = context.tiles(segment.clone()).collect();
            let starts = stabilizers.split_off(stabilizers.len() - tiles.len());
            for (tile, mut stabilizer) in tiles.iter().zip(starts).rev() {
                self.key_gradient(sweep, tile, &mut stabilizer, gradients, d_log.as_deref_mut());
                if let Some(d_log) = d_log.as_deref_mut() {
                    d_log::sum(sweep, tile, &self.crossing, &mut passing, d_log);
                }
            }
        }
    }

    fn begin(&mut self, sweep: &Sweep<'a, T>, segments: &[Range<usize>], around: Around<'_, T>) {
        let (context, is_full) = (sweep.context, sweep.context.is_full());
        match around.state {
            Some(all) if is_full => self.before.begin(all.clone()),
            Some(state) => self.before.enter(state.clone()),
            None => self.before.begin_line(context, sweep.at, Order::Transposed),
        }
        match around.d_state {
            Some(all) if is_full => self.after.begin(all.clone()),
            Some(d_state) => self.after.enter(d_state.clone()),
            None => self.after.begin(State::last_gradient(context, sweep.saved, sweep.at)),
        }
        if is_full && around.state.is_none() {
            for (index, segment) in segments.iter().enumerate() {
                if index > 0 {
                    self.before.next_segment(context);
                }
                self.before.own.absorb_segment(context, sweep.at, segment, &mut self.keys);
            }
            self.before.settle(context);
        }
    }

    /// Gradients of S and z at the start of the segments that were swept.
    pub fn first_gradient(&mut self, sweep: &Sweep<'a, T>) -> State<T> {
        let context = sweep.context;
        let mut gradient = self.after.last(context);
        if context.is_full() && context.problem.map.is_stabilized() {
            let [first, last] =
                [State::initial(context, sweep.at, Order::Plain).stabilizer, self.before.own.stabilizer];
            if first > T::NEG_INFINITY {
                gradient.rescale(context, (first - last).exp());
            }
        }
        gradient
    }

    fn face(&mut self, direction: Direction) {
        self.keys.direction = direction;
        self.queries.direction = direction;
        self.sums.direction = direction;
    }

    fn transpose_values(&mut self, context: &Context<'_, T>, rows: usize) {
        let v = self.keys.v.rows();
        context.verbs.transpose(&mut self.v_panels, v.data, v.row, rows, context.shapes().value_width);
    }

    fn load_reader(&mut self, sweep: &Sweep<'a, T>, reader: usize, tile: &Range<usize>) {
        let (batch, head) = (sweep.at.batch, sweep.reader(reader));
        self.queries.load(sweep.context, batch, head, tile);
        self.sums.load(sweep.context, sweep.saved, sweep.statistics, (batch, head), tile);
    }

    /// V of the loaded reader: gradients of the weights inside the tile.
    fn weight_gradients(&mut self, context: &Context<'_, T>, rows: usize) {
        let (verbs, shapes) = (context.verbs, context.shapes());
        let (_, e) = context.padded();
        let width = verbs.padded(rows);
        let weights = &mut self.weights[..rows * width];
        let size = Product { m: rows, n: width, k: shapes.value_width, accumulate: false, band: Band::Result(1) };
        let right = verbs.panels(&self.v_panels, shapes.value_width);
        verbs.multiply(weights, width, Left::rows(&self.sums.d_sums, e), right, size);
        if context.normalizes() {
            verbs.add_outer(weights, width, &self.sums.d_norms, &[T::ONE; TILE]);
        }
        verbs.causal_weights(weights, width, self.keys.row_decays(), &mut []);
    }
}

/// Turns dφ of a tile into the gradients of its rows from `first` on, which are the `rows` of a head, in place where
/// that can be.
fn put_gradient<T: Number>(
    context: &Context<'_, T>,
    (x, phi): (Rows<'_, T>, &[T]),
    d_phi: &mut [T],
    d_x: &mut [T],
    gradient: &mut Gradient<'_, T>,
    (head, first, rows): (usize, usize, Range<usize>),
) {
    let d = context.verbs.padded(context.shapes().width);
    let d_x = &mut d_x[..phi.len() / context.features.padded * d];
    match gradient.place(head, rows.clone()).filter(|place| place.len() == d_x.len()) {
        Some(place) => context.features.gradient(x, phi, d_phi, place),
        None => {
            context.features.gradient(x, phi, d_phi, d_x);
            gradient.put(head, rows, &d_x[first * d..]);
        }
    }
}
