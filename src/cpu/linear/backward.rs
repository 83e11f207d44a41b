//! Gradients in two sweeps over the tiles: forward in time for dq, with S rebuilt on the way, and backward in time
//! for dk and dv, with the gradient R of S carried along.

use std::ops::Range;

use super::super::rows::Number;
use super::super::simd::Isa;
use super::super::tile::Verbs;
use super::super::{check_output, dispatch, parallel};
use super::d_sums::Statistics;
use super::gradients::Gradient;
use super::segments::{cut, entering_states, next_pieces};
use super::sweeps::{Sweep, Worker, entering_gradients};
use super::tiles::{State, StateHead};
use super::{Context, LinearInputs};
use crate::Result;
use crate::problem::{Decay, Linear, LinearShapes, SliceMut, View, ensure_dtype, ensure_shape, ensure_value};

/// What the forward pass left behind, and the gradient of its output.
#[derive(Debug, Clone, Copy)]
pub struct LinearSaved<'a> {
    /// The output [B, H, N, E].
    pub out: View<'a>,
    /// The row statistic, needed when [`Linear::statistic_len`] is above 0: [B, H, N], or [B, N] for a norm over
    /// all heads.
    pub statistic: Option<View<'a>>,
    /// Gradient of the output.
    pub d_out: View<'a>,
}

/// Where the gradients go; each is overwritten.
#[derive(Debug)]
pub struct LinearGradients<'a> {
    /// As q, contiguous.
    pub q: SliceMut<'a>,
    /// As k, contiguous.
    pub k: SliceMut<'a>,
    /// As v, contiguous.
    pub v: SliceMut<'a>,
    /// As the log-decay, which must be per token.
    pub log_decay: Option<SliceMut<'a>>,
}

/// Computes the gradients of q, k, v and of the log-decay per token. A state handed in is taken as constant.
///
/// # Errors
/// Operands that do not match the problem; gradients of another length or dtype.
pub fn backward(
    problem: &Linear,
    inputs: &LinearInputs<'_>,
    saved: &LinearSaved<'_>,
    gradients: LinearGradients<'_>,
) -> Result<()> {
    inputs.check(problem)?;
    check(problem, saved, &gradients)?;
    dispatch!(problem.shapes.dtype, T => {
        run::<T>(&Context::new(problem, inputs, Verbs::<T>::get(Isa::current())), saved, gradients);
    });
    Ok(())
}

fn check(problem: &Linear, saved: &LinearSaved<'_>, gradients: &LinearGradients<'_>) -> Result<()> {
    let (function, shapes) = (problem.function, &problem.shapes);
    let out = [shapes.batch, shapes.heads(), shapes.queries, shapes.value_width].map(Some);
    ensure_shape(function, "out", &saved.out, &out, "[batch, heads, queries, value width]")?;
    ensure_shape(function, "d_out", &saved.d_out, &out, "[batch, heads, queries, value width]")?;
    let len = problem.statistic_len();
    match &saved.statistic {
        None => ensure_value(len == 0, function, "statistic", "missing", "that of the forward pass")?,
        Some(statistic) => {
            let per_head = len == shapes.batch * shapes.heads() * shapes.queries;
            let needs = if per_head { vec![out[0], out[1], out[2]] } else { vec![out[0], out[2]] };
            ensure_shape(function, "statistic", statistic, &needs, "that of the forward pass")?;
            ensure_dtype(function, "statistic", statistic, shapes.dtype.accumulator(), "the dtype of sums")?;
        }
    }
    let LinearShapes { batch, queries, keys, width, value_width, .. } = *shapes;
    let dtype = [shapes.dtype];
    check_output(function, "gradient of q", &gradients.q, batch * shapes.query_heads * queries * width, &dtype)?;
    check_output(function, "gradient of k", &gradients.k, batch * shapes.key_heads * keys * width, &dtype)?;
    check_output(function, "gradient of v", &gradients.v, batch * shapes.value_heads * keys * value_width, &dtype)?;
    if let Some(log_decay) = &gradients.log_decay {
        let given = shapes.decay == Decay::Token;
        ensure_value(given, function, "gradient of log_decay", "asked for", "a log-decay per token")?;
        let (len, dtype) = (batch * shapes.state_heads() * keys, shapes.dtype.accumulator());
        check_output(function, "gradient of log_decay", log_decay, len, &[dtype])?;
    }
    Ok(())
}

/// Heads that share operands, at a segment.
pub struct Task<'s, 'o, T> {
    pub batch: usize,
    /// State heads.
    pub heads: Range<usize>,
    pub segment: &'s Range<usize>,
    /// Per state head the sums entering the segment and the gradients entering it from its end; empty when the
    /// segment is the whole line.
    pub entering: Vec<(&'s State<T>, &'s State<T>)>,
    /// Per query head, key head and value head.
    dq: Vec<SliceMut<'o>>,
    dk: Vec<SliceMut<'o>>,
    dv: Vec<SliceMut<'o>>,
    /// Per state head, one per key: ⟨q, dq⟩ − ⟨k, dk⟩; empty when nobody asks.
    pub d_log: Vec<&'o mut [f64]>,
}

