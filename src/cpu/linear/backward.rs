//! Gradients in two sweeps over the tiles: forward in time for dq, with S rebuilt on the way, and backward in time
//! for dk and dv, with the gradient R of S carried along.

use std::ops::Range;

use super::super::rows::Number;
use super::super::simd::Isa;
use super::super::tile::Verbs;
use super::super::{dispatch, parallel};
use super::d_sums::Statistics;
use super::gradients::Gradient;
use super::segments::{cut, entering_states, head_at, next_pieces};
use super::sweeps::{Sweep, Worker, entering_gradients};
use super::tiles::{State, StateHead};
use super::{Context, LinearGradients, LinearInputs, LinearSaved, check};
use crate::Result;
use crate::problem::{Linear, SliceMut};

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
    check(problem, inputs)?;
    saved.check(problem)?;
    gradients.check(problem)?;
    dispatch!(problem.shapes.dtype, T => {
        run::<T>(&Context::new(problem, inputs, Verbs::<T>::get(Isa::current())), saved, gradients);
    });
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
    /// Per state head, one per key: ⟨q, dq⟩ − ⟨k, dk⟩ of what passes between keys; empty when nobody asks.
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
        for (head, row) in d_log.chunks_exact_mut(shapes.keys.max(1)).enumerate() {
            sum_d_log(context, head_at(context, head), row);
        }
        f64::store(&d_log, &mut log_decay, 0);
    }
}

/// dg_t = Σ_{s ≥ t} (⟨q_s, dq_s⟩ − ⟨k_s, dk_s⟩): exactly 0 where nothing passes, and for a key that is not there.
fn sum_d_log<T: Number>(context: &Context<'_, T>, at: StateHead, d_log: &mut [f64]) {
    let mut sum = 0.0;
    for (key, x) in d_log.iter_mut().enumerate().rev() {
        let passes = T::from_f64(context.log_decay(at.batch, at.head, key).exp()) != T::ZERO;
        sum = if passes { sum + *x } else { 0.0 };
        *x = if context.keeps(at.batch, key) { sum } else { 0.0 };
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
