//! Gradients in one pass over the tiles: five products a tile, weights recomputed from the saved statistic.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::finish::unfinish;
use super::super::rooms::Rooms;
use super::super::rows::{HeadRows, Number, store_rows};
use super::super::tile::{Band, Bounds, Delta, Left, Product, Verbs};
use super::super::{dispatch, parallel};
use super::bias_sums::{BiasPlane, BiasSums};
use super::means::FEW;
use super::precision::Plain;
use super::{Context, Place, QuadraticGradients, QuadraticInputs, QuadraticSaved, decode, forward, multiply_by};
use crate::Result;
use crate::problem::{Operand, Part, Quadratic, QuadraticFinish, Slice, SliceMut, View, Weight};

/// Query rows of a tile.
const BLOCK: usize = 128;
/// Keys of a tile.
const TILE: usize = 128;

/// Computes the gradients of q, k, v, the biases and the sinks.
///
/// # Errors
/// Operands that do not match the problem; gradients of another length or dtype.
pub fn backward(
    problem: &Quadratic,
    inputs: &QuadraticInputs<'_>,
    saved: &QuadraticSaved<'_>,
    gradients: QuadraticGradients<'_>,
) -> Result<()> {
    inputs.check(problem)?;
    saved.check(problem)?;
    gradients.check(problem)?;
    let shapes = &problem.shapes;
    let parts: Vec<_> = problem.parts().collect();
    let [queries, keys] = [|part: &Part| part.queries.len(), |part: &Part| part.keys.len()];
    let cut = |all, heads, rows: fn(&Part) -> usize, width| {
        Rooms::of(all, shapes.batch * heads).cut(parts.iter().map(|(part, _)| rows(part) * width)).into_iter()
    };
    let QuadraticGradients { q, k, v, bias, mut attention_bias, sinks } = gradients;
    let mut q = cut(q, shapes.heads, queries, shapes.width);
    let mut k = cut(k, shapes.key_heads, keys, shapes.width);
    let mut v = cut(v, shapes.key_heads, keys, shapes.value_width);
    let mut shared = vec![Shared::default(); parts.len()];
    let calls = parts.iter().zip(&mut shared).filter_map(|((part, problem), shared)| {
        let rooms = PartRooms { q: q.next()?, k: k.next()?, v: v.next()?, attention_bias: attention_bias.take() };
        Some((problem, inputs.part(part), saved.part(part), rooms, shared))
    });
    let work = |problem: &Quadratic| problem.shapes.queries.saturating_mul(problem.shapes.keys);
    parallel::run_calls(
        calls.collect(),
        |(problem, ..)| work(problem),
        |isa, (problem, inputs, saved, rooms, shared)| {
            dispatch!(problem.shapes.dtype, T => {
                *shared = run::<T>(&Context::new(problem, &inputs, Verbs::<T>::get(isa)), &saved, rooms);
            });
        },
    );
    let store = |room: Option<SliceMut<'_>>, of: fn(&Shared) -> &[f64]| {
        let Some(mut room) = room else { return };
        let mut sums = vec![0.0; room.len()];
        for own in &shared {
            sums.iter_mut().zip(of(own)).for_each(|(sum, own)| *sum += own);
        }
        f64::store(&sums, &mut room, 0);
    };
    store(bias, |shared| &shared.bias);
    store(sinks, |shared| &shared.sinks);
    Ok(())
}

/// Gradients that parts have in common; empty without bias or sinks.
#[derive(Clone, Default)]
struct Shared {
    bias: Vec<f64>,
    sinks: Vec<f64>,
}

/// Where the gradients of a part go.
struct PartRooms<'o> {
    q: Rooms<'o>,
    k: Rooms<'o>,
    v: Rooms<'o>,
    attention_bias: Option<SliceMut<'o>>,
}

/// Keys, all or a segment of them, of the key heads that have an attention bias in common: of one where there is none.
struct Task<'o, T> {
    keys: Range<usize>,
    units: Vec<Unit<'o>>,
    /// See [`BiasSums`].
    d_attention_bias: &'o mut [T],
}

