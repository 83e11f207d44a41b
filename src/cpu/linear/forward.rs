//! Outputs, tile by tile: the part inside the tile by its weights, the part before it by the carried sums.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::finish::{inverse, root_mean_square};
use super::super::rooms::Rooms;
use super::super::rows::{Number, store_rows};
use super::super::tile::{Band, Left, Product, Verbs};
use super::super::{dispatch, parallel};
use super::carried::Carried;
use super::segments::{cut, head_at, next_pieces, span, states};
use super::state::{Order, State};
use super::tiles::{KeyTile, QueryTile, StateHead, first_row};
use super::{Context, LinearInputs, LinearOutputs, StateMut, TILE, check};
use crate::Result;
use crate::problem::{self, Linear, LinearFinish, SliceMut};
use crate::transnormer::NormScope;

/// Computes the output and, on demand, the row statistic and the final state.
///
/// # Errors
/// Operands that do not match the problem; outputs of another length or dtype.
pub fn forward(problem: &Linear, inputs: &LinearInputs<'_>, outputs: LinearOutputs<'_>) -> Result<()> {
    check(problem, inputs)?;
    outputs.check(problem)?;
    let calls = problem.parts().zip(rooms(problem, outputs));
    let calls = calls.map(|((part, problem), outputs)| (problem, inputs.part(&part), outputs));
    parallel::run_calls(
        calls.collect(),
        |(problem, ..)| problem.shapes.keys,
        |isa, (problem, inputs, outputs)| {
            dispatch!(problem.shapes.dtype, T => {
                run::<T>(&Context::new(&problem, &inputs, Verbs::<T>::get(isa)), outputs);
            });
        },
    );
    Ok(())
}

/// Room for the results of each part.
fn rooms<'o>(problem: &Linear, outputs: LinearOutputs<'o>) -> Vec<problem::LinearOutputs<Rooms<'o>>> {
    let shapes = &problem.shapes;
    let queries: Vec<usize> = shapes.parts().map(|(part, _)| part.queries.len()).collect();
    let cut = |all, heads, width| Rooms::of(all, heads).cut(queries.iter().map(|rows| rows * width)).into_iter();
    let LinearOutputs { out, statistic, state } = outputs;
    let heads = shapes.batch * shapes.heads();
    let mut statistics = statistic.map(|statistic| cut(statistic, problem.divisors(), 1));
    let state_heads = shapes.states() * shapes.state_heads();
    let share = |all| Rooms::of(all, state_heads).share(queries.len());
    let mut states = state.map(|StateMut { s, z, stabilizer }| {
        let mut stabilizers = stabilizer.map(share);
        let pairs = share(s).zip(share(z)).map(move |(s, z)| problem::StateMut {
            s,
            z,
            stabilizer: stabilizers.as_mut().and_then(Iterator::next),
        });
        pairs.collect::<Vec<_>>().into_iter()
    });
    let outs = cut(out, heads, shapes.value_width).map(|out| problem::LinearOutputs {
        out,
        statistic: statistics.as_mut().and_then(Iterator::next),
        state: states.as_mut().and_then(Iterator::next),
    });
    outs.collect()
}

/// Segments of a state head with the output heads that read it.
struct Task<'s, 'o, T> {
    at: StateHead,
    segments: &'s [Range<usize>],
    /// The state entering the first of them, that after the last of the line with a full scan; `None` where the line
    /// starts, and when the segments are the whole line.
    entering: Option<&'s State<T>>,
    /// Per output head.
    out: &'s mut [SliceMut<'o>],
    /// The same, or nothing.
    statistic: &'s mut [SliceMut<'o>],
    state: Option<StateMut<'o>>,
}

