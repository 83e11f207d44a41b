//! Sums of segments for the backward pass, S as its transpose, and their gradients.

use std::ops::Range;

use super::super::parallel;
use super::super::rows::Number;
use super::super::tile::{Band, Left, Product};
use super::d_sums::Statistics;
use super::segments::{add_up, head_at, states_after};
use super::sweeps::{Sweep, Worker};
use super::tiles::{KeyTile, State, StateHead};
use super::{Context, LinearSaved, TILE};

/// S ← e^{G_C} S + (φ(k) e^{G_C−G})ᵀ v, transposed, and z.
pub fn absorb_keys<T: Number>(context: &Context<'_, T>, state: &mut State<T>, keys: &mut KeyTile<T>, rows: usize) {
    let (features, e) = context.padded();
    state.shrink(keys);
    if keys.decays {
        keys.scale_to_end(context, rows);
    }
    let phi = &keys.phi[..rows * features];
    let size = Product { m: context.shapes().value_width, n: features, k: rows, accumulate: true, band: Band::Full };
    let right = context.verbs.rows(phi, features);
    context.verbs.multiply(&mut state.s, features, Left::transposed(&keys.v, e), right, size);
    if context.normalizes() {
        context.verbs.add_rows(&mut state.z, phi, features, &[T::ONE; TILE]);
    }
}

/// Adds all keys of a segment to a state whose S is transposed.
pub fn absorb_segment_transposed<T: Number>(
    context: &Context<'_, T>,
    at: StateHead,
    segment: &Range<usize>,
    keys: &mut KeyTile<T>,
    state: &mut State<T>,
) {
    for tile in context.tiles(segment.clone()) {
        keys.load(context, at, &tile, &mut state.stabilizer);
        absorb_keys(context, state, keys, tile.len());
    }
}

/// Sums after each segment of each state head, transposed: `[head][segment]`.
pub fn states<T: Number>(context: &Context<'_, T>, segments: &[Range<usize>]) -> Vec<Vec<State<T>>> {
    let begin: [&(dyn Fn(StateHead) -> State<T> + Sync); 2] =
        [&|at| State::initial_transposed(context, at), &|_| State::zero_transposed(context)];
    states_after(
        context,
        segments,
        begin,
        || KeyTile::new(context),
        |keys, at, segment, state| absorb_segment_transposed(context, at, segment, keys, state),
    )
}

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
    let mut sums: Vec<Vec<State<T>>> =
        states.iter().map(|_| read.iter().map(|_| State::zero(context)).collect()).collect();
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
            worker.collect_queries(&sweep, stabilizer);
            d_state.clone_from(&worker.after.own);
        },
    );
    for d_states in &mut sums {
        if context.is_full() {
            add_up(d_states);
        } else {
            d_states.reverse();
            add_up(d_states);
            d_states.reverse();
        }
    }
    sums
}
