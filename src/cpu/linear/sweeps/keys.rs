//! The sweep backward in time: dk and dv, and the gradients of the sums.

use std::ops::Range;

use super::super::super::rows::Number;
use super::super::super::tile::{Band, Left, Product};
use super::super::backward::Gradients;
use super::super::{Context, TILE, d_log};
use super::{Sweep, Worker, put_gradient};

impl<'a, T: Number> Worker<'a, T> {
    /// dφ(k), dk and dv of a tile; moves R to the tile's start.
    pub(super) fn key_gradient(
        &mut self,
        sweep: &Sweep<'a, T>,
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
        let mut last = [0.0; TILE];
        match d_log.as_deref_mut() {
            Some(_) if sweep.ends_in_gradient(tile) => {
                d_log::add_last(context, rows, [&self.keys.phi, &self.d_phi], &mut last);
            }
            Some(d_log) => d_log::add_rows(sweep, tile, [&self.keys.phi, &self.d_phi], -1.0, d_log),
            None => {}
        }
        self.move_back(sweep, tile, d_log.is_some());
        self.crossing.iter_mut().zip(last).for_each(|(crossing, last)| *crossing += last);
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
        verbs.between_panels(&mut self.d_s_panels, &after.s, count, value_width);
        let size = |n, k| Product { m: rows, n, k, accumulate: false, band: Band::Full };
        let phi = &self.keys.phi[..rows * features];
        verbs.multiply(&mut self.dv, e, Left::rows(phi, features), verbs.panels(&after.s, count), size(e, count));
        let (v, right) = (self.keys.v.rows(), verbs.panels(&self.d_s_panels, value_width));
        verbs.multiply(&mut self.d_phi, features, Left::rows(v.data, v.row), right, size(features, value_width));
        let (d_phi, dv) = (&mut self.d_phi[..rows * features], &mut self.dv[..rows * e]);
        if context.reads_z() {
            verbs.add_outer(d_phi, features, &[T::ONE; TILE], &after.z);
        }
        if self.keys.decays {
            verbs.scale_rows(d_phi, features, &self.keys.to_end);
            verbs.scale_rows(dv, e, &self.keys.to_end);
        }
    }

    /// Adds what the tile's own queries give to dv and dφ(k), and moves R and r to the tile's start.
    fn move_back(&mut self, sweep: &Sweep<'a, T>, tile: &Range<usize>, has_d_log: bool) {
        let (context, verbs, rows) = (sweep.context, sweep.context.verbs, tile.len());
        if context.is_full() {
            return;
        }
        let (features, _) = context.padded();
        self.after.own.shrink(context, &self.keys);
        if context.is_inclusive() {
            verbs.transpose(&mut self.phi_panels, &self.keys.phi, features, rows, context.features.count);
            self.transpose_values(context, rows);
        }
        self.crossing.fill(0.0);
        for reader in 0..context.readers() {
            self.load_reader(sweep, reader, tile);
            if context.is_inclusive() {
                self.gradient_from_tile(context, rows, has_d_log);
            }
            if has_d_log {
                d_log::add_pairs(rows, verbs.padded(rows), &self.scores, &self.weights, &mut self.crossing);
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
        verbs.causal_weights(weights, width, self.keys.row_decays(), &mut []);
        let down = |n| Product { m: rows, n, k: rows, accumulate: true, band: Band::Transposed(1) };
        let right = verbs.rows(&self.sums.d_sums, e);
        verbs.multiply(&mut self.dv, e, Left::transposed(weights, width), right, down(e));
        self.weight_gradients(context, rows);
        let weights = &self.weights[..rows * width];
        let right = verbs.rows(&self.queries.phi, features);
        verbs.multiply(&mut self.d_phi, features, Left::transposed(weights, width), right, down(features));
    }

    /// Turns dφ(k) into dk and adds the rows that have a key to the gradients.
    fn store_keys(&mut self, sweep: &Sweep<'a, T>, tile: &Range<usize>, gradients: &mut Gradients<'_, T>) {
        let (context, shapes, rows) = (sweep.context, sweep.context.shapes(), tile.len());
        let (features, e) = context.padded();
        let (x, phi, d_phi) =
            (self.keys.x.rows(), &self.keys.phi[..rows * features], &mut self.d_phi[..rows * features]);
        let (keys, segment) = (context.keys(tile), context.keys(&sweep.span));
        let first = (keys.start + context.first_key()).saturating_sub(tile.start).min(rows);
        let rows = keys.start - segment.start..keys.end - segment.start;
        let of = |heads: usize| sweep.at.head * heads / shapes.state_heads();
        let place = (of(shapes.key_heads), first, rows.clone());
        put_gradient(context, (x, phi), d_phi, &mut self.d_x, &mut gradients.k, place);
        gradients.v.put(of(shapes.value_heads), rows, &self.dv[first * e..]);
    }
}