fn run<T: Number>(context: &Context<'_, T>, outputs: problem::LinearOutputs<Rooms<'_>>) {
    let problem::LinearOutputs { out, statistic, state } = outputs;
    let LinearFinish::RmsNorm { epsilon, scope: NormScope::AllHeads } = context.problem.finish else {
        return sums(context, out, statistic, state);
    };
    let mut raw = Buffer::room(context.problem.output_len());
    let heads = context.shapes().batch * context.shapes().heads();
    sums(context, Rooms::of(T::slice_mut(&mut raw), heads), None, state);
    normalize_all_heads(context, &raw, epsilon, out, statistic);
}

fn sums<'o, T: Number>(
    context: &Context<'_, T>,
    out: Rooms<'o>,
    statistic: Option<Rooms<'o>>,
    mut state: Option<problem::StateMut<Rooms<'o>>>,
) {
    let shapes = context.shapes();
    let heads = shapes.batch * shapes.state_heads();
    let (segments, readers) = (context.segments(), context.readers());
    let at_once = context.segments_at_once(segments.len(), heads);
    let states = if at_once < segments.len() { states(context, &segments, Order::Plain) } else { Vec::new() };
    let pieces: Vec<&[Range<usize>]> = segments.chunks(at_once).collect();
    let rows: Vec<usize> = pieces.iter().map(|piece| context.queries(&span(piece)).len()).collect();
    let rooms = |all: Rooms<'o>, width: usize| all.cut(rows.iter().map(|rows| rows * width)).into_iter();
    let mut outs: Vec<_> = rooms(out, shapes.value_width).map(Rooms::into_heads).collect();
    let mut statistics: Vec<_> =
        statistic.into_iter().flat_map(|statistic| rooms(statistic, 1)).map(Rooms::into_heads).collect();
    statistics.resize_with(pieces.len(), Vec::new);
    let mut tasks = Vec::with_capacity(pieces.len() * heads);
    let rooms = outs.iter_mut().zip(&mut statistics);
    for ((index, segments), (outs, statistics)) in pieces.iter().enumerate().zip(rooms) {
        let (mut outs, mut statistics) = (outs.chunks_mut(readers), statistics.chunks_mut(readers));
        for head in 0..heads {
            let [out, statistic] = [outs.next(), statistics.next()].map(Option::unwrap_or_default);
            let last = index + 1 == pieces.len();
            let state = state.as_mut().filter(|_| last).map(|state| StateMut {
                s: state.s.take(head, context.features.count * shapes.value_width),
                z: state.z.take(head, context.features.count),
                stabilizer: state.stabilizer.as_mut().map(|stabilizer| stabilizer.take(head, 1)),
            });
            let entering = states.get(head).and_then(|states| match index {
                _ if context.is_full() => states.last(),
                0 => None,
                _ => states.get(index - 1),
            });
            tasks.push(Task { at: head_at(context, head), segments, entering, out, statistic, state });
        }
    }
    let nanoseconds = context.nanoseconds();
    parallel::run_brief(nanoseconds, tasks, || Worker::new(context), |worker, task| worker.run(context, task));
}

/// Tiles of one worker.
struct Worker<'a, T> {
    before: Carried<T>,
    keys: KeyTile<'a, T>,
    queries: QueryTile<'a, T>,
    panels: Buffer<T>,
    scores: Buffer<T>,
    sums: Buffer<T>,
    norms: [T; TILE],
    /// Whether the sums that the next tile reads are empty, and nobody reads them but queries that see a key of their own.
    is_start: bool,
}

impl<'a, T: Number> Worker<'a, T> {
    fn new(context: &Context<'_, T>) -> Self {
        let (_, e) = context.padded();
        let room = |len| Buffer::room(len);
        Self {
            before: Carried::new(State::zero(context, Order::Plain)),
            keys: KeyTile::new(context),
            queries: QueryTile::new(context),
            panels: room(context.verbs.panels_len(TILE, context.features.count)),
            scores: room(TILE * context.verbs.padded(TILE)),
            sums: room(TILE * e),
            norms: [T::ZERO; TILE],
            is_start: false,
        }
    }

