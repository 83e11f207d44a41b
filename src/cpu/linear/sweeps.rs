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
use super::super::finish::dot;
use super::super::parallel;
use super::super::rows::Number;
use super::super::tile::{Band, Left, Product};
use super::backward::Gradients;
use super::d_sums::{Statistics, SumsTile};
use super::segments::{absorb_segment, head_at};
use super::tiles::{Direction, KeyTile, QueryTile, State, StateHead, first_row};
use super::{Context, LinearSaved, TILE};

/// What a sweep reads.
pub struct Sweep<'a, T: 'static> {
    pub context: &'a Context<'a, T>,
    pub saved: &'a LinearSaved<'a>,
    pub statistics: &'a Statistics<T>,
    pub at: StateHead,
    pub segment: &'a Range<usize>,
}

impl<T: Number> Sweep<'_, T> {
    fn reader(&self, index: usize) -> usize {
        self.at.head * self.context.readers() + index
    }
}

/// Tiles of one worker.
pub struct Worker<T> {
    /// S as its transpose, E × D'.
    s: Buffer<T>,
    z: Buffer<T>,
    /// S at the start of the chunk, for the chunk-exclusive scan.
    chunk_s: Buffer<T>,
    /// R and r.
    d_state: State<T>,
    /// R at the end of the chunk, for the chunk-exclusive scan.
    chunk_d_s: Buffer<T>,
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
            s: zeros(shapes.value_width * features),
            z: zeros(features),
            chunk_s: zeros(0),
            d_state: State::zero(context),
            chunk_d_s: zeros(0),
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

    /// Both sweeps. `entering` holds the sums from before and the gradients from after the segment; without it the
    /// segment is the whole line. `d_log` receives ⟨q, dq⟩ − ⟨k, dk⟩ per key, the key's own query left out of both.
    pub fn head(
        &mut self,
        sweep: &Sweep<'_, T>,
        entering: Option<(&State<T>, &State<T>)>,
        gradients: &mut Gradients<'_, T>,
        mut d_log: Option<&mut [f64]>,
    ) {
        let context = sweep.context;
        let mut state = match entering {
            Some((state, d_state)) => {
                self.d_state.clone_from(d_state);
                state.clone()
            }
            None => {
                self.d_state = State::zero(context);
                State::initial(context, sweep.at)
            }
        };
        if context.is_full() && entering.is_none() {
            absorb_segment(context, sweep.at, sweep.segment, &mut self.keys, &mut state);
        }
        self.take_state(context, &state);
        let mut stabilizer = state.stabilizer;
        let tiles = context.tiles(sweep.segment.clone());
        let mut stabilizers = Vec::with_capacity(tiles.len());
        self.face(Direction::Forward);
        for tile in &tiles {
            stabilizers.push(stabilizer);
            self.begin_tile(sweep, tile, &mut stabilizer);
            for reader in 0..context.readers() {
                self.load_reader(sweep, reader, tile);
                self.query_gradient(sweep, reader, tile, gradients, d_log.as_deref_mut());
                if context.is_full() && entering.is_none() {
                    self.absorb_queries(context, tile.len());
                }
            }
            if !context.is_full() {
                self.absorb_keys(context, tile.len());
            }
        }
        self.face(Direction::Backward);
        for (tile, mut stabilizer) in tiles.iter().zip(stabilizers).rev() {
            self.key_gradient(sweep, tile, &mut stabilizer, gradients, d_log.as_deref_mut());
        }
    }

    fn face(&mut self, direction: Direction) {
        self.keys.direction = direction;
        self.queries.direction = direction;
        self.sums.direction = direction;
    }

    /// Keeps S as its transpose.
    fn take_state(&mut self, context: &Context<'_, T>, state: &State<T>) {
        let (features, e) = context.padded();
        for (f, row) in state.s.chunks_exact(e).enumerate() {
            for (c, &x) in row[..context.shapes().value_width].iter().enumerate() {
                self.s[c * features + f] = x;
            }
        }
        self.z.copy_from_slice(&state.z);
    }

