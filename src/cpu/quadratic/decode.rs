//! Few queries per key head, as in a step of decoding: keys and values are read once, where they lie, in their own dtype.
//!
//! A task takes a segment of the keys of one key head and, as rows of one tile, the queries of all heads that read it:
//!
//! ```text
//! for each tile of keys   s = q kᵀ            inner products along the width, keys widened in registers; of many rows a product
//!                         w = weight(s)       the running maximum and sum of the row
//!                         sums = c·sums + w v  values widened in registers, sums in registers over 32 values
//! then                    merge the segments in order, finish the rows
//! ```
//!
//! Bound: bytes of keys and values over the rate of memory, as long as a row's two multiply-adds per element pair take less
//! than its transfer. Segments are cut by position alone, so that results do not depend on the number of threads.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::parallel;
use super::super::rooms::Rooms;
use super::super::rows::{HeadRows, Number};
use super::super::tile::{Band, Bounds, Left, Online, Product};
use super::forward::store;
use super::{Context, Place};
use crate::problem::{Quadratic, SliceMut, Weight};

/// Most query rows of a key head that are computed this way, where width and value width together are below [`WIDE`] and
/// where they are not; beyond, packing keys and values pays (docs/cpu.md).
const MOST_ROWS: [usize; 2] = [16, 32];
/// See [`MOST_ROWS`].
const WIDE: usize = 128;
/// Fewest rows whose sums are those of tile products, from transposed keys, and not of inner products across vectors.
const PANEL_ROWS: usize = 16;
/// Keys of a task.
const SEGMENT: usize = 1024;
/// Keys of a tile.
const TILE: usize = 256;

/// Whether a problem has few queries per key head.
pub(super) fn suits(problem: &Quadratic) -> bool {
    let shapes = &problem.shapes;
    let most = MOST_ROWS[usize::from(shapes.width + shapes.value_width >= WIDE)];
    (shapes.heads / shapes.key_heads).saturating_mul(shapes.queries) <= most
}

/// A segment of keys.
struct Task<'p, T> {
    batch: usize,
    key_head: usize,
    keys: Range<usize>,
    part: &'p mut [T],
}

/// What a segment adds to the rows of its key head.
struct Part<'p, T> {
    /// [rows, padded value width]
    sums: &'p mut [T],
    maximum: &'p mut [T],
    sum: &'p mut [T],
}

/// Query rows of a key head, padded width of their sums, and numbers of a part.
#[derive(Clone, Copy)]
struct Layout {
    rows: usize,
    width: usize,
    len: usize,
}

impl Layout {
    fn new<T: Number>(context: &Context<'_, T>) -> Self {
        let rows = context.group() * context.shapes().queries;
        let width = context.verbs.padded(context.shapes().value_width);
        // Parts start on lines of their own.
        Self { rows, width, len: (rows * (width + 2)).next_multiple_of(16) }
    }

    fn part<T>(self, numbers: &mut [T]) -> Part<'_, T> {
        let (sums, rest) = numbers.split_at_mut(self.rows * self.width);
        let (maximum, rest) = rest.split_at_mut(self.rows);
        Part { sums, maximum, sum: &mut rest[..self.rows] }
    }
}

