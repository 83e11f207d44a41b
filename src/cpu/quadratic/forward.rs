//! Output blocks: a few rows of queries against tiles of keys, weights and sums never leaving the cache.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::finish::{add_sink, finish};
use super::super::rooms::Rooms;
use super::super::rows::{HeadRows, Number, store_rows};
use super::super::simd::Isa;
use super::super::tile::{Band, Left, Online, Pairs, Product, Verbs};
use super::super::{dispatch, parallel};
use super::precision::{Plain, Precision};
use super::{Context, Place, QuadraticInputs, decode};
use crate::Result;
use crate::problem::{DType, Quadratic, SliceMut, Weight};

/// Query rows of a task.
const BLOCK: usize = 64;
/// Query rows whose scores are in the first-level cache at a time.
const STRIP: usize = 16;
/// Keys of a tile.
const TILE: usize = 256;
/// Bytes of packed keys and values held at a time, if one head does not need more.
const PACKED_BYTES: usize = 16 << 20;

/// Computes the output [B, H, N, E] and, on demand, the row statistic [B, H, N] that the backward pass needs: the
/// log-sum-exp for softmax (−∞ for rows without a key), else the divisor.
///
/// # Errors
/// Operands that do not match the problem; outputs of another length or dtype (`out` may have that of q or of sums, the statistic has
/// that of sums).
pub fn forward(
    problem: &Quadratic,
    inputs: &QuadraticInputs<'_>,
    out: SliceMut<'_>,
    statistic: Option<SliceMut<'_>>,
) -> Result<()> {
    inputs.check(problem)?;
    problem.check_outputs(&out, statistic.as_ref())?;
    let (heads, e) = (problem.shapes.batch * problem.shapes.heads, problem.shapes.value_width);
    let parts: Vec<_> = problem.parts().collect();
    let lens = |width: usize| parts.iter().map(move |(part, _)| part.queries.len() * width);
    let outs = Rooms::of(out, heads).cut(lens(e));
    let mut statistics = statistic.map(|statistic| Rooms::of(statistic, heads).cut(lens(1)).into_iter());
    let calls = parts.iter().zip(outs).map(|((part, problem), out)| {
        let statistic = statistics.as_mut().and_then(Iterator::next);
        (problem, inputs.part(part), out, statistic)
    });
    let work = |problem: &Quadratic| problem.shapes.queries.saturating_mul(problem.shapes.keys);
    parallel::run_calls(
        calls.collect(),
        |(problem, ..)| work(problem),
        |isa, (problem, inputs, out, statistic)| {
            run_alone(problem, &inputs, isa, out, statistic);
        },
    );
    Ok(())
}

/// Computes one part.
fn run_alone(
    problem: &Quadratic,
    inputs: &QuadraticInputs<'_>,
    isa: Isa,
    out: Rooms<'_>,
    statistic: Option<Rooms<'_>>,
) {
    let dtype = problem.shapes.dtype;
    if decode::suits(problem) {
        dispatch!(dtype, T => {
            return decode::run(&Context::new(problem, inputs, Verbs::<T>::get(isa)), out, statistic);
        });
    }
    if let Some(pairs) = Pairs::get(isa).filter(|_| dtype == DType::BF16) {
        return run(&Context::new(problem, inputs, Verbs::<f32>::get(isa)), pairs, out, statistic);
    }
    dispatch!(dtype, T => {
        run(&Context::new(problem, inputs, Verbs::<T>::get(isa)), Plain, out, statistic);
    });
}

/// Keys and values of one head that some query sees, as right operands.
struct Packed<X> {
    k: Buffer<X>,
    v: Buffer<X>,
}

/// A block of queries of one head.
struct Task<'p, 'o, X> {
    packed: &'p Packed<X>,
    /// That the packed ones start with.
    first_key: usize,
    batch: usize,
    head: usize,
    queries: Range<usize>,
    out: SliceMut<'o>,
    statistic: Option<SliceMut<'o>>,
}

