//! Gradients, chunk by chunk from the end: states are rebuilt from a few that are kept, the gradient of the state is
//! carried along.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rooms::Rooms;
use super::super::rows::{Number, store_rows};
use super::super::tile::Verbs;
use super::super::{dispatch, parallel};
use super::backward_strips::in_strips;
use super::operands::{Group, Operands, Segment};
use super::strips::{blocks, threads};
use super::walk::Walk;
use super::{Context, DeltaGradients, DeltaInputs, DeltaSaved, NANOSECONDS, SEGMENT, check, share};
use crate::Result;
use crate::problem::{self, Delta, DeltaDecay, DeltaShapes, RankOne, SliceMut};

/// Computes the gradients of all operands, and of the state handed in, from those of the output and of the last state.
///
/// # Errors
/// Operands that do not match the problem; gradients of another length or dtype.
pub fn backward(
    problem: &Delta,
    inputs: &DeltaInputs<'_>,
    saved: &DeltaSaved<'_>,
    mut gradients: DeltaGradients<'_>,
) -> Result<()> {
    check(problem, inputs)?;
    saved.check(problem)?;
    gradients.check(problem)?;
    let shapes = &problem.shapes;
    let mut bonus = gradients.bonus.take();
    let part_len = |shapes: &DeltaShapes| bonus.iter().len() * bonus_len(shapes);
    let mut d_bonus = vec![0.0; shapes.parts().map(|(_, shapes)| part_len(&shapes)).sum()];
    let mut rest = &mut d_bonus[..];
    let parts = problem.parts().zip(rooms(problem, gradients));
    let calls = parts.map(|((part, problem), rooms)| {
        let d_bonus = rest.split_off_mut(..part_len(&problem.shapes)).unwrap_or_default();
        (problem, inputs.part(&part), saved.part(&part), (rooms, d_bonus))
    });
    parallel::run_calls(
        calls.collect(),
        |(problem, ..)| problem.shapes.tokens,
        |isa, (part, inputs, saved, rooms)| {
            dispatch!(part.shapes.dtype, T => {
                run::<T>(&Context::new(&part, &inputs, Verbs::<T>::get(isa)), &saved, rooms, share(shapes, &part));
            });
        },
    );
    if let Some(room) = &mut bonus {
        let sum = sum_bonus(shapes, &d_bonus);
        dispatch!(shapes.dtype, T => { store_sum::<T>(&sum, room) });
    }
    Ok(())
}

/// Room for the gradients of each part.
fn rooms<'o>(problem: &Delta, gradients: DeltaGradients<'o>) -> Vec<problem::DeltaGradients<Rooms<'o>>> {
    let shapes = &problem.shapes;
    let tokens: Vec<usize> = shapes.parts().map(|(part, _)| part.queries.len()).collect();
    let cut = |all, heads, width| Rooms::of(all, shapes.batch * heads).cut(tokens.iter().map(|rows| rows * width));
    let DeltaGradients { q, k, v, rank_one, log_decay, state, .. } = gradients;
    let states = shapes.states() * shapes.state_heads();
    let mut q = cut(q, shapes.query_heads, shapes.width).into_iter();
    let mut k = cut(k, shapes.key_heads, shapes.width).into_iter();
    let mut v = cut(v, shapes.value_heads, shapes.value_width).into_iter();
    let mut rank_one = match rank_one {
        RankOne::None => RankOne::None,
        RankOne::Rule { beta } => RankOne::Rule { beta: cut(beta, shapes.state_heads(), 1).into_iter() },
        RankOne::Free { a, b } => {
            let [a, b] = [a, b].map(|all| cut(all, shapes.key_heads, shapes.width).into_iter());
            RankOne::Free { a, b }
        }
    };
    let mut log_decay = log_decay.map(|all| cut(all, shapes.state_heads(), decay_width(shapes)).into_iter());
    let mut state = state.map(|all| Rooms::of(all, states).share(tokens.len()));
    let mut part = || {
        let rank_one = next_rank_one(&mut rank_one)?;
        let log_decay = log_decay.as_mut().and_then(Iterator::next);
        let state = state.as_mut().and_then(Iterator::next);
        let (q, k, v) = (q.next()?, k.next()?, v.next()?);
        Some(problem::DeltaGradients { q, k, v, rank_one, log_decay, bonus: None, state })
    };
    std::iter::from_fn(&mut part).collect()
}