/// A key head, with every query that reads it.
struct Unit<'o> {
    batch: usize,
    key_head: usize,
    /// Of the query heads of the group: the gradient itself, or this segment's part of it.
    dq: Vec<SliceMut<'o>>,
    dk: SliceMut<'o>,
    dv: SliceMut<'o>,
    /// Of the group's heads, 2R + 1 each.
    d_bias: &'o mut [f64],
    /// Of the group's heads.
    d_sinks: &'o mut [f64],
}

/// Writes the gradients of q, k, v and the attention bias and returns the others.
fn run<T: Number>(context: &Context<'_, T>, saved: &QuadraticSaved<'_>, gradients: PartRooms<'_>) -> Shared {
    let shapes = context.shapes();
    let has_norm = matches!(context.problem.finish, QuadraticFinish::RmsNorm { .. });
    // How few keys an attention bias leaves is not known.
    let is_exact = !has_norm && context.attention_bias.is_none();
    let is_rounded = !is_exact && saved.out.dtype() != shapes.dtype.accumulator();
    // Where large scores cancel in exp(s − L), those of L must have been summed in the order of these here.
    let is_summed_otherwise = context.problem.weight == Weight::Softmax && decode::suits(context.problem);
    if !is_rounded && !is_summed_otherwise {
        return sweep(context, saved, gradients);
    }
    // What is left of d_out beside a rounded output would be the rounding, where few keys are seen.
    let mut out = Buffer::room(context.problem.output_len());
    let mut statistic = Buffer::room(context.problem.statistic_len());
    let heads = context.shapes().batch * context.shapes().heads;
    let rooms = [&mut out, &mut statistic].map(|all| Rooms::of(T::slice_mut(all), heads));
    let [out_rooms, statistic_rooms] = rooms;
    forward::run(context, Plain, out_rooms, Some(statistic_rooms));
    let out = contiguous(T::slice(&out), &saved.out);
    let statistic = contiguous(T::slice(&statistic), &saved.statistic);
    sweep(context, &QuadraticSaved { out, statistic, ..*saved }, gradients)
}

/// Elements in the shape of another view.
fn contiguous<'a>(elements: Slice<'a>, like: &View<'_>) -> View<'a> {
    View::contiguous(elements, like.dims()).expect("as many elements as the shape has")
}

