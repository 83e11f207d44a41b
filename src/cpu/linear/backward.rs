//! Gradients in two sweeps over the tiles: forward in time for dq, with S rebuilt on the way, and backward in time
//! for dk and dv, with the gradient R of S carried along.

use std::ops::Range;

use super::super::rooms::Rooms;
use super::super::rows::Number;
use super::super::tile::Verbs;
use super::super::{dispatch, parallel};
use super::d_states::d_states;
use super::d_sums::Statistics;
use super::gradients::Gradient;
use super::segments::{cut, next_pieces, span, states};
use super::state::Order;
use super::sweeps::{Around, Sweep, Worker};
use super::tiles::StateHead;
use super::{Context, LinearGradients, LinearInputs, LinearSaved, check};
use crate::Result;
use crate::problem::{self, Linear, Part, SliceMut, StateMut};

/// Computes the gradients of q, k, v and, on demand, of the log-decay per token and of the state handed in.
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
    gradients.check(problem, inputs)?;
    let parts = problem.parts().zip(rooms(problem, gradients));
    let calls = parts.map(|((part, problem), rooms)| (problem, inputs.part(&part), saved.part(&part), rooms));
    parallel::run_calls(
        calls.collect(),
        |(problem, ..)| problem.shapes.keys,
        |isa, (problem, inputs, saved, rooms)| {
            dispatch!(problem.shapes.dtype, T => {
                let context = Context::new(&problem, &inputs, Verbs::<T>::get(isa));
                run::<T>(&Context { ends_in_gradient: saved.d_state.is_some(), ..context }, &saved, rooms);
            });
        },
    );
    Ok(())
}

/// Room for the gradients of each part.
fn rooms<'o>(problem: &Linear, gradients: LinearGradients<'o>) -> Vec<problem::LinearGradients<Rooms<'o>>> {
    let shapes = &problem.shapes;
    let parts: Vec<_> = shapes.parts().collect();
    let of_queries = |(part, _): &(Part, _)| part.queries.len();
    let of_keys = |(part, _): &(Part, _)| part.keys.len();
    let cut = |all, heads, rows: fn(&(Part, _)) -> usize, width| {
        Rooms::of(all, shapes.batch * heads).cut(parts.iter().map(|part| rows(part) * width)).into_iter()
    };
    let LinearGradients { q, k, v, log_decay, state } = gradients;
    let q = cut(q, shapes.query_heads, of_queries, shapes.width);
    let k = cut(k, shapes.key_heads, of_keys, shapes.width);
    let v = cut(v, shapes.value_heads, of_keys, shapes.value_width);
    let mut log_decay = log_decay.map(|log_decay| cut(log_decay, shapes.state_heads(), of_keys, 1));
    let log_decays = std::iter::from_fn(|| Some(log_decay.as_mut().and_then(Iterator::next)));
    let state_heads = shapes.states() * shapes.state_heads();
    let share = |all| Rooms::of(all, state_heads).share(parts.len());
    let mut state = state.map(|problem::StateGradient { s, z }| share(s).zip(share(z)));
    let states = std::iter::from_fn(|| Some(state.as_mut().and_then(Iterator::next)));
    let all = q.zip(k).zip(v).zip(log_decays).zip(states);
    all.map(|((((q, k), v), log_decay), state)| {
        let state = state.map(|(s, z)| problem::StateGradient { s, z });
        problem::LinearGradients { q, k, v, log_decay, state }
    })
    .collect()
}

/// Heads that share operands, at some segments.
pub struct Task<'s, 'o, T> {
    pub batch: usize,
    /// State heads.
    pub heads: Range<usize>,
    pub segments: &'s [Range<usize>],
    /// Per state head.
    around: Vec<Around<'s, T>>,
    /// Per query head, key head and value head.
    dq: Vec<SliceMut<'o>>,
    dk: Vec<SliceMut<'o>>,
    dv: Vec<SliceMut<'o>>,
    /// Per state head, one per key; empty when nobody asks.
    pub d_log: Vec<&'o mut [f64]>,
    /// Per state head, of the state handed in; empty when nobody asks, and behind the first segment.
    d_state: Vec<StateMut<SliceMut<'o>>>,
}

