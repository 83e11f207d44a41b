//! The gradient of a tile's unfinished sums.

use std::ops::Range;

use super::super::finish::{dot, inverse, unnormalize};
use super::super::parallel;
use super::super::rows::{HeadRows, Number, gather};
use super::tiles::{first_row, load_queries};
use super::{Context, LinearSaved, TILE};
use crate::problem::LinearFinish;
use crate::transnormer::NormScope;

/// What the gradient of a row of sums needs beside the row.
pub struct Statistics<T> {
    /// The divisors, as saved.
    divisors: Vec<T>,
    /// mean(O ⊙ dO) over all heads, [B, N], for the norm over all heads.
    means: Vec<T>,
}

impl<T: Number> Statistics<T> {
    pub fn new(context: &Context<'_, T>, saved: &LinearSaved<'_>) -> Self {
        let divisors = saved.statistic.as_ref().map(gather).unwrap_or_default();
        let all_heads = matches!(context.problem.finish, LinearFinish::RmsNorm { scope: NormScope::AllHeads, .. });
        Self { divisors, means: if all_heads { means(context, saved) } else { Vec::new() } }
    }
}

fn means<T: Number>(context: &Context<'_, T>, saved: &LinearSaved<'_>) -> Vec<T> {
    let shapes = context.shapes();
    let (e, queries, heads) = (shapes.value_width, shapes.queries, shapes.heads());
    let mut means = vec![T::ZERO; shapes.batch * queries];
    let mut tasks = Vec::new();
    for (batch, means) in means.chunks_mut(queries.max(1)).enumerate() {
        let blocks = means.chunks_mut(TILE).enumerate();
        tasks.extend(blocks.map(|(block, means)| (batch, block * TILE, means)));
    }
    parallel::run(
        tasks,
        || (vec![T::ZERO; e], vec![T::ZERO; e]),
        |(out, d_out), (batch, start, means)| {
            for head in 0..heads {
                let (outs, d_outs) = (HeadRows::new(&saved.out, batch, head), HeadRows::new(&saved.d_out, batch, head));
                for (r, mean) in means.iter_mut().enumerate() {
                    outs.load(start + r..start + r + 1, out, e, |_| true);
                    d_outs.load(start + r..start + r + 1, d_out, e, |_| true);
                    *mean += dot(out, d_out) / T::from_f64((heads * e) as f64);
                }
            }
        },
    );
    means
}

/// Gradients of the rows of sums of one head at a tile; zeros where there is no query.
pub struct SumsTile<T> {
    /// Of numerators or unnormalised rows.
    pub d_sums: Vec<T>,
    /// Of ⟨φ(q), z⟩.
    pub d_norms: [T; TILE],
    out: Vec<T>,
}

impl<T: Number> SumsTile<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (_, e) = context.padded();
        Self { d_sums: vec![T::ZERO; TILE * e], d_norms: [T::ZERO; TILE], out: vec![T::ZERO; TILE * e] }
    }

    pub fn load(
        &mut self,
        context: &Context<'_, T>,
        saved: &LinearSaved<'_>,
        statistics: &Statistics<T>,
        (batch, head): (usize, usize),
        tile: &Range<usize>,
    ) {
        let shapes = context.shapes();
        let (e, (_, padded)) = (shapes.value_width, context.padded());
        let rows = tile.len() * padded;
        load_queries(context, &HeadRows::new(&saved.d_out, batch, head), tile, &mut self.d_sums[..rows], padded);
        self.d_norms.fill(T::ZERO);
        if context.problem.statistic_len() > 0 {
            load_queries(context, &HeadRows::new(&saved.out, batch, head), tile, &mut self.out[..rows], padded);
        }
        let first = first_row(context, tile);
        for (r, query) in (first..).zip(context.queries(tile)) {
            let (d_row, out) = (&mut self.d_sums[r * padded..][..e], &self.out[r * padded..][..e]);
            let per_head = (batch * shapes.heads() + head) * shapes.queries + query;
            match context.problem.finish {
                LinearFinish::None => {}
                LinearFinish::ChunkNorm { .. } => {
                    let factor = context.chunk_norm(tile.start + r);
                    d_row.iter_mut().for_each(|d| *d = *d * factor);
                }
                LinearFinish::Normalize { .. } => {
                    let factor = inverse(statistics.divisors[per_head]);
                    d_row.iter_mut().for_each(|d| *d = *d * factor);
                    self.d_norms[r] = -dot(d_row, out);
                }
                LinearFinish::RmsNorm { scope: NormScope::Head, .. } => {
                    let mean = dot(d_row, out) / T::from_f64(e as f64);
                    unnormalize(d_row, out, mean, statistics.divisors[per_head]);
                }
                LinearFinish::RmsNorm { scope: NormScope::AllHeads, .. } => {
                    let token = batch * shapes.queries + query;
                    unnormalize(d_row, out, statistics.means[token], statistics.divisors[token]);
                }
            }
        }
    }
}