pub(super) fn run<T: Number, P: Precision<T>>(
    context: &Context<'_, T>,
    precision: P,
    mut out: Rooms<'_>,
    mut statistic: Option<Rooms<'_>>,
) {
    let shapes = context.shapes();
    let (d, e) = (shapes.width, shapes.value_width);
    let units = shapes.batch * shapes.key_heads;
    let keys = packed_keys(context);
    let k_len = context.verbs.panels_len(keys.len(), precision.inner(d));
    let v_len = precision.inner(keys.len()) * context.verbs.padded(e);
    let bytes = (k_len + v_len) * size_of::<P::X>();
    let wave = (PACKED_BYTES / bytes.max(1)).max(rayon::current_num_threads());
    for first in (0..units).step_by(wave) {
        let units = first..(first + wave).min(units);
        let mut packed: Vec<_> =
            units.clone().map(|_| Packed { k: Buffer::room(k_len), v: Buffer::room(v_len) }).collect();
        pack(context, precision, units.start, &keys, &mut packed);
        let mut tasks = Vec::new();
        for (unit, packed) in units.zip(&packed) {
            let (batch, key_head) = (unit / shapes.key_heads, unit % shapes.key_heads);
            for head in key_head * context.group()..(key_head + 1) * context.group() {
                for start in (0..shapes.queries).step_by(BLOCK) {
                    let queries = start..(start + BLOCK).min(shapes.queries);
                    let rows = queries.len();
                    let room = batch * shapes.heads + head;
                    let statistic = statistic.as_mut().map(|statistic| statistic.take(room, rows));
                    let (out, first_key) = (out.take(room, rows * e), keys.start);
                    tasks.push(Task { packed, first_key, batch, head, queries, out, statistic });
                }
            }
        }
        let work = |scratch: &mut Scratch<T, P>, task: Task<'_, '_, P::X>| scratch.block(context, task);
        parallel::run_brief(
            context.nanoseconds(keys.len()),
            tasks,
            || Scratch::new(context, precision, keys.len()),
            work,
        );
    }
}

/// Keys that are packed: those that some query sees, from a multiple of a panel on.
fn packed_keys<T: Number>(context: &Context<'_, T>) -> Range<usize> {
    let visible = context.visible_to_any();
    visible.start / context.verbs.panel * context.verbs.panel..visible.end
}

/// Packs `all` keys and values of consecutive units, cut into chunks of keys. Keys that the mask removes are zeros.
fn pack<T: Number, P: Precision<T>>(
    context: &Context<'_, T>,
    precision: P,
    first: usize,
    all: &Range<usize>,
    packed: &mut [Packed<P::X>],
) {
    let (shapes, verbs, inputs) = (context.shapes(), context.verbs, context.inputs);
    let (d, e) = (verbs.padded(shapes.width), verbs.padded(shapes.value_width));
    let mut tasks = Vec::new();
    for (index, packed) in packed.iter_mut().enumerate() {
        let (batch, head) = ((first + index) / shapes.key_heads, (first + index) % shapes.key_heads);
        let chunks = packed
            .k
            .chunks_mut(TILE * precision.inner(shapes.width))
            .zip(packed.v.chunks_mut(precision.inner(TILE) * e));
        for (chunk, (k, v)) in chunks.enumerate() {
            let start = all.start + chunk * TILE;
            let keys = start..(start + TILE).min(all.end);
            tasks.push((batch, head, keys, k, v));
        }
    }
    let scratch = || Buffer::room(TILE.min(all.len()) * d.max(e));
    parallel::run_brief(context.nanoseconds(all.len()), tasks, scratch, |rows, (batch, head, keys, k, v)| {
        context.load_keys(&inputs.k, batch, head, keys.clone(), rows, d);
        precision.keys(verbs, k, rows, d, keys.len(), shapes.width);
        let rows = &mut rows[..keys.len() * e];
        context.load_keys(&inputs.v, batch, head, keys, rows, e);
        precision.values(v, rows, e);
    });
}

/// Tiles of one worker.
struct Scratch<T: Number, P: Precision<T>> {
    precision: P,
    q: Buffer<T>,
    narrow_q: Buffer<P::X>,
    scores: Buffer<T>,
    /// Of dropout.
    factors: Buffer<T>,
    narrow_weights: Buffer<P::X>,
    sums: Buffer<T>,
    maximum: [T; BLOCK],
    sum: [T; BLOCK],
}

impl<T: Number, P: Precision<T>> Scratch<T, P> {
    /// For so many packed keys.
    fn new(context: &Context<'_, T>, precision: P, keys: usize) -> Self {
        let (shapes, padded) = (context.shapes(), |size| context.verbs.padded(size));
        let rows = BLOCK.min(shapes.queries);
        let scores = STRIP.min(rows) * padded(TILE.min(keys));
        Self {
            precision,
            q: Buffer::room(rows * padded(shapes.width)),
            narrow_q: Buffer::room(rows * padded(shapes.width)),
            scores: Buffer::room(scores),
            // Rows of scores are multiplied by whole rows of factors, which see some of the keys.
            factors: Buffer::zeros(if context.problem.dropout.is_some() { scores } else { 0 }),
            narrow_weights: Buffer::room(scores),
            sums: Buffer::room(rows * padded(shapes.value_width)),
            maximum: [T::ZERO; BLOCK],
            sum: [T::ZERO; BLOCK],
        }
    }