fn next_rank_one<I: Iterator>(rank_one: &mut RankOne<I>) -> Option<RankOne<I::Item>> {
    Some(match rank_one {
        RankOne::None => RankOne::None,
        RankOne::Rule { beta } => RankOne::Rule { beta: beta.next()? },
        RankOne::Free { a, b } => RankOne::Free { a: a.next()?, b: b.next()? },
    })
}

/// Numbers of a token's log-decay.
fn decay_width(shapes: &DeltaShapes) -> usize {
    if shapes.decay == DeltaDecay::Channel { shapes.width } else { 1 }
}

/// A group with its segments, and room for the gradients of its states.
pub struct Task<'o> {
    pub group: Group,
    pub segments: Vec<Segment<'o>>,
    pub state: Vec<SliceMut<'o>>,
}

impl Task<'_> {
    /// The tokens of each segment.
    pub fn tokens(&self) -> Vec<Range<usize>> {
        self.segments.iter().map(|segment| segment.tokens.clone()).collect()
    }
}

fn run<T: Number>(
    context: &Context<'_, T>,
    saved: &DeltaSaved<'_>,
    (rooms, d_bonus): (problem::DeltaGradients<Rooms<'_>>, &mut [f64]),
    share: usize,
) {
    let shapes = context.shapes();
    let tasks = tasks(shapes, rooms, d_bonus);
    // With gradients it takes about five times as long as without.
    let nanoseconds = 4 * shapes.tokens * shapes.width * shapes.value_width / NANOSECONDS;
    if threads(tasks.len(), nanoseconds, share) > 1 && blocks(shapes.value_width).nth(1).is_some() {
        return in_strips(context, saved, tasks);
    }
    let heads = shapes.state_heads() / groups(shapes);
    parallel::run(tasks, || Worker::new(context, heads), |worker, task| worker.run(context, saved, task));
}

/// Of the heads of a batch entry.
fn groups(shapes: &DeltaShapes) -> usize {
    common_divisor(common_divisor(shapes.query_heads, shapes.key_heads), shapes.value_heads)
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

fn segments(tokens: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    (0..tokens.max(1)).step_by(SEGMENT).map(move |start| start..(start + SEGMENT).min(tokens))
}

/// Numbers of what each segment gives to the gradient of the bonus.
fn bonus_len(shapes: &DeltaShapes) -> usize {
    shapes.batch * segments(shapes.tokens).count() * shapes.state_heads() * shapes.width
}

/// The gradient of the bonus, from what the segments give, in order.
fn sum_bonus(shapes: &DeltaShapes, mut segment_sums: &[f64]) -> Vec<f64> {
    let (heads, groups) = (shapes.state_heads() * shapes.width, groups(shapes));
    let mut sum = vec![0.0; heads];
    for (_, part) in shapes.parts() {
        for group in 0..shapes.batch * groups {
            let sum = &mut sum[group % groups * (heads / groups)..][..heads / groups];
            for _ in segments(part.tokens) {
                let own = segment_sums.split_off(..sum.len()).unwrap_or_default();
                sum.iter_mut().zip(own).for_each(|(sum, x)| *sum += x);
            }
        }
    }
    sum
}

fn store_sum<T: Number>(sum: &[f64], room: &mut SliceMut<'_>) {
    let sum: Vec<T> = sum.iter().map(|&x| T::from_f64(x)).collect();
    T::store(&sum, room, 0);
}

/// Groups, with rooms for each of their segments.
fn tasks<'o>(
    shapes: &DeltaShapes,
    rooms: problem::DeltaGradients<Rooms<'o>>,
    mut d_bonus: &'o mut [f64],
) -> Vec<Task<'o>> {
    let groups = groups(shapes);
    let (count, heads) = (shapes.batch * groups, shapes.state_heads() / groups);
    let problem::DeltaGradients { q, k, v, rank_one, log_decay, state, .. } = rooms;
    // Segment by segment, group by group.
    let each = |rooms: Rooms<'o>, width: usize| {
        let cut = move |group: Rooms<'o>| group.cut(segments(shapes.tokens).map(move |tokens| tokens.len() * width));
        rooms.share(count).collect::<Vec<_>>().into_iter().flat_map(cut).map(Rooms::into_heads)
    };
    let (mut q, mut k, mut v) = (each(q, shapes.width), each(k, shapes.width), each(v, shapes.value_width));
    let mut rank_one = match rank_one {
        RankOne::None => RankOne::None,
        RankOne::Rule { beta } => RankOne::Rule { beta: each(beta, 1) },
        RankOne::Free { a, b } => RankOne::Free { a: each(a, shapes.width), b: each(b, shapes.width) },
    };
    let mut log_decay = log_decay.map(|rooms| each(rooms, decay_width(shapes)));
    let mut states = state.map(|rooms| rooms.share(count).map(Rooms::into_heads).collect::<Vec<_>>().into_iter());
    let bonus = d_bonus.len().min(heads * shapes.width);
    let mut segment = |tokens: Range<usize>| Segment {
        tokens,
        q: q.next().unwrap_or_default(),
        k: k.next().unwrap_or_default(),
        v: v.next().unwrap_or_default(),
        rank_one: next_rank_one(&mut rank_one).unwrap_or(RankOne::None),
        log_decay: log_decay.as_mut().and_then(Iterator::next),
        bonus: d_bonus.split_off_mut(..bonus).unwrap_or_default(),
    };
    let mut task = |index: usize| Task {
        group: Group { batch: index / groups, heads: index % groups * heads..(index % groups + 1) * heads },
        segments: segments(shapes.tokens).map(&mut segment).collect(),
        state: states.as_mut().and_then(Iterator::next).unwrap_or_default(),
    };
    (0..count).map(&mut task).collect()
}