fn sweep<T: Number>(context: &Context<'_, T>, saved: &QuadraticSaved<'_>, gradients: PartRooms<'_>) -> Shared {
    let shapes = context.shapes();
    let (d, e, group) = (shapes.width, shapes.value_width, context.group());
    let units = shapes.batch * shapes.key_heads;
    let PartRooms { mut q, mut k, mut v, attention_bias } = gradients;
    let lanes = BiasSums::<T>::lanes(context, attention_bias.is_some());
    let segment = shapes.keys.div_ceil(parallel::pieces(lanes.len())).next_multiple_of(TILE).max(TILE);
    let segments = shapes.keys.div_ceil(segment);
    let dq_len = shapes.queries * d;
    let partial_len = if segments > 1 { units * segments * group * dq_len } else { 0 };
    let mut partial_dq = Buffer::zeros(partial_len);
    let mut partials = Rooms::of(T::slice_mut(&mut partial_dq), units);
    let bias_len = shapes.bias.map_or(0, |(_, radius)| group * (2 * radius + 1));
    let mut partial_bias = vec![0.0; units * segments.max(1) * bias_len];
    let mut d_biases: Vec<_> = chunks(&mut partial_bias, segments.max(1) * bias_len, units);
    let mut sinks = vec![0.0; if shapes.sinks.is_some() { shapes.batch * shapes.heads } else { 0 }];
    let mut d_sinks: Vec<_> = chunks(&mut sinks, if shapes.sinks.is_some() { group } else { 0 }, units);
    let mut bias_sums = attention_bias.is_some().then(|| BiasSums::new(context, lanes.len(), segment));
    let mut bias_parts = bias_sums.as_mut().map(BiasSums::parts).unwrap_or_default().into_iter();
    let mut tasks = Vec::new();
    for lane in &lanes {
        for start in (0..shapes.keys.max(1)).step_by(segment) {
            let keys = start..(start + segment).min(shapes.keys);
            let unit = |&unit: &usize| {
                let heads = unit * group..(unit + 1) * group;
                let dq = |head| if segments > 1 { partials.take(unit, dq_len) } else { q.take(head, dq_len) };
                let dq = heads.map(dq).collect();
                let (dk, dv) = (k.take(unit, keys.len() * d), v.take(unit, keys.len() * e));
                let d_bias = d_biases[unit].split_off_mut(..bias_len).unwrap_or_default();
                // The first segment has them.
                let d_sinks = std::mem::take(&mut d_sinks[unit]);
                let (batch, key_head) = (unit / shapes.key_heads, unit % shapes.key_heads);
                Unit { batch, key_head, dq, dk, dv, d_bias, d_sinks }
            };
            let units = lane.iter().map(unit).collect();
            tasks.push(Task { keys, units, d_attention_bias: bias_parts.next().unwrap_or_default() });
        }
    }
    let longest = segment.min(shapes.keys);
    let work = |worker: &mut Worker<T>, task: Task<'_, T>| worker.run(context, saved, task);
    parallel::run_brief(3 * context.nanoseconds(shapes.keys), tasks, || Worker::new(context, longest), work);
    if segments > 1 {
        add_segments(&partial_dq, segments, group, dq_len, q);
    }
    if let (Some(sums), Some(room)) = (bias_sums, attention_bias) {
        sums.store(room);
    }
    let mut shared = Shared { bias: Vec::new(), sinks: vec![0.0; shapes.sinks.map_or(0, |_| shapes.heads)] };
    for (index, x) in sinks.into_iter().enumerate() {
        shared.sinks[index % shapes.heads] += x;
    }
    let Some((heads, radius)) = shapes.bias else { return shared };
    shared.bias = vec![0.0; heads * (2 * radius + 1)];
    for (index, part) in partial_bias.chunks_exact(bias_len).enumerate() {
        let key_head = index / segments.max(1) % shapes.key_heads;
        let first = if heads == 1 { 0 } else { key_head * bias_len };
        let period = if heads == 1 { 2 * radius + 1 } else { bias_len };
        for (i, &x) in part.iter().enumerate() {
            shared.bias[first + i % period] += x;
        }
    }
    shared
}

/// `count` pieces of so many numbers.
fn chunks(mut all: &mut [f64], len: usize, count: usize) -> Vec<&mut [f64]> {
    (0..count).map(|_| all.split_off_mut(..len).unwrap_or_default()).collect()
}

/// Sums the segments' parts of dq in order, head by head: `partials` is [units, segments, group, len].
fn add_segments<T: Number>(partials: &[T], segments: usize, group: usize, len: usize, mut dq: Rooms<'_>) {
    const CHUNK: usize = 1 << 14;
    let mut tasks = Vec::new();
    for (index, unit) in partials.chunks_exact((segments * group * len).max(1)).enumerate() {
        for member in 0..group {
            for start in (0..len).step_by(CHUNK) {
                let count = CHUNK.min(len - start);
                tasks.push((unit, member * len + start, count, dq.take(index * group + member, count)));
            }
        }
    }
    parallel::run(
        tasks,
        || vec![T::ZERO; CHUNK],
        |sums, (unit, start, count, mut dq)| {
            let sums = &mut sums[..count];
            sums.copy_from_slice(&unit[start..start + count]);
            for part in unit.chunks_exact(group * len).skip(1) {
                for (sum, &x) in sums.iter_mut().zip(&part[start..]) {
                    *sum += x;
                }
            }
            T::store(sums, &mut dq, 0);
        },
    );
}

/// One worker's operands and sums, rows padded to whole vectors, with room for the longest segment.
struct Worker<T> {
    /// Keys of the segment as rows, and the transposes of keys and values in panels.
    k: Buffer<T>,
    k_panels: Buffer<T>,
    v_panels: Buffer<T>,
    /// All queries of a head.
    q: Buffer<T>,
    d_out: Buffer<T>,
    statistic: Buffer<T>,
    delta: Buffer<T>,
    /// Whether the keys of a row all lie in one tile; see [`Delta`].
    is_whole: Vec<bool>,
    dq: Buffer<T>,
    dk: Buffer<T>,
    dv: Buffer<T>,
    weights: Buffer<T>,
    d_scores: Buffer<T>,
    tanh: Buffer<T>,
    /// Of dropout.
    factors: Buffer<T>,
}

