//! The gradient of a tile's unfinished sums.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::finish::{dot, inverse, unnormalize};
use super::super::parallel;
use super::super::rows::{HeadRows, Number, gather};
use super::tiles::{Direction, OperandTile, first_row, load_queries};
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
pub struct SumsTile<'a, T> {
    /// Of numerators or unnormalised rows.
    pub d_sums: Buffer<T>,
    /// Of ⟨φ(q), z⟩.
    pub d_norms: [T; TILE],
    pub direction: Direction,
    out: OperandTile<'a, T>,
    d_out: OperandTile<'a, T>,
}

impl<'a, T: Number> SumsTile<'a, T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (_, e) = context.padded();
        let [out, d_out] = std::array::from_fn(|_| OperandTile::new(e));
        let (d_sums, d_norms) = (Buffer::zeros(TILE * e), [T::ZERO; TILE]);
        Self { d_sums, d_norms, direction: Direction::Forward, out, d_out }
    }

    pub fn load(
        &mut self,
        context: &Context<'_, T>,
        saved: &LinearSaved<'a>,
        statistics: &Statistics<T>,
        (batch, head): (usize, usize),
        tile: &Range<usize>,
    ) {
        let shapes = context.shapes();
        let (e, (_, padded)) = (shapes.value_width, context.padded());
        let d_out = HeadRows::new(&saved.d_out, batch, head);
        load_queries(context, &d_out, tile, &mut self.d_out, self.direction);
        self.d_norms.fill(T::ZERO);
        if context.problem.statistic_len() > 0 {
            let out = HeadRows::new(&saved.out, batch, head);
            load_queries(context, &out, tile, &mut self.out, self.direction);
        }
        let first = first_row(context, tile);
        let rows = first..first + context.queries(tile).len();
        let (d_out, out) = (self.d_out.rows(), self.out.rows());
        let d_sums = &mut self.d_sums[..tile.len() * padded];
        let per_head = (batch * shapes.heads() + head) * shapes.queries + context.queries(tile).start;
        let mut factors = [T::ONE; TILE];
        match context.problem.finish {
            LinearFinish::ChunkNorm { .. } => {
                rows.clone().for_each(|r| factors[r] = context.chunk_norm(batch, tile.start + r));
            }
            LinearFinish::Normalize { .. } => {
                rows.clone().for_each(|r| factors[r] = inverse(statistics.divisors[per_head + r - first]));
            }
            LinearFinish::None | LinearFinish::RmsNorm { .. } => {}
        }
        for (r, d_out) in d_out.pieces(tile.len(), padded) {
            let part = &mut d_sums[r * padded..][..d_out.len()];
            context.verbs.scaled_rows(part, d_out, padded, &factors[r..]);
        }
        let products = |products: &mut [T]| {
            for (r, out) in out.pieces(tile.len(), padded) {
                let d_sums = &d_sums[r * padded..][..out.len()];
                context.verbs.row_pair_products(d_sums, out, padded, &mut products[r..]);
            }
        };
        match context.problem.finish {
            LinearFinish::None | LinearFinish::ChunkNorm { .. } => {}
            LinearFinish::Normalize { .. } => {
                products(&mut self.d_norms);
                self.d_norms.iter_mut().for_each(|d| *d = -*d);
            }
            LinearFinish::RmsNorm { scope: NormScope::Head, .. } => {
                products(&mut factors);
                for r in rows {
                    let mean = factors[r] / T::from_f64(e as f64);
                    let divisor = statistics.divisors[per_head + r - first];
                    unnormalize(&mut d_sums[r * padded..][..e], out.row(r, e), mean, divisor);
                }
            }
            LinearFinish::RmsNorm { scope: NormScope::AllHeads, .. } => {
                let token = batch * shapes.queries + context.queries(tile).start;
                for r in rows {
                    let (mean, divisor) = (statistics.means[token + r - first], statistics.divisors[token + r - first]);
                    unnormalize(&mut d_sums[r * padded..][..e], out.row(r, e), mean, divisor);
                }
            }
        }
    }
}