/// All columns of a group at once.
struct Worker<T> {
    walk: Walk<T>,
    operands: Operands<T>,
    /// Per state head.
    d_states: Vec<Buffer<T>>,
}

impl<T: Number> Worker<T> {
    fn new(context: &Context<'_, T>, heads: usize) -> Self {
        Self {
            walk: Walk::new(context),
            operands: Operands::new(context, heads),
            d_states: (0..heads).map(|_| Buffer::zeros(context.state_len())).collect(),
        }
    }

    fn run(&mut self, context: &Context<'_, T>, saved: &DeltaSaved<'_>, task: Task<'_>) {
        let Self { walk, operands, d_states } = self;
        let tokens = task.tokens();
        let Task { group, mut segments, mut state } = task;
        let starts: Vec<_> = (0..d_states.len()).map(|own| walk.starts(context, group.at(own), &tokens)).collect();
        for (own, d_state) in d_states.iter_mut().enumerate() {
            context.load_state(saved.d_state.as_ref(), group.at(own), d_state);
        }
        for (index, segment) in segments.iter_mut().enumerate().rev() {
            operands.clear();
            for (own, d_state) in d_states.iter_mut().enumerate() {
                let (at, from) = (group.at(own), (&tokens[index], &starts[own][index]));
                walk.segment(context, &saved.d_out, at, from, d_state, |chunk, gradient, tokens| {
                    gradient.rows(context, chunk, at);
                    operands.add(context, (chunk, gradient), (&group, own), &tokens, segment);
                });
            }
            operands.store(segment);
        }
        for (room, d_state) in state.iter_mut().zip(d_states) {
            store_rows(d_state, context.padded().1, context.shapes().value_width, room, 0);
        }
    }
}
