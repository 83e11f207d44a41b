//! The gradients of sums of segments.

use std::ops::Range;

use super::super::parallel;
use super::super::rows::Number;
use super::d_sums::Statistics;
use super::segments::{add_up, head_at};
use super::state::{Order, State};
use super::sweeps::{Sweep, Worker};
use super::{Context, LinearSaved};

/// The gradients of S and z that enter each segment of each state head from its end, `[head][segment]`, the last
/// segment left out; with a full scan the last entry is the sum over all queries.
pub fn d_states<T: Number>(
    context: &Context<'_, T>,
    saved: &LinearSaved<'_>,
    statistics: &Statistics<T>,
    segments: &[Range<usize>],
    states: &[Vec<State<T>>],
) -> Vec<Vec<State<T>>> {
    let read = if context.is_full() { segments } else { &segments[1..] };
    // Where the sums that are added up begin.
    let first = if context.is_full() { 0 } else { read.len() - 1 };
    let begin = |head: usize| {
        let at = |n| match n == first {
            true => State::last_gradient(context, saved, head_at(context, head)),
            false => State::zero(context, Order::Plain),
        };
        (0..read.len()).map(at).collect()
    };
    let mut sums: Vec<Vec<State<T>>> = (0..states.len()).map(begin).collect();
    let mut tasks = Vec::new();
    for ((index, d_states), states) in sums.iter_mut().enumerate().zip(states) {
        // Behind segment n of a causal scan begins the n-th of those that are read.
        for ((segment, d_state), state) in read.iter().zip(d_states).zip(states) {
            let sweep = Sweep { context, saved, statistics, at: head_at(context, index), span: segment.clone() };
            tasks.push((sweep, state.stabilizer, d_state));
        }
    }
    parallel::run(
        tasks,
        || Worker::new(context),
        |worker, (sweep, stabilizer, d_state)| {
            worker.collect_queries(&sweep, stabilizer, d_state.clone());
            d_state.clone_from(&worker.after.own);
        },
    );
    for d_states in &mut sums {
        if context.is_full() {
            add_up(context, d_states);
        } else {
            d_states.reverse();
            add_up(context, d_states);
            d_states.reverse();
        }
    }
    sums
}