impl<T: Number> Worker<T> {
    fn new(context: &Context<'_, T>, keys: usize) -> Self {
        let (shapes, verbs) = (context.shapes(), context.verbs);
        let (d, e) = (verbs.padded(shapes.width), verbs.padded(shapes.value_width));
        let zeros = |len| Buffer::zeros(len);
        let scores = BLOCK.min(shapes.queries) * verbs.padded(TILE.min(keys));
        Self {
            k: zeros(keys * d),
            k_panels: zeros(verbs.panels_len(keys, shapes.width)),
            v_panels: zeros(verbs.panels_len(keys, shapes.value_width)),
            q: zeros(shapes.queries * d),
            d_out: zeros(shapes.queries * e),
            statistic: zeros(shapes.queries),
            delta: zeros(shapes.queries),
            is_whole: vec![false; shapes.queries],
            dq: zeros(shapes.queries * d),
            dk: zeros(keys * d),
            dv: zeros(keys * e),
            weights: zeros(scores),
            d_scores: zeros(scores),
            tanh: zeros(if context.problem.soft_cap.is_some() { scores } else { 0 }),
            factors: zeros(if context.problem.dropout.is_some() { scores } else { 0 }),
        }
    }

    fn run(&mut self, context: &Context<'_, T>, saved: &QuadraticSaved<'_>, task: Task<'_, T>) {
        for unit in task.units {
            self.unit(context, saved, &task.keys, unit, task.d_attention_bias);
        }
    }

    fn unit(
        &mut self,
        context: &Context<'_, T>,
        saved: &QuadraticSaved<'_>,
        segment: &Range<usize>,
        mut unit: Unit<'_>,
        d_attention_bias: &mut [T],
    ) {
        let (shapes, verbs, group) = (context.shapes(), context.verbs, context.group());
        let (d, e) = (verbs.padded(shapes.width), verbs.padded(shapes.value_width));
        self.load_keys(context, &unit, segment);
        for member in 0..group {
            let head = unit.key_head * group + member;
            self.load_queries(context, saved, unit.batch, head);
            if let Some(d_sink) = unit.d_sinks.get_mut(member) {
                *d_sink = self.sink_gradient(context, head);
            }
            let bias_len = unit.d_bias.len() / group;
            let mut d_biases = Biases {
                bias: &mut unit.d_bias[member * bias_len..][..bias_len],
                attention_bias: BiasPlane::of(context, d_attention_bias, member, segment),
            };
            for key in segment.clone().step_by(TILE) {
                let keys = key..(key + TILE).min(segment.end);
                let seeing = context.seeing(&keys);
                for query in seeing.clone().step_by(BLOCK) {
                    let place = Place { batch: unit.batch, head, query, key };
                    let rows = BLOCK.min(seeing.end - query);
                    self.tile(context, place, rows, keys.clone(), key - segment.start, &mut d_biases);
                }
            }
            multiply_by(&mut self.dq, context.sign * context.scale(unit.batch));
            store_rows(&self.dq, d, shapes.width, &mut unit.dq[member], 0);
        }
        let (dk, dv) = (&mut self.dk[..segment.len() * d], &self.dv[..segment.len() * e]);
        multiply_by(dk, context.scale(unit.batch));
        store_rows(dk, d, shapes.width, &mut unit.dk, 0);
        store_rows(dv, e, shapes.value_width, &mut unit.dv, 0);
    }

    /// −Σ_i exp(sink − L_i) δ_i over the loaded queries
    fn sink_gradient(&self, context: &Context<'_, T>, head: usize) -> f64 {
        let share = |(&statistic, &delta): (&T, &T)| (context.sink_weight(head, statistic) * delta).to_f64();
        -self.statistic.iter().zip(self.delta.iter()).map(share).sum::<f64>()
    }

