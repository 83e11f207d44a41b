//! The gradient of a tile's unfinished sums.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::finish::{dot, inverse, unnormalize};
use super::super::parallel;
use super::super::rows::{HeadRows, Number, gather};
use super::tiles::{Direction, first_row, load_queries};
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
                    outs.load(start + r..start + r + 1, out, e);
                    d_outs.load(start + r..start + r + 1, d_out, e);
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
    pub d_sums: Buffer<T>,
    /// Of ⟨φ(q), z⟩.
    pub d_norms: [T; TILE],
    pub direction: Direction,
    out: Buffer<T>,
}

impl<T: Number> SumsTile<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (_, e) = context.padded();
        let direction = Direction::Forward;
        Self { d_sums: Buffer::zeros(TILE * e), d_norms: [T::ZERO; TILE], direction, out: Buffer::zeros(TILE * e) }
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
        let d_out = HeadRows::new(&saved.d_out, batch, head);
        load_queries(context, &d_out, tile, &mut self.d_sums[..rows], padded, self.direction);
        self.d_norms.fill(T::ZERO);
        if context.problem.statistic_len() > 0 {
            let out = HeadRows::new(&saved.out, batch, head);
            load_queries(context, &out, tile, &mut self.out[..rows], padded, self.direction);
        }
        let first = first_row(context, tile);
        let rows = first..first + context.queries(tile).len();
        let (d_sums, out) = (&mut self.d_sums[..rows.end * padded], &self.out[..rows.end * padded]);
        let per_head = (batch * shapes.heads() + head) * shapes.queries + context.queries(tile).start;
        let mut factors = [T::ZERO; TILE];
        match context.problem.finish {
            LinearFinish::None => {}
            LinearFinish::ChunkNorm { .. } => {
                rows.clone().for_each(|r| factors[r] = context.chunk_norm(batch, tile.start + r));
                context.verbs.scale_rows(d_sums, padded, &factors);
            }
            LinearFinish::Normalize { .. } => {
                rows.clone().for_each(|r| factors[r] = inverse(statistics.divisors[per_head + r - first]));
                context.verbs.scale_rows(d_sums, padded, &factors);
                context.verbs.row_pair_products(d_sums, out, padded, &mut self.d_norms);
                self.d_norms.iter_mut().for_each(|d| *d = -*d);
            }
            LinearFinish::RmsNorm { scope: NormScope::Head, .. } => {
                context.verbs.row_pair_products(d_sums, out, padded, &mut factors);
                for r in rows {
                    let mean = factors[r] / T::from_f64(e as f64);
                    let divisor = statistics.divisors[per_head + r - first];
                    unnormalize(&mut d_sums[r * padded..][..e], &out[r * padded..], mean, divisor);
                }
            }
            LinearFinish::RmsNorm { scope: NormScope::AllHeads, .. } => {
                let token = batch * shapes.queries + context.queries(tile).start;
                for r in rows {
                    let (mean, divisor) = (statistics.means[token + r - first], statistics.divisors[token + r - first]);
                    unnormalize(&mut d_sums[r * padded..][..e], &out[r * padded..], mean, divisor);
                }
            }
        }
    }
}