    /// Loads the keys of a tile for the forward sweep.
    fn begin_tile(&mut self, sweep: &Sweep<'_, T>, tile: &Range<usize>, stabilizer: &mut T) {
        let context = sweep.context;
        if context.starts_chunk(tile.start) {
            self.chunk_s.clone_from(&self.s);
        }
        if !context.is_full() {
            self.keys.load(context, sweep.at, tile, stabilizer);
        }
        if context.is_inclusive() {
            let (_, e) = context.padded();
            context.verbs.transpose(&mut self.v_panels, &self.keys.v, e, tile.len(), context.shapes().value_width);
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
        let s = if context.chunk().is_some() { &self.chunk_s } else { &self.s };
        let d_phi = &mut self.d_phi[..rows * features];
        let size = Product { m: rows, n: features, k: shapes.value_width, accumulate: false, band: Band::Full };
        verbs.multiply(d_phi, features, Left::rows(&self.sums.d_sums, e), verbs.rows(s, features), size);
        if context.normalizes() {
            verbs.add_outer(d_phi, features, &self.sums.d_norms, &self.z);
        }
        if self.keys.decays && !context.is_full() {
            verbs.scale_rows(d_phi, features, &self.keys.from_start);
        }
        if let Some(d_log) = d_log {
            self.add_log(sweep, tile, &self.queries.phi, T::ONE, d_log);
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
        let start = context.queries(sweep.segment).start;
        gradients.q.put(head, queries.start - start..queries.end - start, &self.d_x[first * d..]);
    }

    /// S ← e^{G_C} S + (φ(k) e^{G_C−G})ᵀ v, transposed.
    fn absorb_keys(&mut self, context: &Context<'_, T>, rows: usize) {
        let (features, e) = context.padded();
        if self.keys.decays {
            let decay = self.keys.decay();
            self.s.iter_mut().chain(self.z.iter_mut()).for_each(|x| *x = *x * decay);
            self.keys.scale_to_end(context, rows);
        }
        let phi = &self.keys.phi[..rows * features];
        let size =
            Product { m: context.shapes().value_width, n: features, k: rows, accumulate: true, band: Band::Full };
        let right = context.verbs.rows(phi, features);
        context.verbs.multiply(&mut self.s, features, Left::transposed(&self.keys.v, e), right, size);
        if context.normalizes() {
            context.verbs.add_rows(&mut self.z, phi, features, &[T::ONE; TILE]);
        }
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
        context.verbs.multiply(&mut self.d_state.s, e, Left::transposed(phi, features), right, size);
        if context.normalizes() {
            context.verbs.add_rows(&mut self.d_state.z, phi, features, &self.sums.d_norms);
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
        if context.starts_chunk(tile.end) || tile.end == sweep.segment.end {
            self.chunk_d_s.clone_from(&self.d_state.s);
        }
        self.keys.load(context, sweep.at, tile, stabilizer);
        self.gradient_from_later(context, rows);
        if let Some(d_log) = d_log.as_deref_mut() {
            self.add_log(sweep, tile, &self.keys.phi, -T::ONE, d_log);
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
        let d_s = if context.chunk().is_some() { &self.chunk_d_s } else { &self.d_state.s };
        verbs.transpose(&mut self.d_s_panels, d_s, e, count, value_width);
        let size = |n, k| Product { m: rows, n, k, accumulate: false, band: Band::Full };
        let phi = &self.keys.phi[..rows * features];
        verbs.multiply(&mut self.dv, e, Left::rows(phi, features), verbs.rows(d_s, e), size(e, count));
        let right = verbs.panels(&self.d_s_panels, value_width);
        verbs.multiply(&mut self.d_phi, features, Left::rows(&self.keys.v, e), right, size(features, value_width));
        let (d_phi, dv) = (&mut self.d_phi[..rows * features], &mut self.dv[..rows * e]);
        if context.normalizes() {
            verbs.add_outer(d_phi, features, &[T::ONE; TILE], &self.d_state.z);
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
        self.shrink_d_state();
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
                self.add_pairs(sweep, tile, d_log);
            }
            self.absorb_queries(context, rows);
        }
    }

    /// R ← e^{G_C} R and r ← e^{G_C} r.
    fn shrink_d_state(&mut self) {
        if self.keys.decays {
            let decay = self.keys.decay();
            self.d_state.s.iter_mut().chain(self.d_state.z.iter_mut()).for_each(|x| *x = *x * decay);
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
        let (keys, segment) = (context.keys(tile), context.keys(sweep.segment));
        let first = (keys.start + context.first_key()).saturating_sub(tile.start).min(rows);
        let rows = keys.start - segment.start..keys.end - segment.start;
        let of = |heads: usize| sweep.at.head * heads / shapes.state_heads();
        gradients.k.put(of(shapes.key_heads), rows.clone(), &self.d_x[first * d..]);
        gradients.v.put(of(shapes.value_heads), rows, &self.dv[first * e..]);
    }

    /// Adds ±⟨φ, dφ⟩ of the tile's rows to those of their positions that have a key.
    fn add_log(&self, sweep: &Sweep<'_, T>, tile: &Range<usize>, phi: &[T], sign: T, d_log: &mut [f64]) {
        let features = sweep.context.features.padded;
        for (r, d_log) in rows_with_key(sweep, tile, d_log) {
            let row = r * features..(r + 1) * features;
            *d_log += (sign * dot(&phi[row.clone()], &self.d_phi[row])).to_f64();
        }
    }

    /// Adds what pairs i > j inside the tile give to ⟨q_i, dq_i⟩ and −⟨k_j, dk_j⟩: the same numbers to both, so that
    /// what cancels from the sum over positions does so without a rest. Pairs i = j, which do not depend on any decay,
    /// would drown the others where decay is strong.
    fn add_pairs(&self, sweep: &Sweep<'_, T>, tile: &Range<usize>, d_log: &mut [f64]) {
        let (rows, width) = (tile.len(), sweep.context.verbs.padded(tile.len()));
        let mut differences = [0.0; TILE];
        for i in 0..rows {
            let row = i * width..i * width + i;
            for (j, (&score, &d_weight)) in self.scores[row.clone()].iter().zip(&self.weights[row]).enumerate() {
                let product = score.to_f64() * d_weight.to_f64();
                differences[i] += product;
                differences[j] -= product;
            }
        }
        for (r, d_log) in rows_with_key(sweep, tile, d_log) {
            *d_log += differences[r];
        }
    }
}

/// The rows of a tile whose position has a key, with its entry among those of the segment.
fn rows_with_key<'d, T: Number>(
    sweep: &Sweep<'_, T>,
    tile: &Range<usize>,
    d_log: &'d mut [f64],
) -> impl Iterator<Item = (usize, &'d mut f64)> {
    let context = sweep.context;
    let (keys, segment) = (context.keys(tile), context.keys(sweep.segment));
    let first = (keys.start + context.first_key()).saturating_sub(tile.start).min(tile.len());
    (first..).zip(&mut d_log[keys.start - segment.start..keys.end - segment.start])
}

/// The gradients of S and z that enter each segment of each state head from its end, `[head][segment]`; with a full
/// scan, every entry is the sum over all queries.
pub fn entering_gradients<T: Number>(
    context: &Context<'_, T>,
    saved: &LinearSaved<'_>,
    statistics: &Statistics<T>,
    segments: &[Range<usize>],
    states: &[Vec<State<T>>],
) -> Vec<Vec<State<T>>> {
    let mut sums: Vec<Vec<State<T>>> =
        states.iter().map(|_| segments.iter().map(|_| State::zero(context)).collect()).collect();
    let mut tasks = Vec::new();
    for (index, d_states) in sums.iter_mut().enumerate() {
        for (number, (segment, d_state)) in segments.iter().zip(d_states).enumerate() {
            let sweep = Sweep { context, saved, statistics, at: head_at(context, index), segment };
            tasks.push((sweep, states[index][number].stabilizer, d_state));
        }
    }
    parallel::run(
        tasks,
        || Worker::new(context),
        |worker, (sweep, stabilizer, d_state)| {
            worker.collect_queries(&sweep, stabilizer);
            d_state.clone_from(&worker.d_state);
        },
    );
    for (index, d_states) in sums.iter_mut().enumerate() {
        let at = head_at(context, index);
        let mut carried = State::zero(context);
        for (number, d_state) in d_states.iter_mut().enumerate().rev() {
            let keys = context.keys(&segments[number]);
            let given: f64 = keys.map(|key| context.log_decay(at.batch, at.head, key)).sum();
            let [before, after] = [&states[index][number], &states[index][number + 1]].map(|state| state.stabilizer);
            let moved = if before > T::NEG_INFINITY { (before - after).to_f64() } else { 0.0 };
            let mut next = carried.clone();
            next.append(d_state, given + moved);
            *d_state = std::mem::replace(&mut carried, next);
        }
        if context.is_full() {
            d_states.iter_mut().for_each(|d_state| d_state.clone_from(&carried));
        }
    }
    sums
}

impl<T: Number> Worker<T> {
    /// R and r of a segment's own queries at its start.
    fn collect_queries(&mut self, sweep: &Sweep<'_, T>, mut stabilizer: T) {
        let context = sweep.context;
        self.d_state = State::zero(context);
        let tiles = context.tiles(sweep.segment.clone());
        let mut stabilizers = Vec::with_capacity(tiles.len());
        for tile in &tiles {
            stabilizers.push(stabilizer);
            if context.problem.map.is_stabilized() && !context.is_full() {
                self.keys.load(context, sweep.at, tile, &mut stabilizer);
            }
        }
        for (tile, mut stabilizer) in tiles.iter().zip(stabilizers).rev() {
            if context.decays() && !context.is_full() {
                self.keys.load(context, sweep.at, tile, &mut stabilizer);
                self.shrink_d_state();
            }
            for reader in 0..context.readers() {
                self.load_reader(sweep, reader, tile);
                self.absorb_queries(context, tile.len());
            }
        }
    }
}