fn run<T: Number>(context: &Context<'_, T>, saved: &LinearSaved<'_>, gradients: LinearGradients<'_>) {
    let shapes = context.shapes();
    let groups = common_divisor(shapes.query_heads, common_divisor(shapes.key_heads, shapes.value_heads));
    let (units, state_heads) = (shapes.batch * groups, shapes.state_heads());
    let segments = context.segments(units);
    let statistics = Statistics::new(context, saved);
    let (states, d_states) = if segments.len() > 1 {
        let states = entering_states(context, &segments);
        let d_states = entering_gradients(context, saved, &statistics, &segments, &states);
        (states, d_states)
    } else {
        (Vec::new(), Vec::new())
    };
    let rows_of = |f: &dyn Fn(&Range<usize>) -> Range<usize>| segments.iter().map(|s| f(s).len()).collect::<Vec<_>>();
    let (queries, keys) = (rows_of(&|s| context.queries(s)), rows_of(&|s| context.keys(s)));
    let mut dq = cut(gradients.q, shapes.batch * shapes.query_heads, &queries, shapes.width);
    let mut dk = cut(gradients.k, shapes.batch * shapes.key_heads, &keys, shapes.width);
    let mut dv = cut(gradients.v, shapes.batch * shapes.value_heads, &keys, shapes.value_width);
    let wanted = gradients.log_decay.is_some();
    let mut d_log = vec![0.0; if wanted { shapes.batch * state_heads * shapes.keys } else { 0 }];
    let mut d_logs: Vec<&mut [f64]> = d_log.chunks_mut(shapes.keys.max(1)).collect();
    let mut tasks = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        for unit in 0..units {
            let of = |heads: usize| unit * heads / groups..(unit + 1) * heads / groups;
            let heads = of(state_heads);
            let batch = unit / groups;
            tasks.push(Task {
                batch,
                heads: heads.start - batch * state_heads..heads.end - batch * state_heads,
                segment,
                entering: heads
                    .clone()
                    .filter(|_| segments.len() > 1)
                    .map(|head| (&states[head][index], &d_states[head][index]))
                    .collect(),
                dq: next_pieces(&mut dq[of(shapes.query_heads)]),
                dk: next_pieces(&mut dk[of(shapes.key_heads)]),
                dv: next_pieces(&mut dv[of(shapes.value_heads)]),
                d_log: heads.flat_map(|head| d_logs.get_mut(head)?.split_off_mut(..keys[index])).collect(),
            });
        }
    }
    parallel::run(tasks, || Worker::new(context), |worker, task| task.run(context, saved, &statistics, worker));
    if let Some(mut log_decay) = gradients.log_decay {
        for row in d_log.chunks_exact_mut(shapes.keys.max(1)) {
            let mut sum = 0.0;
            for x in row.iter_mut().rev() {
                sum += *x;
                *x = sum;
            }
        }
        f64::store(&d_log, &mut log_decay, 0);
    }
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// The gradients of a task.
pub struct Gradients<'o, T> {
    pub q: Gradient<'o, T>,
    pub k: Gradient<'o, T>,
    pub v: Gradient<'o, T>,
}

impl<'o, T: Number> Task<'_, 'o, T> {
    fn run(
        mut self,
        context: &Context<'_, T>,
        saved: &LinearSaved<'_>,
        statistics: &Statistics<T>,
        worker: &mut Worker<T>,
    ) {
        let shapes = context.shapes();
        let state_heads = shapes.state_heads();
        let gradient = |out: Vec<SliceMut<'o>>, heads: usize, readers: usize, width: usize| {
            let first = self.heads.start * heads / state_heads;
            Gradient::new(out, first, width, context.verbs.padded(width), heads < readers)
        };
        let mut gradients = Gradients {
            q: gradient(std::mem::take(&mut self.dq), shapes.query_heads, shapes.heads(), shapes.width),
            k: gradient(std::mem::take(&mut self.dk), shapes.key_heads, state_heads, shapes.width),
            v: gradient(std::mem::take(&mut self.dv), shapes.value_heads, state_heads, shapes.value_width),
        };
        for (index, head) in self.heads.clone().enumerate() {
            let at = StateHead { batch: self.batch, head };
            let sweep = Sweep { context, saved, statistics, at, segment: self.segment };
            let d_log = self.d_log.get_mut(index).map(|row| &mut **row);
            worker.head(&sweep, self.entering.get(index).copied(), &mut gradients, d_log);
        }
        gradients.q.finish();
        gradients.k.finish();
        gradients.v.finish();
    }
}
