//! Outputs, chunk by chunk.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rooms::Rooms;
use super::super::rows::{HeadRows, Number};
use super::super::tile::Verbs;
use super::super::{dispatch, parallel};
use super::chunk::Chunk;
use super::strips::{Kept, Room, Strip, strips, threads};
use super::token::Token;
use super::{CHUNK, Context, DeltaInputs, DeltaOutputs, NANOSECONDS, StateHead, check, share};
use crate::Result;
use crate::problem::{self, Delta, DeltaShapes, SliceMut};

/// Computes the output and, on demand, the state after the last token.
///
/// # Errors
/// Operands that do not match the problem; a log-decay that is NaN or above 0; outputs of another length or dtype.
pub fn forward(problem: &Delta, inputs: &DeltaInputs<'_>, outputs: DeltaOutputs<'_>) -> Result<()> {
    check(problem, inputs)?;
    outputs.check(problem)?;
    let calls = problem.parts().zip(rooms(problem, outputs));
    let calls = calls.map(|((part, problem), outputs)| (problem, inputs.part(&part), outputs));
    parallel::run_calls(
        calls.collect(),
        |(problem, ..)| problem.shapes.tokens,
        |isa, (part, inputs, outputs)| {
            dispatch!(part.shapes.dtype, T => {
                run(&part, &inputs, Verbs::<T>::get(isa), outputs, share(&problem.shapes, &part));
            });
        },
    );
    Ok(())
}

/// Room for the results of each part.
fn rooms<'o>(problem: &Delta, outputs: DeltaOutputs<'o>) -> Vec<problem::DeltaOutputs<Rooms<'o>>> {
    let shapes = &problem.shapes;
    let lens: Vec<usize> = shapes.parts().map(|(part, _)| part.queries.len() * shapes.value_width).collect();
    let DeltaOutputs { out, state } = outputs;
    let states = |state| Rooms::of(state, shapes.states() * shapes.state_heads()).share(lens.len());
    let mut states = state.map(states);
    let outs = Rooms::of(out, shapes.batch * shapes.heads()).cut(lens.iter().copied());
    outs.into_iter().map(|out| problem::DeltaOutputs { out, state: states.as_mut().and_then(Iterator::next) }).collect()
}

/// A strip of columns of a state head with the output heads that read it.
struct Task<'o> {
    strip: usize,
    at: StateHead,
    out: Vec<Room<'o>>,
    state: Option<Room<'o>>,
}

/// Of each strip of each state head, the widest last.
fn tasks<'o>(
    shapes: &DeltaShapes,
    outputs: problem::DeltaOutputs<Rooms<'o>>,
    strips: &[Range<usize>],
) -> Vec<Task<'o>> {
    let readers = shapes.heads() / shapes.state_heads();
    let problem::DeltaOutputs { mut out, mut state } = outputs;
    let cut = |all: SliceMut<'o>, rows| Room::cut(all, rows, strips).into_iter();
    let heads = (0..shapes.batch * shapes.state_heads()).map(|index| {
        let at = StateHead { batch: index / shapes.state_heads(), head: index % shapes.state_heads() };
        let outs = (index * readers..(index + 1) * readers)
            .map(|head| cut(out.take(head, shapes.tokens * shapes.value_width), shapes.tokens));
        let state = state.as_mut().map(|state| state.take(index, shapes.width * shapes.value_width));
        (at, outs.collect::<Vec<_>>(), state.map(|state| cut(state, shapes.width)))
    });
    let mut tasks: Vec<Task<'o>> = heads
        .flat_map(|(at, mut outs, mut state)| {
            (0..strips.len()).map(move |strip| Task {
                strip,
                at,
                out: outs.iter_mut().filter_map(Iterator::next).collect(),
                state: state.as_mut().and_then(Iterator::next),
            })
        })
        .collect();
    tasks.sort_by_key(|task| strips[task.strip].len());
    tasks
}

fn run<T: Number>(
    problem: &Delta,
    inputs: &DeltaInputs<'_>,
    verbs: &'static Verbs<T>,
    outputs: problem::DeltaOutputs<Rooms<'_>>,
    share: usize,
) {
    let shapes = &problem.shapes;
    let heads = shapes.batch * shapes.state_heads();
    let nanoseconds = shapes.tokens * shapes.width * shapes.value_width / NANOSECONDS;
    let ranges = strips(shapes.value_width, threads(heads, nanoseconds, share));
    let tasks = tasks(shapes, outputs, &ranges);
    let strips: Vec<_> = ranges.into_iter().map(|columns| Strip::new(problem, inputs, columns)).collect();
    let contexts: Vec<_> = strips.iter().map(|strip| strip.context(verbs)).collect();
    parallel::run_brief(heads * nanoseconds, tasks, Kept::none, |kept, task| {
        let context = &contexts[task.strip];
        kept.get(context.padded().1, || Worker::new(context)).run(context, task);
    });
}

struct Worker<T> {
    chunk: Chunk<T>,
    state: Buffer<T>,
    out: Buffer<T>,
    token: Token<T>,
}

impl<T: Number> Worker<T> {
    fn new(context: &Context<'_, T>) -> Self {
        let (_, e) = context.padded();
        Self {
            chunk: Chunk::new(context),
            state: Buffer::zeros(context.state_len()),
            out: Buffer::zeros(context.rows() * e),
            token: Token::new(context),
        }
    }

    fn run(&mut self, context: &Context<'_, T>, mut task: Task<'_>) {
        let ((_, e), shapes) = (context.padded(), context.shapes());
        if let (1, Some(state), Some(Room::Whole(room))) = (shapes.tokens, &context.inputs.state, &mut task.state) {
            self.chunk.load(context, task.at, 0..1, true);
            let state = HeadRows::new(state, task.at.batch, task.at.head).stored(0..shapes.width);
            return self.token.run(context, &mut self.chunk, (state, room), &mut task.out);
        }
        context.load_state(context.inputs.state.as_ref(), task.at, &mut self.state);
        for start in (0..shapes.tokens).step_by(CHUNK) {
            let rows = CHUNK.min(shapes.tokens - start);
            self.chunk.load(context, task.at, start..start + rows, true);
            self.chunk.solve(context, &self.state);
            for (reader, out) in task.out.iter_mut().enumerate() {
                self.chunk.read(context, reader, &self.state, &mut self.out);
                out.store(&self.out[..rows * e], e, shapes.value_width, start);
            }
            self.chunk.step(context, &mut self.state);
        }
        if let Some(state) = &mut task.state {
            state.store(&self.state, e, shapes.value_width, 0);
        }
    }
}