    /// Loads the keys and values of the tiles of a segment that some query sees.
    fn load_keys(&mut self, context: &Context<'_, T>, unit: &Unit<'_>, segment: &Range<usize>) {
        let (shapes, verbs, inputs) = (context.shapes(), context.verbs, context.inputs);
        let (d, e) = (verbs.padded(shapes.width), verbs.padded(shapes.value_width));
        let visible = context.visible_to_any();
        let start = (visible.start / TILE * TILE).max(segment.start);
        let (keys, row) = (start..visible.end.min(segment.end), start - segment.start);
        if !keys.is_empty() {
            let k = &mut self.k[row * d..];
            context.load_keys(&inputs.k, unit.batch, unit.key_head, keys.clone(), k, d);
            verbs.transpose(&mut self.k_panels[row * shapes.width..], k, d, keys.len(), shapes.width);
            // The sums of dv hold the values for a moment.
            let v = &mut self.dv[row * e..];
            context.load_keys(&inputs.v, unit.batch, unit.key_head, keys.clone(), v, e);
            verbs.transpose(&mut self.v_panels[row * shapes.value_width..], v, e, keys.len(), shapes.value_width);
        }
        self.dv.fill(T::ZERO);
        self.dk.fill(T::ZERO);
    }

    /// Loads a head's queries and the gradients of its sums.
    fn load_queries(&mut self, context: &Context<'_, T>, saved: &QuadraticSaved<'_>, batch: usize, head: usize) {
        let (shapes, verbs, weight) = (context.shapes(), context.verbs, context.problem.weight);
        let finish = context.finish(batch);
        let (d, e) = (verbs.padded(shapes.width), verbs.padded(shapes.value_width));
        HeadRows::new(&context.inputs.q, batch, head).load(0..shapes.queries, &mut self.q, d);
        multiply_by(&mut self.q, context.sign);
        self.dq.fill(T::ZERO);
        HeadRows::new(&saved.d_out, batch, head).load(0..shapes.queries, &mut self.d_out, e);
        load_statistic(&saved.statistic, batch, head, &mut self.statistic);
        match &saved.d_statistic {
            Some(view) => load_statistic(view, batch, head, &mut self.delta),
            None => self.delta.fill(T::ZERO),
        }
        let out = HeadRows::new(&saved.out, batch, head);
        let mut row = vec![T::ZERO; e];
        for (i, d_row) in self.d_out.chunks_exact_mut(e).enumerate() {
            let d_row = &mut d_row[..shapes.value_width];
            let (kept, count) = context.kept(batch, i);
            // A sink has a share of every tile.
            let is_whole = lies_in_one_tile(&kept) && context.sinks.is_empty();
            let statistic = self.statistic[i];
            self.is_whole[i] = is_whole;
            // ⟨d_out, out⟩ has the error of a rounded output, which few keys do not average away.
            let is_exact = context.takes_mean() && (is_whole || count <= FEW);
            if !is_exact {
                out.load(i..i + 1, &mut row, e);
            }
            let out = (!is_exact).then_some(&row[..shapes.value_width]);
            self.delta[i] = unfinish(weight, finish, d_row, out, statistic, self.delta[i]);
            if is_exact && !is_whole {
                let at = Place { batch, head, query: i, key: kept.start };
                self.delta[i] += context.mean_gradient(at, kept, &self.q[i * d..], d_row, statistic);
            }
        }
    }