fn run<T: Number>(context: &Context<'_, T>, saved: &LinearSaved<'_>, gradients: problem::LinearGradients<Rooms<'_>>) {
    let shapes = context.shapes();
    let groups = common_divisor(shapes.query_heads, common_divisor(shapes.key_heads, shapes.value_heads));
    let (units, state_heads) = (shapes.batch * groups, shapes.state_heads());
    let segments = context.segments();
    let at_once = context.segments_at_once(segments.len(), units);
    let statistics = Statistics::new(context, saved);
    let (states, d_states) = if at_once < segments.len() {
        let states = states(context, &segments, Order::Transposed);
        let d_states = d_states(context, saved, &statistics, &segments, &states);
        (states, d_states)
    } else {
        (Vec::new(), Vec::new())
    };
    let around = |head: usize, index: usize| {
        let (states, d_states) = (states.get(head).map_or(&[][..], |s| s), d_states.get(head).map_or(&[][..], |s| s));
        if context.is_full() {
            return Around { state: states.last(), d_state: d_states.last(), end: None };
        }
        let state = index.checked_sub(1).and_then(|before| states.get(before));
        Around { state, d_state: d_states.get(index), end: states.get(index) }
    };
    let pieces: Vec<&[Range<usize>]> = segments.chunks(at_once).collect();
    let rows_of =
        |f: &dyn Fn(&Range<usize>) -> Range<usize>| pieces.iter().map(|p| f(&span(p)).len()).collect::<Vec<_>>();
    let (queries, keys) = (rows_of(&|s| context.queries(s)), rows_of(&|s| context.keys(s)));
    let mut dq = cut(gradients.q, &queries, shapes.width);
    let mut dk = cut(gradients.k, &keys, shapes.width);
    let mut dv = cut(gradients.v, &keys, shapes.value_width);
    let wanted = gradients.log_decay.is_some();
    let mut d_log = vec![0.0; if wanted { shapes.batch * state_heads * shapes.keys } else { 0 }];
    let mut d_logs: Vec<&mut [f64]> = d_log.chunks_mut(shapes.keys.max(1)).collect();
    let mut d_state = gradients.state;
    let mut tasks = Vec::new();
    for (index, segments) in pieces.iter().enumerate() {
        for unit in 0..units {
            let of = |heads: usize| unit * heads / groups..(unit + 1) * heads / groups;
            let heads = of(state_heads);
            let batch = unit / groups;
            tasks.push(Task {
                batch,
                heads: heads.start - batch * state_heads..heads.end - batch * state_heads,
                segments,
                around: heads.clone().map(|head| around(head, index)).collect(),
                d_state: match &mut d_state {
                    Some(problem::StateGradient { s, z }) if index == 0 => heads
                        .clone()
                        .map(|head| StateMut {
                            s: s.take(head, context.features.count * shapes.value_width),
                            z: z.take(head, context.features.count),
                            stabilizer: None,
                        })
                        .collect(),
                    _ => Vec::new(),
                },
                dq: next_pieces(&mut dq[of(shapes.query_heads)]),
                dk: next_pieces(&mut dk[of(shapes.key_heads)]),
                dv: next_pieces(&mut dv[of(shapes.value_heads)]),
                d_log: heads.flat_map(|head| d_logs.get_mut(head)?.split_off_mut(..keys[index])).collect(),
            });
        }
    }
    let nanoseconds = 3 * context.nanoseconds();
    parallel::run_brief(
        nanoseconds,
        tasks,
        || Worker::new(context),
        |worker, task| task.run(context, saved, &statistics, worker),
    );
    let log_decays = gradients.log_decay.into_iter().flat_map(Rooms::into_heads);
    for (mut room, d_log) in log_decays.zip(d_log.chunks(shapes.keys.max(1))) {
        f64::store(d_log, &mut room, 0);
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
    fn run<'a>(
        mut self,
        context: &'a Context<'a, T>,
        saved: &'a LinearSaved<'a>,
        statistics: &'a Statistics<T>,
        worker: &mut Worker<'a, T>,
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
            let sweep = Sweep { context, saved, statistics, at, span: span(self.segments) };
            let d_log = self.d_log.get_mut(index).map(|row| &mut **row);
            worker.head(&sweep, self.segments, self.around[index], &mut gradients, d_log);
            if let Some(room) = self.d_state.get_mut(index) {
                worker.first_gradient(&sweep).store(context, room);
            }
        }
        gradients.q.finish();
        gradients.k.finish();
        gradients.v.finish();
    }
}
