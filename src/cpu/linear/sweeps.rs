//! The two sweeps of the backward pass over one state head.
//!
//! With W_ij = ⟨φ(q_i), φ(k_j)⟩ and V_ij = ⟨dT_i, v_j⟩ + dn_i inside a tile, both times their decay:
//!
//! ```text
//! forward   dφ(q) = e^G (dT Sᵀ + dn zᵀ) + V φ(k)          S ← e^{G_C} S + (φ(k) e^{G_C−G})ᵀ v
//! backward  dφ(k) = e^{G_C−G} (v Rᵀ + r) + Vᵀ φ(q)        dv = e^{G_C−G} φ(k) R + Wᵀ dT
//!           R ← e^{G_C} R + (φ(q) e^G)ᵀ dT                r ← e^{G_C} r + (φ(q) e^G)ᵀ dn
//! ```

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::Number;
use super::super::tile::{Band, Left, Product};
use super::backward::Gradients;
use super::carried::Carried;
use super::d_log;
use super::d_states::{absorb_keys, absorb_segment_transposed};
use super::d_sums::{Statistics, SumsTile};
use super::tiles::{Direction, KeyTile, QueryTile, State, StateHead, first_row};
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
pub struct Worker<T> {
    /// S as its transpose, E × D', and z.
    before: Carried<T>,
    /// R and r.
    pub after: Carried<T>,
    keys: KeyTile<T>,
    queries: QueryTile<T>,
    sums: SumsTile<T>,
    phi_panels: Buffer<T>,
    v_panels: Buffer<T>,
    d_s_panels: Buffer<T>,
    weights: Buffer<T>,
    /// ⟨φ(q_i), φ(k_j)⟩ without decay; only where the log-decay has a gradient.
    scores: Buffer<T>,
    d_phi: Buffer<T>,
    d_x: Buffer<T>,
    dv: Buffer<T>,
}

