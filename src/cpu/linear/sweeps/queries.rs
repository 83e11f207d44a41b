//! The sweep forward in time: dq, and what queries give to the gradients of the sums.

use std::ops::Range;

use super::super::super::rows::Number;
use super::super::super::tile::{Band, Left, Product};
use super::super::backward::Gradients;
use super::super::state::State;
use super::super::tiles::first_row;
use super::super::{Context, d_log};
use super::{Sweep, Worker, put_gradient};

impl<'a, T: Number> Worker<'a, T> {
    /// dq of a tile; moves S to the tile's end, or R, which the queries of a full scan `collect`.
    pub(super) fn query_tile(
        &mut self,
        sweep: &Sweep<'a, T>,
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
            self.transpose_values(context, rows);
        }
        if d_log.is_some() && sweep.ends_in_gradient(tile) {
            let past = d_log::across(context, Some(self.after.sums()), Some(self.before.sums()));
            self.past = if self.keys.decays { self.keys.decay().to_f64() * past } else { past };
        }
        for reader in 0..context.readers() {
            self.load_reader(sweep, reader, tile);
            self.query_gradient(sweep, reader, tile, gradients, d_log.as_deref_mut());
            if collects {
                self.absorb_queries(context, rows);
            }
        }
        if !context.is_full() {
            self.before.own.absorb(context, &mut self.keys, rows);
        }
    }

    /// dφ(q) of the loaded reader, and from it dq.
    fn query_gradient(
        &mut self,
        sweep: &Sweep<'a, T>,
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
        let right = verbs.panels(&before.s, shapes.value_width);
        verbs.multiply(d_phi, features, Left::rows(&self.sums.d_sums, e), right, size);
        if context.normalizes() {
            verbs.add_outer(d_phi, features, &self.sums.d_norms, &before.z);
        }
        if self.keys.decays && !context.is_full() {
            verbs.scale_rows(d_phi, features, &self.keys.from_start);
        }
        if let Some(d_log) = d_log {
            d_log::add_rows(sweep, tile, [&self.queries.phi, &self.d_phi], 1.0, d_log);
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
        let head = sweep.reader(reader) * shapes.query_heads / shapes.heads();
        let start = context.queries(&sweep.span).start;
        let at = (head, first, queries.start - start..queries.end - start);
        let (x, phi) = (self.queries.x.rows(), &self.queries.phi[..rows * features]);
        let d_phi = &mut self.d_phi[..rows * features];
        put_gradient(context, (x, phi), d_phi, &mut self.d_x, &mut gradients.q, at);
    }

    /// R += (φ(q) e^G)ᵀ dT and r += (φ(q) e^G)ᵀ dn of the loaded reader, whose features are used up.
    pub(super) fn absorb_queries(&mut self, context: &Context<'_, T>, rows: usize) {
        let (features, e) = context.padded();
        let phi = &mut self.queries.phi[..rows * features];
        if self.keys.decays && !context.is_full() {
            context.verbs.scale_rows(phi, features, &self.keys.from_start);
        }
        let size = Product { m: context.features.count, n: e, k: rows, accumulate: true, band: Band::Full };
        let right = context.verbs.rows(&self.sums.d_sums, e);
        let left = Left::transposed(phi, features);
        context.verbs.multiply_panels(&mut self.after.own.s, context.features.count, left, right, size);
        if context.normalizes() {
            context.verbs.add_rows(&mut self.after.own.z, phi, features, &self.sums.d_norms);
        }
    }

    /// R and r of a segment's own queries, and of `later` ones, at its start.
    pub fn collect_queries(&mut self, sweep: &Sweep<'a, T>, mut stabilizer: T, later: State<T>) {
        let context = sweep.context;
        self.after.begin(later);
        let tiles: Vec<_> = context.tiles(sweep.span.clone()).collect();
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
                self.after.own.shrink(context, &self.keys);
            }
            for reader in 0..context.readers() {
                self.load_reader(sweep, reader, tile);
                self.absorb_queries(context, tile.len());
            }
        }
    }
}