pub(super) fn run<T: Number>(context: &Context<'_, T>, out: Rooms<'_>, statistic: Option<Rooms<'_>>) {
    let (shapes, layout) = (context.shapes(), Layout::new(context));
    let units = shapes.batch * shapes.key_heads;
    if units * layout.rows == 0 {
        return;
    }
    let all = context.visible_to_any();
    let segments = all.len().div_ceil(SEGMENT).max(1);
    let mut parts = Buffer::<T>::room(units * segments * layout.len);
    let mut tasks = Vec::with_capacity(units * segments);
    for (index, part) in parts.chunks_exact_mut(layout.len).enumerate() {
        let (unit, start) = (index / segments, all.start + index % segments * SEGMENT);
        let (batch, key_head) = (unit / shapes.key_heads, unit % shapes.key_heads);
        tasks.push(Task { batch, key_head, keys: start..(start + SEGMENT).min(all.end), part });
    }
    let longest = TILE.min(all.len());
    let work = |worker: &mut Worker<T>, task| worker.run(context, task);
    parallel::run_brief(context.nanoseconds(all.len()), tasks, || Worker::new(context, layout, longest), work);
    let (mut outs, mut statistics) = (out.into_heads(), statistic.map(Rooms::into_heads).unwrap_or_default());
    let (mut outs, mut statistics) = (outs.chunks_mut(context.group()), statistics.chunks_mut(context.group()));
    let mut tasks = Vec::with_capacity(units);
    for (unit, parts) in parts.chunks_exact_mut(segments * layout.len).enumerate() {
        let [outs, statistics] = [outs.next(), statistics.next()].map(Option::unwrap_or_default);
        tasks.push((unit, parts, outs, statistics));
    }
    let queries = shapes.queries;
    let work =
        |_: &mut (), (unit, parts, outs, statistics): (_, &mut [T], &mut [SliceMut<'_>], &mut [SliceMut<'_>])| {
            let (batch, key_head) = (unit / shapes.key_heads, unit % shapes.key_heads);
            let Part { sums, maximum, sum } = merge(context, layout, parts);
            let members = sums.chunks_exact_mut(queries * layout.width).zip(sum.chunks_exact_mut(queries));
            for ((member, (sums, sum)), out) in members.enumerate().zip(outs) {
                let place = (batch, key_head * context.group() + member);
                let maximum = &maximum[member * queries..][..queries];
                store(context, place, sums, sum, maximum, out, statistics.get_mut(member));
            }
        };
    parallel::run_brief(units * segments * layout.len, tasks, || (), work);
}

/// One worker's operands.
struct Worker<T> {
    layout: Layout,
    q: Buffer<T>,
    /// For many rows: the panels of the transpose of a tile's keys, and keys or values that no product can read where they lie.
    panels: Buffer<T>,
    rows: Buffer<T>,
    scores: Buffer<T>,
    /// Of dropout.
    factors: Buffer<T>,
    rescale: Vec<T>,
    bounds: Vec<Bounds>,
}

impl<T: Number> Worker<T> {
    fn new(context: &Context<'_, T>, layout: Layout, keys: usize) -> Self {
        let (verbs, width) = (context.verbs, context.shapes().width);
        let transposed = if layout.rows < PANEL_ROWS { 0 } else { keys };
        Self {
            layout,
            q: Buffer::room(layout.rows * verbs.padded(width)),
            panels: Buffer::room(verbs.panels_len(transposed, width)),
            rows: Buffer::room(transposed * verbs.padded(width.max(context.shapes().value_width))),
            scores: Buffer::room(layout.rows * verbs.padded(keys)),
            factors: Buffer::zeros(context.problem.dropout.map_or(0, |_| layout.rows * verbs.padded(keys))),
            rescale: vec![T::ONE; layout.rows],
            bounds: vec![(0, 0); layout.rows],
        }
    }

    fn run(&mut self, context: &Context<'_, T>, task: Task<'_, T>) {
        let (queries, group) = (context.shapes().queries, context.group());
        let d = context.verbs.padded(context.shapes().width);
        for (member, q) in self.q.chunks_exact_mut(queries * d).enumerate() {
            let head = task.key_head * group + member;
            HeadRows::new(&context.inputs.q, task.batch, head).load(0..queries, q, d);
        }
        if context.sign != T::ONE {
            super::multiply_by(&mut self.q, context.sign);
        }
        let mut part = self.layout.part(task.part);
        part.sums.fill(T::ZERO);
        part.sum.fill(T::ZERO);
        part.maximum.fill(T::NEG_INFINITY);
        for key in task.keys.clone().step_by(TILE) {
            let place = Place { batch: task.batch, head: task.key_head * group, query: 0, key };
            self.tile(context, place, key..(key + TILE).min(task.keys.end), &mut part);
        }
    }