    fn run(&mut self, context: &Context<'a, T>, mut task: Task<'_, '_, T>) {
        match task.entering {
            Some(all) if context.is_full() => self.before.begin(all.clone()),
            Some(state) => self.before.enter(state.clone()),
            None => self.before.begin_line(context, task.at, Order::Plain),
        }
        if context.is_full() && task.entering.is_none() {
            self.absorb_all(context, &task);
        }
        self.is_start = context.is_inclusive() && task.entering.is_none() && context.inputs.state.is_none();
        for (index, segment) in task.segments.iter().enumerate() {
            if index > 0 && !context.is_full() {
                self.before.next_segment(context);
            }
            for tile in context.tiles(segment.clone()) {
                self.before.refresh(context, context.starts_chunk(tile.start));
                self.read_tile(context, &mut task, &tile);
                self.is_start = false;
            }
        }
        if let Some(state) = &mut task.state {
            self.before.last(context).store(context, state);
        }
    }

    /// The sums of all keys, which a full scan reads.
    fn absorb_all(&mut self, context: &Context<'a, T>, task: &Task<'_, '_, T>) {
        for (index, segment) in task.segments.iter().enumerate() {
            if index > 0 {
                self.before.next_segment(context);
            }
            self.before.own.absorb_segment(context, task.at, segment, &mut self.keys);
        }
        self.before.settle(context);
    }

    /// Output rows of all readers at a tile; moves the sums to its end.
    fn read_tile(&mut self, context: &Context<'a, T>, task: &mut Task<'_, '_, T>, tile: &Range<usize>) {
        if !context.is_full() {
            self.keys.load(context, task.at, tile, &mut self.before.own.stabilizer);
        }
        if context.is_inclusive() {
            let (features, count) = (context.features.padded, context.features.count);
            context.verbs.transpose(&mut self.panels, &self.keys.phi, features, tile.len(), count);
        }
        for reader in 0..context.readers() {
            self.read(context, task, reader, tile);
        }
        let is_read = task.state.is_some() || tile.end < span(task.segments).end;
        if !context.is_full() && is_read {
            self.before.own.absorb(context, &mut self.keys, tile.len());
        }
    }

    /// Output rows of one head at a tile.
    fn read(&mut self, context: &Context<'a, T>, task: &mut Task<'_, '_, T>, reader: usize, tile: &Range<usize>) {
        let (verbs, count) = (context.verbs, context.features.count);
        let (features, e) = context.padded();
        let rows = tile.len();
        self.queries.load(context, task.at.batch, task.at.head * context.readers() + reader, tile);
        let phi = &self.queries.phi[..rows * features];
        let sums = &mut self.sums[..rows * e];
        let norms = &mut self.norms[..rows];
        let size = |n, k| Product { m: rows, n, k, accumulate: false, band: Band::Full };
        if self.is_start {
            norms.fill(T::ZERO);
        } else {
            let before = self.before.sums();
            verbs.multiply(sums, e, Left::rows(phi, features), verbs.panels(&before.s, count), size(e, count));
            verbs.row_products(phi, features, &before.z, norms);
            if self.keys.decays && !context.is_full() {
                verbs.scale_rows(sums, e, &self.keys.from_start);
                norms.iter_mut().zip(&self.keys.from_start).for_each(|(norm, &decay)| *norm = *norm * decay);
            }
        }
        if context.is_inclusive() {
            let width = verbs.padded(rows);
            let scores = &mut self.scores[..rows * width];
            let product = Product { band: Band::Result(1), ..size(width, count) };
            verbs.multiply(scores, width, Left::rows(phi, features), verbs.panels(&self.panels, count), product);
            let mut inside = [T::ZERO; TILE];
            verbs.causal_weights(scores, width, self.keys.row_decays(), &mut inside[..rows]);
            for (norm, inside) in norms.iter_mut().zip(inside) {
                *norm += inside;
            }
            let product = Product { accumulate: !self.is_start, band: Band::Left(1), ..size(e, rows) };
            verbs.multiply(sums, e, Left::rows(scores, width), self.keys.values(context), product);
        }
        self.store(context, task, reader, tile);
    }