    /// The five products of a tile of queries and keys; `row` is the first key's row in the segment.
    fn tile(
        &mut self,
        context: &Context<'_, T>,
        place: Place,
        rows: usize,
        keys: Range<usize>,
        row: usize,
        d_biases: &mut Biases<'_, T>,
    ) {
        let (shapes, verbs) = (context.shapes(), context.verbs);
        let (d, e) = (verbs.padded(shapes.width), verbs.padded(shapes.value_width));
        let mut bounds = [(0, 0); BLOCK];
        let mut offset = i64::MIN;
        for (r, bounds) in bounds[..rows].iter_mut().enumerate() {
            *bounds = context.bounds(place.query + r, &keys);
            if bounds.0 < bounds.1 {
                offset = offset.max(bounds.1 as i64 - r as i64);
            }
        }
        if offset == i64::MIN {
            return;
        }
        let bounds = &bounds[..rows];
        let width = verbs.padded(keys.len());
        let queries = place.query * d..;
        let (q, d_out) = (&self.q[queries.clone()], &self.d_out[place.query * e..]);
        let weights = &mut self.weights[..rows * width];
        let d_scores = &mut self.d_scores[..rows * width];
        let across = |k| Product { m: rows, n: width, k, accumulate: false, band: Band::Result(offset) };
        let k_panels = verbs.panels(&self.k_panels[row * shapes.width..], shapes.width);
        verbs.multiply(weights, width, Left::rows(q, d), k_panels, across(shapes.width));
        let v_panels = verbs.panels(&self.v_panels[row * shapes.value_width..], shapes.value_width);
        verbs.multiply(d_scores, width, Left::rows(d_out, e), v_panels, across(shapes.value_width));
        let tanh = context.problem.soft_cap.is_some().then(|| &mut self.tanh[..rows * width]);
        let scale = context.adjust(place, weights, width, bounds, tanh);
        let is_dropped = context.dropout(place, &mut self.factors, width, bounds);
        let factors = if is_dropped { &self.factors[..rows * width] } else { &[] };
        if is_dropped {
            verbs.multiply_elements(d_scores, factors);
        }
        let statistic = &self.statistic[place.query..];
        let (delta, is_whole) = (&self.delta[place.query..], &self.is_whole[place.query..]);
        let delta = Delta { delta, is_whole, epsilon: context.epsilon() };
        match context.problem.weight {
            Weight::Softmax => verbs.softmax_gradient(weights, d_scores, width, bounds, scale, statistic, delta),
            _ => verbs.relu_gradient(weights, d_scores, width, bounds, scale, context.squared(), delta),
        }
        add_bias_gradient(context, place, d_scores, width, bounds, d_biases.bias);
        d_biases.attention_bias.add(place, d_scores, width, keys.len());
        if context.problem.soft_cap.is_some() {
            for (d, &t) in d_scores.iter_mut().zip(self.tanh.iter()) {
                *d = *d * (T::ONE - t * t);
            }
        }
        if is_dropped {
            verbs.multiply_elements(weights, factors);
        }
        let down = |n| Product { m: keys.len(), n, k: rows, accumulate: true, band: Band::Transposed(offset) };
        let (dv, dk) = (&mut self.dv[row * e..], &mut self.dk[row * d..]);
        verbs.multiply(dv, e, Left::transposed(weights, width), verbs.rows(d_out, e), down(e));
        verbs.multiply(dk, d, Left::transposed(d_scores, width), verbs.rows(q, d), down(d));
        let size = Product { m: rows, n: d, k: keys.len(), accumulate: true, band: Band::Left(offset) };
        let k = verbs.rows(&self.k[row * d..], d);
        verbs.multiply(&mut self.dq[queries], d, Left::rows(d_scores, width), k, size);
    }
}

/// Gradients of the biases of a head, in the sums of a segment.
struct Biases<'a, T> {
    /// 2R + 1, or nothing
    bias: &'a mut [f64],
    attention_bias: BiasPlane<'a, T>,
}

/// Whether keys lie in one of the tiles, which start at multiples of their size.
fn lies_in_one_tile(keys: &Range<usize>) -> bool {
    keys.is_empty() || keys.start / TILE == (keys.end - 1) / TILE
}

fn load_statistic<T: Number>(view: &View<'_>, batch: usize, head: usize, into: &mut [T]) {
    let strides = view.strides();
    T::load(view.data(), batch * strides[0] + head * strides[1], into);
}

fn add_bias_gradient<T: Number>(
    context: &Context<'_, T>,
    at: Place,
    d_scores: &[T],
    width: usize,
    bounds: &[Bounds],
    d_bias: &mut [f64],
) {
    if d_bias.is_empty() {
        return;
    }
    for (r, (row, &(low, high))) in d_scores.chunks_exact(width).zip(bounds).enumerate() {
        if low < high {
            let start = context.bias_index(at.query + r, at.key + low);
            for (sum, &d) in d_bias[start..].iter_mut().zip(&row[low..high]) {
                *sum += d.to_f64();
            }
        }
    }
}