    fn block(&mut self, context: &Context<'_, T>, mut task: Task<'_, '_, P::X>) {
        let (shapes, verbs) = (context.shapes(), context.verbs);
        let d = verbs.padded(shapes.width);
        HeadRows::new(&context.inputs.q, task.batch, task.head).load(task.queries.clone(), &mut self.q, d);
        if context.sign != T::ONE {
            super::multiply_by(&mut self.q, context.sign);
        }
        self.precision.narrow(&self.q, &mut self.narrow_q);
        self.sums.fill(T::ZERO);
        self.maximum.fill(T::NEG_INFINITY);
        self.sum.fill(T::ZERO);
        let first = context.visible(task.queries.start).start / verbs.panel * verbs.panel;
        let last = context.visible(task.queries.end - 1).end;
        for key in (first..last).step_by(TILE) {
            let keys = key..(key + TILE).min(last);
            for row in (0..task.queries.len()).step_by(STRIP) {
                self.strip(context, &task, row, keys.clone());
            }
        }
        let rows = task.queries.len();
        let sums = &mut self.sums[..rows * verbs.padded(shapes.value_width)];
        let (place, statistic) = ((task.batch, task.head), task.statistic.as_mut());
        store(context, place, sums, &mut self.sum[..rows], &self.maximum[..rows], &mut task.out, statistic);
    }

    /// Adds a tile of keys to the rows of a strip.
    fn strip(&mut self, context: &Context<'_, T>, task: &Task<'_, '_, P::X>, row: usize, keys: Range<usize>) {
        let (shapes, verbs) = (context.shapes(), context.verbs);
        let (d, e) = (verbs.padded(shapes.width), verbs.padded(shapes.value_width));
        let rows = STRIP.min(task.queries.len() - row);
        let query = task.queries.start + row;
        let mut bounds = [(0, 0); STRIP];
        for (r, bounds) in bounds[..rows].iter_mut().enumerate() {
            *bounds = context.bounds(query + r, &keys);
        }
        let bounds = &bounds[..rows];
        let columns = bounds.iter().map(|&(low, high)| if low < high { high } else { 0 }).max().unwrap_or(0);
        if columns == 0 {
            return;
        }
        let width = verbs.padded(columns);
        let scores = &mut self.scores[..rows * width];
        let size = |n, k, accumulate| Product { m: rows, n, k, accumulate, band: Band::Full };
        let precision = self.precision;
        let (d, inner) = (precision.inner(d), precision.inner(shapes.width));
        let q = &precision.operand(&self.q, &self.narrow_q)[row * d..];
        let right = verbs.panels(&task.packed.k[(keys.start - task.first_key) * inner..], inner);
        precision.multiply(verbs, scores, width, Left::rows(q, d), right, size(width, inner, false));
        let mut scale = context.scale(task.batch);
        let place = Place { batch: task.batch, head: task.head, query, key: keys.start };
        if context.adjusts() {
            scale = context.adjust(place, scores, width, bounds, None);
        }
        let sums = &mut self.sums[row * e..(row + rows) * e];
        let sum = &mut self.sum[row..row + rows];
        if context.problem.weight == Weight::Softmax {
            let mut rescale = [T::ONE; STRIP];
            let maximum = &mut self.maximum[row..row + rows];
            verbs.softmax(scores, width, bounds, scale, &mut Online { maximum, sum, rescale: &mut rescale });
            for (row, &factor) in sums.chunks_exact_mut(e).zip(&rescale) {
                if factor != T::ONE {
                    verbs.scale_rows(row, e, &[factor]);
                }
            }
        } else {
            verbs.relu(scores, width, bounds, scale, context.squared(), sum);
        }
        if context.dropout(place, &mut self.factors, width, bounds) {
            verbs.multiply_elements(scores, &self.factors[..rows * width]);
        }
        precision.narrow(scores, &mut self.narrow_weights);
        let weights = Left::rows(precision.operand(scores, &self.narrow_weights), precision.inner(width));
        let right = verbs.rows(&task.packed.v[precision.inner(keys.start - task.first_key) * e..], e);
        precision.multiply(verbs, sums, e, weights, right, size(e, precision.inner(columns), true));
    }
}

/// Finishes rows of sums of a batch entry's head, and writes them and their statistic, which takes the place of Σ w in `sum`.
pub(super) fn store<T: Number>(
    context: &Context<'_, T>,
    (batch, head): (usize, usize),
    sums: &mut [T],
    sum: &mut [T],
    maximum: &[T],
    out: &mut SliceMut<'_>,
    statistic: Option<&mut SliceMut<'_>>,
) {
    let (weight, how) = (context.problem.weight, context.finish(batch));
    let (e, padded) = (context.shapes().value_width, context.verbs.padded(context.shapes().value_width));
    for ((row, sum), &maximum) in sums.chunks_exact_mut(padded).zip(sum.iter_mut()).zip(maximum) {
        let mut maximum = maximum;
        if let Some(&sink) = context.sinks.get(head) {
            (*sum, maximum) = add_sink(row, *sum, maximum, sink);
        }
        *sum = finish(weight, how, &mut row[..e], *sum, maximum);
    }
    store_rows(sums, padded, e, out, 0);
    if let Some(statistic) = statistic {
        T::store(sum, statistic, 0);
    }
}