    /// Finishes the rows that have a query and stores them.
    fn store(&mut self, context: &Context<'_, T>, task: &mut Task<'_, '_, T>, reader: usize, tile: &Range<usize>) {
        let (e, (_, padded)) = (context.shapes().value_width, context.padded());
        let queries = context.queries(tile);
        let first = first_row(context, tile);
        let rows = first..first + queries.len();
        let mut factors = [T::ONE; TILE];
        for r in rows.clone() {
            let row = &self.sums[r * padded..][..e];
            let (factor, statistic) = match context.problem.finish {
                LinearFinish::Normalize { epsilon } => {
                    let divisor = self.norms[r] + T::from_f64(epsilon);
                    (inverse(divisor), divisor)
                }
                LinearFinish::RmsNorm { epsilon, scope: NormScope::Head } => {
                    let divisor = root_mean_square(row, epsilon);
                    (inverse(divisor), divisor)
                }
                LinearFinish::ChunkNorm { .. } => (context.chunk_norm(task.at.batch, tile.start + r), T::ONE),
                LinearFinish::None | LinearFinish::RmsNorm { .. } => continue,
            };
            (factors[r], self.norms[r]) = (factor, statistic);
        }
        let sums = &mut self.sums[rows.start * padded..rows.end * padded];
        let factors = &factors[rows.clone()];
        let offset = queries.start - context.queries(&span(task.segments)).start;
        let out = &mut task.out[reader];
        if let (true, Some(out)) = (padded == e, T::own_mut(out)) {
            context.verbs.scaled_rows(&mut out[offset * e..][..sums.len()], sums, e, factors);
        } else {
            context.verbs.scale_rows(sums, padded, factors);
            store_rows(sums, padded, e, out, offset);
        }
        if let Some(statistic) = task.statistic.get_mut(reader).filter(|_| context.problem.statistic_len() > 0) {
            T::store(&self.norms[rows], statistic, offset);
        }
    }
}

/// The RMS norm over all heads of a token.
fn normalize_all_heads<T: Number>(
    context: &Context<'_, T>,
    raw: &[T],
    epsilon: f64,
    out: Rooms<'_>,
    statistic: Option<Rooms<'_>>,
) {
    let shapes = context.shapes();
    let (heads, e, queries) = (shapes.heads(), shapes.value_width, shapes.queries);
    let blocks: Vec<usize> = (0..queries).step_by(TILE).map(|start| TILE.min(queries - start)).collect();
    let mut outs = cut(out, &blocks, e);
    let mut statistics = statistic.map(|statistic| cut(statistic, &blocks, 1));
    let mut tasks = Vec::new();
    for batch in 0..shapes.batch {
        for (index, &rows) in blocks.iter().enumerate() {
            let heads = next_pieces(&mut outs[batch * heads..][..heads]);
            let statistic = statistics.as_mut().and_then(|statistics| statistics[batch].next());
            tasks.push((batch, index * TILE, rows, heads, statistic));
        }
    }
    parallel::run(
        tasks,
        || vec![T::ZERO; heads * e],
        |row, (batch, start, rows, mut outs, mut statistic)| {
            for r in 0..rows {
                for (head, part) in row.chunks_exact_mut(e).enumerate() {
                    let at = ((batch * heads + head) * queries + start + r) * e;
                    part.copy_from_slice(&raw[at..at + e]);
                }
                let divisor = root_mean_square(row, epsilon);
                row.iter_mut().for_each(|x| *x = if divisor == T::ZERO { T::ZERO } else { *x / divisor });
                for (part, out) in row.chunks_exact(e).zip(&mut outs) {
                    T::store(part, out, r * e);
                }
                if let Some(statistic) = &mut statistic {
                    T::store(&[divisor], statistic, r);
                }
            }
        },
    );
}