    /// Adds a tile of keys to the rows; `at.head` is the first of the group.
    fn tile(&mut self, context: &Context<'_, T>, at: Place, keys: Range<usize>, part: &mut Part<'_, T>) {
        let (verbs, queries, key_head) = (context.verbs, context.shapes().queries, at.head / context.group());
        for bounds in self.bounds.chunks_exact_mut(queries) {
            bounds.iter_mut().enumerate().for_each(|(query, bounds)| *bounds = context.bounds(query, &keys));
        }
        if self.bounds.iter().all(|&(low, high)| low >= high) {
            return;
        }
        let width = verbs.padded(keys.len());
        let scores = &mut self.scores[..self.layout.rows * width];
        if self.panels.is_empty() {
            let rows = HeadRows::new(&context.inputs.k, at.batch, key_head);
            context.for_kept(at.batch, &keys, |kept| {
                verbs.inner_products(&mut scores[kept.start - keys.start..], width, &self.q, rows.stored(kept));
            });
        } else {
            let d = context.shapes().width;
            let rows = context.keys_at(&context.inputs.k, (at.batch, key_head), &keys, &mut self.rows, d);
            verbs.transpose(&mut self.panels, rows.data, rows.row, keys.len(), d);
            let size = Product { m: self.layout.rows, n: width, k: d, accumulate: false, band: Band::Full };
            let right = verbs.panels(&self.panels, d);
            verbs.multiply(scores, width, Left::rows(&self.q, verbs.padded(d)), right, size);
        }
        let mut scale = context.scale(at.batch);
        let members = scores.chunks_exact_mut(queries * width).zip(self.bounds.chunks_exact(queries));
        for (member, (scores, bounds)) in members.enumerate() {
            if context.adjusts() {
                scale = context.adjust(Place { head: at.head + member, ..at }, scores, width, bounds, None);
            }
        }
        if context.problem.weight == Weight::Softmax {
            let online = &mut Online { maximum: part.maximum, sum: part.sum, rescale: &mut self.rescale };
            verbs.softmax(scores, width, &self.bounds, scale, online);
            if self.rescale.iter().any(|&factor| factor != T::ONE) {
                verbs.scale_rows(part.sums, self.layout.width, &self.rescale);
            }
        } else {
            verbs.relu(scores, width, &self.bounds, scale, context.squared(), part.sum);
        }
        let members = self.factors.chunks_exact_mut((queries * width).max(1)).zip(self.bounds.chunks_exact(queries));
        for (member, (factors, bounds)) in members.enumerate() {
            context.dropout(Place { head: at.head + member, ..at }, factors, width, bounds);
        }
        if context.problem.dropout.is_some() {
            verbs.multiply_elements(scores, &self.factors[..self.layout.rows * width]);
        }
        if self.panels.is_empty() {
            let rows = HeadRows::new(&context.inputs.v, at.batch, key_head);
            context.for_kept(at.batch, &keys, |kept| {
                verbs.add_weighted(part.sums, &scores[kept.start - keys.start..], width, rows.stored(kept));
            });
        } else {
            let e = self.layout.width;
            let rows = context.keys_at(&context.inputs.v, (at.batch, key_head), &keys, &mut self.rows, e);
            let size = Product { m: self.layout.rows, n: e, k: keys.len(), accumulate: true, band: Band::Full };
            verbs.multiply(part.sums, e, Left::rows(scores, width), verbs.rows(rows.data, rows.row), size);
        }
    }
}

/// Adds a key head's parts up in order, into the first.
fn merge<'p, T: Number>(context: &Context<'_, T>, layout: Layout, parts: &'p mut [T]) -> Part<'p, T> {
    let (first, others) = parts.split_at_mut(layout.len);
    let total = layout.part(first);
    for part in others.chunks_exact_mut(layout.len) {
        let part = layout.part(part);
        for r in 0..layout.rows {
            let [mut old, mut new] = [T::ONE; 2];
            if context.problem.weight == Weight::Softmax {
                let largest = total.maximum[r].larger(part.maximum[r]);
                [old, new] = [total.maximum[r], part.maximum[r]].map(|maximum| factor(maximum, largest));
                total.maximum[r] = largest;
            }
            let range = r * layout.width..(r + 1) * layout.width;
            let sums = &mut total.sums[range.clone()];
            if old != T::ONE {
                context.verbs.scale_rows(sums, layout.width, &[old]);
            }
            context.verbs.add_outer(sums, layout.width, &[new], &part.sums[range]);
            total.sum[r] = old * total.sum[r] + new * part.sum[r];
        }
    }
    total
}

/// What brings sums from one maximum to a larger one; 0 where nothing has been added.
fn factor<T: Number>(maximum: T, largest: T) -> T {
    if maximum == T::NEG_INFINITY { T::ZERO } else { (maximum - largest).exp2() }
}
