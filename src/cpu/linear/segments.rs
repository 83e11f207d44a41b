//! Sums of segments, and how outputs are cut into segments.

use std::ops::Range;

use super::super::parallel;
use super::super::rows::Number;
use super::Context;
use super::tiles::{KeyTile, State, StateHead};
use crate::problem::SliceMut;

/// The state entering each segment of each state head, and that after the last: `[head][segment]`. With a full scan,
/// which reads the sum of all keys, every entry is that sum.
pub fn entering_states<T: Number>(context: &Context<'_, T>, segments: &[Range<usize>]) -> Vec<Vec<State<T>>> {
    let shapes = context.shapes();
    let heads = shapes.batch * shapes.state_heads();
    let mut sums: Vec<Vec<State<T>>> =
        (0..heads).map(|_| segments.iter().map(|_| State::zero(context)).collect()).collect();
    let mut tasks = Vec::new();
    for (index, states) in sums.iter_mut().enumerate() {
        tasks.extend(states.iter_mut().zip(segments).map(|(state, segment)| (head_at(context, index), segment, state)));
    }
    parallel::run(
        tasks,
        || KeyTile::new(context),
        |keys, (at, segment, state)| {
            absorb_segment(context, at, segment, keys, state);
        },
    );
    for (index, states) in sums.iter_mut().enumerate() {
        let at = head_at(context, index);
        let mut carried = State::initial(context, at);
        for (state, segment) in states.iter_mut().zip(segments) {
            let keys = context.keys(segment);
            let log_decay = keys.map(|key| context.log_decay(at.batch, at.head, key)).sum();
            let mut next = carried.clone();
            next.append(state, log_decay);
            *state = std::mem::replace(&mut carried, next);
        }
        states.push(carried);
        if context.is_full() {
            let (all, before) = states.split_last_mut().expect("a state was pushed");
            before.iter_mut().for_each(|state| state.clone_from(all));
        }
    }
    sums
}

/// Adds all keys of a segment to a state.
pub fn absorb_segment<T: Number>(
    context: &Context<'_, T>,
    at: StateHead,
    segment: &Range<usize>,
    keys: &mut KeyTile<T>,
    state: &mut State<T>,
) {
    for tile in context.tiles(segment.clone()) {
        keys.load(context, at, &tile, &mut state.stabilizer);
        state.absorb(context, keys, tile.len());
    }
}

/// The state head with an index over the whole batch.
pub fn head_at<T: Number>(context: &Context<'_, T>, index: usize) -> StateHead {
    let heads = context.shapes().state_heads();
    StateHead { batch: index / heads, head: index % heads }
}

/// Cuts an output of `heads` heads with `rows` rows of `width` numbers each: for every head, an iterator over the
/// pieces of the given numbers of rows.
pub fn cut<'o>(
    mut out: SliceMut<'o>,
    heads: usize,
    rows: &[usize],
    width: usize,
) -> Vec<std::vec::IntoIter<SliceMut<'o>>> {
    (0..heads).map(|_| rows.iter().map(|rows| out.take(rows * width)).collect::<Vec<_>>().into_iter()).collect()
}

/// The next piece of each head.
pub fn next_pieces<'o>(heads: &mut [std::vec::IntoIter<SliceMut<'o>>]) -> Vec<SliceMut<'o>> {
    heads.iter_mut().flat_map(Iterator::next).collect()
}