impl<T: Number> Worker<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (verbs, shapes) = (context.verbs, context.shapes());
        let (features, e) = context.padded();
        let zeros = |len| Buffer::zeros(len);
        Self {
            before: Carried::new(State::zero_transposed(context)),
            after: Carried::new(State::zero(context)),
            keys: KeyTile::new(context),
            queries: QueryTile::new(context),
            sums: SumsTile::new(context),
            phi_panels: zeros(verbs.panels_len(TILE, context.features.count)),
            v_panels: zeros(verbs.panels_len(TILE, shapes.value_width)),
            d_s_panels: zeros(verbs.panels_len(context.features.count, shapes.value_width)),
            weights: zeros(TILE * verbs.padded(TILE)),
            scores: zeros(TILE * verbs.padded(TILE)),
            d_phi: zeros(TILE * features),
            d_x: zeros(TILE * verbs.padded(shapes.width)),
            dv: zeros(TILE * e),
        }
    }

    /// Both sweeps over segments of a head. `d_log`, of zeros, receives the gradient of the log-decay per key.
    pub fn head(
        &mut self,
        sweep: &Sweep<'_, T>,
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
                self.before.next_segment();
                if d_log.is_some() {
                    ends.extend(self.before.entering.clone());
                }
            }
            if index > 0 && collects {
                self.after.next_segment();
            }
            for tile in context.tiles(segment.clone()) {
                stabilizers.push(stabilizer);
                self.query_tile(sweep, &tile, &mut stabilizer, gradients, d_log.as_deref_mut(), collects);
            }
        }
        if collects {
            let all = self.after.last();
            self.after.begin(all);
        }
        self.face(Direction::Backward);
        for (index, segment) in segments.iter().enumerate().rev() {
            if index + 1 < segments.len() && !is_full {
                self.after.next_segment();
            }
            let end = ends.get(index).or(around.end.filter(|_| index + 1 == segments.len()));
            let across = d_log::across(context, self.after.entering.as_ref(), end);
            let tiles = context.tiles(segment.clone());
            let starts = stabilizers.split_off(stabilizers.len() - tiles.len());
            for (tile, mut stabilizer) in tiles.iter().zip(starts).rev() {
                self.key_gradient(sweep, tile, &mut stabilizer, gradients, d_log.as_deref_mut());
            }
            if let Some(d_log) = d_log.as_deref_mut() {
                d_log::sum(sweep, context.keys(segment), across, d_log);
            }
        }
    }

    fn begin(&mut self, sweep: &Sweep<'_, T>, segments: &[Range<usize>], around: Around<'_, T>) {
        let (context, is_full) = (sweep.context, sweep.context.is_full());
        match around.state {
            Some(all) if is_full => self.before.begin(all.clone()),
            Some(state) => self.before.enter(state.clone()),
            None => self.before.begin(State::initial_transposed(context, sweep.at)),
        }
        match around.d_state {
            Some(all) if is_full => self.after.begin(all.clone()),
            Some(d_state) => self.after.enter(d_state.clone()),
            None => self.after.begin(State::zero(context)),
        }
        if is_full && around.state.is_none() {
            for (index, segment) in segments.iter().enumerate() {
                if index > 0 {
                    self.before.next_segment();
                }
                absorb_segment_transposed(context, sweep.at, segment, &mut self.keys, &mut self.before.own);
            }
            let all = self.before.last();
            self.before.begin(all);
        }
    }

    fn face(&mut self, direction: Direction) {
        self.keys.direction = direction;
        self.queries.direction = direction;
        self.sums.direction = direction;
    }

    /// dq of a tile; moves S to the tile's end, or R, which the queries of a full scan `collect`.
    fn query_tile(
        &mut self,
        sweep: &Sweep<'_, T>,
        tile: &Range<usize>,
        stabilizer: &mut T,
        gradients: &mut Gradients<'_, T>,
        mut d_log: Option<&mut [f64]>,
        collects: bool,
    ) {
        let (context, rows) = (sweep.context, tile.len());
        self.before.refresh(context, context.starts_chunk(tile.start));
        if !context.is_full() {
            self.keys.load(context, sweep.at, tile, stabilizer);
        }
        if context.is_inclusive() {
            let (_, e) = context.padded();
            context.verbs.transpose(&mut self.v_panels, &self.keys.v, e, rows, context.shapes().value_width);
        }
        for reader in 0..context.readers() {
            self.load_reader(sweep, reader, tile);
            self.query_gradient(sweep, reader, tile, gradients, d_log.as_deref_mut());
            if collects {
                self.absorb_queries(context, rows);
            }
        }
        if !context.is_full() {
            absorb_keys(context, &mut self.before.own, &mut self.keys, rows);
        }
    }

    fn load_reader(&mut self, sweep: &Sweep<'_, T>, reader: usize, tile: &Range<usize>) {
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
        let logs = self.keys.decays.then_some(&self.keys.logs[..]);
        verbs.causal_weights(weights, width, logs, &mut []);
    }

    /// dφ(q) of the loaded reader, and from it dq.
    fn query_gradient(
        &mut self,
        sweep: &Sweep<'_, T>,
        reader: usize,
        tile: &Range<usize>,
        gradients: &mut Gradients<'_, T>,
        d_log: Option<&mut [f64]>,
    ) {
        let (context, verbs, shapes) = (sweep.context, sweep.context.verbs, sweep.context.shapes());
        let ((features, e), rows) = (context.padded(), tile.len());
        let before = self.before.sums();
        let d_phi = &mut self.d_phi[..rows * features];
        let size = Product { m: rows, n: features, k: shapes.value_width, accumulate: false, band: Band::Full };
        verbs.multiply(d_phi, features, Left::rows(&self.sums.d_sums, e), verbs.rows(&before.s, features), size);
        if context.normalizes() {
            verbs.add_outer(d_phi, features, &self.sums.d_norms, &before.z);
        }
        if self.keys.decays && !context.is_full() {
            verbs.scale_rows(d_phi, features, &self.keys.from_start);
        }
        if let Some(d_log) = d_log {
            d_log::add_rows(sweep, tile, [&self.queries.phi, &self.d_phi], T::ONE, d_log);
        }
        if context.is_inclusive() {
            self.weight_gradients(context, rows);
            let width = verbs.padded(rows);
            let size = Product { m: rows, n: features, k: rows, accumulate: true, band: Band::Left(1) };
            let right = verbs.rows(&self.keys.phi, features);
            verbs.multiply(&mut self.d_phi, features, Left::rows(&self.weights, width), right, size);
        }
        let first = first_row(context, tile);
        let queries = context.queries(tile);
        let d = verbs.padded(shapes.width);
        let (x, phi) = (&self.queries.x[..rows * d], &self.queries.phi[..rows * features]);
        context.features.gradient(x, phi, &mut self.d_phi[..rows * features], &mut self.d_x[..rows * d]);
        let head = sweep.reader(reader) * shapes.query_heads / shapes.heads();
        let start = context.queries(&sweep.span).start;
        gradients.q.put(head, queries.start - start..queries.end - start, &self.d_x[first * d..]);
    }

    /// R += (φ(q) e^G)ᵀ dT and r += (φ(q) e^G)ᵀ dn of the loaded reader, whose features are used up.
    fn absorb_queries(&mut self, context: &Context<'_, T>, rows: usize) {
        let (features, e) = context.padded();
        let phi = &mut self.queries.phi[..rows * features];
        if self.keys.decays && !context.is_full() {
            context.verbs.scale_rows(phi, features, &self.keys.from_start);
        }
        let size = Product { m: context.features.count, n: e, k: rows, accumulate: true, band: Band::Full };
        let right = context.verbs.rows(&self.sums.d_sums, e);
        context.verbs.multiply(&mut self.after.own.s, e, Left::transposed(phi, features), right, size);
        if context.normalizes() {
            context.verbs.add_rows(&mut self.after.own.z, phi, features, &self.sums.d_norms);
        }
    }

    /// dφ(k), dk and dv of a tile; moves R to the tile's start.
    fn key_gradient(
        &mut self,
        sweep: &Sweep<'_, T>,
        tile: &Range<usize>,
        stabilizer: &mut T,
        gradients: &mut Gradients<'_, T>,
        mut d_log: Option<&mut [f64]>,
    ) {
        let (context, rows) = (sweep.context, tile.len());
        let (features, e) = context.padded();
        self.after.refresh(context, context.starts_chunk(tile.end) || tile.end == sweep.span.end);
        self.keys.load(context, sweep.at, tile, stabilizer);
        self.gradient_from_later(context, rows);
        if let Some(d_log) = d_log.as_deref_mut() {
            d_log::add_rows(sweep, tile, [&self.keys.phi, &self.d_phi], -T::ONE, d_log);
        }
        self.move_back(sweep, tile, d_log);
        for r in (0..rows).filter(|&r| !self.keys.present[r]) {
            self.d_phi[r * features..][..features].fill(T::ZERO);
            self.dv[r * e..][..e].fill(T::ZERO);
        }
        self.store_keys(sweep, tile, gradients);
    }

    /// What later tiles give: dv = e^{G_C−G} φ(k) R and dφ(k) = e^{G_C−G} (v Rᵀ + r).
    fn gradient_from_later(&mut self, context: &Context<'_, T>, rows: usize) {
        let (verbs, value_width, count) = (context.verbs, context.shapes().value_width, context.features.count);
        let (features, e) = context.padded();
        let after = self.after.sums();
        verbs.transpose(&mut self.d_s_panels, &after.s, e, count, value_width);
        let size = |n, k| Product { m: rows, n, k, accumulate: false, band: Band::Full };
        let phi = &self.keys.phi[..rows * features];
        verbs.multiply(&mut self.dv, e, Left::rows(phi, features), verbs.rows(&after.s, e), size(e, count));
        let right = verbs.panels(&self.d_s_panels, value_width);
        verbs.multiply(&mut self.d_phi, features, Left::rows(&self.keys.v, e), right, size(features, value_width));
        let (d_phi, dv) = (&mut self.d_phi[..rows * features], &mut self.dv[..rows * e]);
        if context.normalizes() {
            verbs.add_outer(d_phi, features, &[T::ONE; TILE], &after.z);
        }
        if self.keys.decays {
            verbs.scale_rows(d_phi, features, &self.keys.to_end);
            verbs.scale_rows(dv, e, &self.keys.to_end);
        }
    }

    /// Adds what the tile's own queries give to dv and dφ(k), and moves R and r to the tile's start.
    fn move_back(&mut self, sweep: &Sweep<'_, T>, tile: &Range<usize>, mut d_log: Option<&mut [f64]>) {
        let (context, verbs, rows) = (sweep.context, sweep.context.verbs, tile.len());
        if context.is_full() {
            return;
        }
        let (features, e) = context.padded();
        self.after.own.shrink(&self.keys);
        if context.is_inclusive() {
            verbs.transpose(&mut self.phi_panels, &self.keys.phi, features, rows, context.features.count);
            verbs.transpose(&mut self.v_panels, &self.keys.v, e, rows, context.shapes().value_width);
        }
        for reader in 0..context.readers() {
            self.load_reader(sweep, reader, tile);
            if context.is_inclusive() {
                self.gradient_from_tile(context, rows, d_log.is_some());
            }
            if let Some(d_log) = d_log.as_deref_mut() {
                d_log::add_pairs(sweep, tile, &self.scores, &self.weights, d_log);
            }
            self.absorb_queries(context, rows);
        }
    }

    /// dv += Wᵀ dT and dφ(k) += Vᵀ φ(q) of the loaded reader; keeps the scores on demand.
    fn gradient_from_tile(&mut self, context: &Context<'_, T>, rows: usize, keeps_scores: bool) {
        let (verbs, count) = (context.verbs, context.features.count);
        let (features, e) = context.padded();
        let width = verbs.padded(rows);
        let phi = &self.queries.phi[..rows * features];
        let weights = &mut self.weights[..rows * width];
        let size = Product { m: rows, n: width, k: count, accumulate: false, band: Band::Result(1) };
        verbs.multiply(weights, width, Left::rows(phi, features), verbs.panels(&self.phi_panels, count), size);
        if keeps_scores {
            self.scores[..rows * width].copy_from_slice(weights);
        }
        let logs = self.keys.decays.then_some(&self.keys.logs[..]);
        verbs.causal_weights(weights, width, logs, &mut []);
        let down = |n| Product { m: rows, n, k: rows, accumulate: true, band: Band::Transposed(1) };
        let right = verbs.rows(&self.sums.d_sums, e);
        verbs.multiply(&mut self.dv, e, Left::transposed(weights, width), right, down(e));
        self.weight_gradients(context, rows);
        let weights = &self.weights[..rows * width];
        let right = verbs.rows(&self.queries.phi, features);
        verbs.multiply(&mut self.d_phi, features, Left::transposed(weights, width), right, down(features));
    }

    /// Turns dφ(k) into dk and adds the rows that have a key to the gradients.
    fn store_keys(&mut self, sweep: &Sweep<'_, T>, tile: &Range<usize>, gradients: &mut Gradients<'_, T>) {
        let (context, shapes, rows) = (sweep.context, sweep.context.shapes(), tile.len());
        let (d, (features, e)) = (context.verbs.padded(shapes.width), context.padded());
        let (x, phi) = (&self.keys.x[..rows * d], &self.keys.phi[..rows * features]);
        context.features.gradient(x, phi, &mut self.d_phi[..rows * features], &mut self.d_x[..rows * d]);
        let (keys, segment) = (context.keys(tile), context.keys(&sweep.span));
        let first = (keys.start + context.first_key()).saturating_sub(tile.start).min(rows);
        let rows = keys.start - segment.start..keys.end - segment.start;
        let of = |heads: usize| sweep.at.head * heads / shapes.state_heads();
        gradients.k.put(of(shapes.key_heads), rows.clone(), &self.d_x[first * d..]);
        gradients.v.put(of(shapes.value_heads), rows, &self.dv[first * e..]);
    }

    /// R and r of a segment's own queries at its start.
    pub fn collect_queries(&mut self, sweep: &Sweep<'_, T>, mut stabilizer: T) {
        let context = sweep.context;
        self.after.begin(State::zero(context));
        let tiles = context.tiles(sweep.span.clone());
        let mut stabilizers = Vec::with_capacity(tiles.len());
        for tile in &tiles {
            stabilizers.push(stabilizer);
            if context.problem.map.is_stabilized() && !context.is_full() {
                self.keys.load(context, sweep.at, tile, &mut stabilizer);
            }
        }
        let in_order = |n: usize| if context.is_full() { n } else { tiles.len() - 1 - n };
        for n in (0..tiles.len()).map(in_order) {
            let (tile, mut stabilizer) = (&tiles[n], stabilizers[n]);
            if context.decays() && !context.is_full() {
                self.keys.load(context, sweep.at, tile, &mut stabilizer);
                self.after.own.shrink(&self.keys);
            }
            for reader in 0..context.readers() {
                self.load_reader(sweep, reader, tile);
                self.absorb_queries(context, tile.len());
            }
        }
    }
}
