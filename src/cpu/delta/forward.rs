//! Outputs, chunk by chunk.

use super::super::buffer::Buffer;
use super::super::rooms::Rooms;
use super::super::rows::{Number, store_rows};
use super::super::tile::Verbs;
use super::super::{dispatch, parallel};
use super::chunk::Chunk;
use super::{CHUNK, Context, DeltaInputs, DeltaOutputs, StateHead, check};
use crate::Result;
use crate::problem::{self, Delta, SliceMut};

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
        |isa, (problem, inputs, outputs)| {
            dispatch!(problem.shapes.dtype, T => {
                run::<T>(&Context::new(&problem, &inputs, Verbs::<T>::get(isa)), outputs);
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

/// A state head with the output heads that read it.
struct Task<'o> {
    at: StateHead,
    out: Vec<SliceMut<'o>>,
    state: Option<SliceMut<'o>>,
}

fn run<T: Number>(context: &Context<'_, T>, outputs: problem::DeltaOutputs<Rooms<'_>>) {
    let (shapes, readers) = (context.shapes(), context.readers());
    let problem::DeltaOutputs { mut out, mut state } = outputs;
    let heads = shapes.batch * shapes.state_heads();
    let rows = shapes.tokens * shapes.value_width;
    let tasks: Vec<_> = (0..heads)
        .map(|index| Task {
            at: StateHead { batch: index / shapes.state_heads(), head: index % shapes.state_heads() },
            out: (index * readers..(index + 1) * readers).map(|head| out.take(head, rows)).collect(),
            state: state.as_mut().map(|state| state.take(index, shapes.width * shapes.value_width)),
        })
        .collect();
    // The delta rule takes about a seventh of a nanosecond for a number of the state and a token (AVX-512).
    let nanoseconds = heads * shapes.tokens * shapes.width * shapes.value_width / 7;
    parallel::run_brief(nanoseconds, tasks, || Worker::new(context), |worker, task| worker.run(context, task));
}

struct Worker<T> {
    chunk: Chunk<T>,
    state: Buffer<T>,
    out: Buffer<T>,
}

impl<T: Number> Worker<T> {
    fn new(context: &Context<'_, T>) -> Self {
        let (_, e) = context.padded();
        Self { chunk: Chunk::new(context), state: Buffer::zeros(context.state_len()), out: Buffer::zeros(CHUNK * e) }
    }

    fn run(&mut self, context: &Context<'_, T>, mut task: Task<'_>) {
        let ((_, e), shapes) = (context.padded(), context.shapes());
        context.load_state(context.inputs.state.as_ref(), task.at, &mut self.state);
        for start in (0..shapes.tokens).step_by(CHUNK) {
            let rows = CHUNK.min(shapes.tokens - start);
            self.chunk.load(context, task.at, start..start + rows, true);
            self.chunk.solve(context, &self.state);
            for (reader, out) in task.out.iter_mut().enumerate() {
                self.chunk.read(context, reader, &self.state, &mut self.out);
                store_rows(&self.out[..rows * e], e, shapes.value_width, out, start);
            }
            self.chunk.step(context, &mut self.state);
        }
        if let Some(state) = &mut task.state {
            store_rows(&self.state, e, shapes.value_width, state, 0);
        }
    }
}
