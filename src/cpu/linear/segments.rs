//! Sums of segments, and how outputs are cut into segments.

use std::ops::Range;

use super::super::parallel;
use super::super::rooms::Rooms;
use super::super::rows::Number;
use super::Context;
use super::state::{Order, State};
use super::tiles::{KeyTile, StateHead};
use crate::problem::SliceMut;

/// Sums after each segment of each state head, `[head][segment]`: made from empty sums (those of the first segment from
/// the state handed in) and then added up from segment to segment. A causal scan leaves the last out.
pub fn states<T: Number>(context: &Context<'_, T>, segments: &[Range<usize>], order: Order) -> Vec<Vec<State<T>>> {
    let shapes = context.shapes();
    let heads = shapes.batch * shapes.state_heads();
    let read = if context.is_full() { segments } else { &segments[..segments.len() - 1] };
    let stabilizers = largest_exponents(context, read);
    let mut states: Vec<Vec<State<T>>> = (0..heads)
        .map(|head| {
            let at = head_at(context, head);
            let mut stabilizer = T::NEG_INFINITY;
            let begin = |segment: usize| {
                let mut state =
                    if segment == 0 { State::initial(context, at, order) } else { State::zero(context, order) };
                stabilizer = if segment == 0 { state.stabilizer } else { stabilizer };
                state.stabilizer = stabilizer;
                if let Some(own) = stabilizers.get(head) {
                    stabilizer = stabilizer.larger(own[segment]);
                }
                state
            };
            (0..read.len()).map(begin).collect()
        })
        .collect();
    let mut tasks = Vec::new();
    for (head, states) in states.iter_mut().enumerate() {
        tasks.extend(states.iter_mut().zip(read).map(|(state, segment)| (head_at(context, head), segment, state)));
    }
    parallel::run(
        tasks,
        || KeyTile::new(context),
        |keys, (at, segment, state)| state.absorb_segment(context, at, segment, keys),
    );
    for states in &mut states {
        add_up(context, states);
    }
    states
}

/// Replaces each of a line's sums by that of all up to it.
pub fn add_up<T: Number>(context: &Context<'_, T>, states: &mut [State<T>]) {
    for n in 1..states.len() {
        let (before, own) = states.split_at_mut(n);
        let mut all = before[n - 1].clone();
        all.append(context, &own[0]);
        own[0] = all;
    }
}

/// The largest exponent in each segment of each state head, `[head][segment]`; empty without a stabiliser.
fn largest_exponents<T: Number>(context: &Context<'_, T>, segments: &[Range<usize>]) -> Vec<Vec<T>> {
    if !context.problem.map.is_stabilized() {
        return Vec::new();
    }
    let shapes = context.shapes();
    let heads = shapes.batch * shapes.state_heads();
    let mut largest = vec![vec![T::NEG_INFINITY; segments.len()]; heads];
    let mut tasks = Vec::new();
    for (head, largest) in largest.iter_mut().enumerate() {
        tasks.extend(
            largest.iter_mut().zip(segments).map(|(largest, segment)| (head_at(context, head), segment, largest)),
        );
    }
    parallel::run(
        tasks,
        || KeyTile::new(context),
        |keys, (at, segment, largest)| {
            for tile in context.tiles(segment.clone()) {
                keys.load(context, at, &tile, largest);
            }
        },
    );
    largest
}

/// From the start of the first segment to the end of the last.
pub fn span(segments: &[Range<usize>]) -> Range<usize> {
    segments[0].start..segments[segments.len() - 1].end
}

/// The state head with an index over the whole batch.
pub fn head_at<T: Number>(context: &Context<'_, T>, index: usize) -> StateHead {
    let heads = context.shapes().state_heads();
    StateHead { batch: index / heads, head: index % heads }
}

/// Cuts the rows of each head, of `width` numbers: for every head, an iterator over the pieces of the given numbers of
/// rows.
pub fn cut<'o>(out: Rooms<'o>, rows: &[usize], width: usize) -> Vec<std::vec::IntoIter<SliceMut<'o>>> {
    let pieces = |mut head: SliceMut<'o>| rows.iter().map(|rows| head.take(rows * width)).collect::<Vec<_>>();
    out.into_heads().into_iter().map(|head| pieces(head).into_iter()).collect()
}

/// The next piece of each head.
pub fn next_pieces<'o>(heads: &mut [std::vec::IntoIter<SliceMut<'o>>]) -> Vec<SliceMut<'o>> {
    heads.iter_mut().flat_map(Iterator::next).collect()
}
