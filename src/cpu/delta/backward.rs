//! Gradients, chunk by chunk from the end: states are rebuilt from a few that are kept, the gradient of the state is
//! carried along.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rooms::Rooms;
use super::super::rows::{Number, store_rows};
use super::super::tile::Verbs;
use super::super::{dispatch, parallel};
use super::chunk::Chunk;
use super::gradient::ChunkGradient;
use super::{CHUNK, Context, DeltaGradients, DeltaInputs, DeltaSaved, SEGMENT, StateHead, check};
use crate::Result;
use crate::problem::{self, Delta, DeltaDecay, RankOne, SliceMut};

/// Computes the gradients of all operands, and of the state handed in, from those of the output and of the last state.
///
/// # Errors
/// Operands that do not match the problem; gradients of another length or dtype.
pub fn backward(
    problem: &Delta,
    inputs: &DeltaInputs<'_>,
    saved: &DeltaSaved<'_>,
    gradients: DeltaGradients<'_>,
) -> Result<()> {
    check(problem, inputs)?;
    saved.check(problem)?;
    gradients.check(problem)?;
    let parts = problem.parts().zip(rooms(problem, gradients));
    let calls = parts.map(|((part, problem), rooms)| (problem, inputs.part(&part), saved.part(&part), rooms));
    parallel::run_calls(
        calls.collect(),
        |(problem, ..)| problem.shapes.tokens,
        |isa, (problem, inputs, saved, rooms)| {
            dispatch!(problem.shapes.dtype, T => {
                run::<T>(&Context::new(&problem, &inputs, Verbs::<T>::get(isa)), &saved, rooms);
            });
        },
    );
    Ok(())
}

/// Room for the gradients of each part.
fn rooms<'o>(problem: &Delta, gradients: DeltaGradients<'o>) -> Vec<problem::DeltaGradients<Rooms<'o>>> {
    let shapes = &problem.shapes;
    let tokens: Vec<usize> = shapes.parts().map(|(part, _)| part.queries.len()).collect();
    let cut = |all, heads, width| Rooms::of(all, shapes.batch * heads).cut(tokens.iter().map(|rows| rows * width));
    let DeltaGradients { q, k, v, rank_one, log_decay, state } = gradients;
    let states = shapes.states() * shapes.state_heads();
    let decay_width = if shapes.decay == DeltaDecay::Channel { shapes.width } else { 1 };
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
    let mut log_decay = log_decay.map(|all| cut(all, shapes.state_heads(), decay_width).into_iter());
    let mut state = state.map(|all| Rooms::of(all, states).share(tokens.len()));
    let mut part = || {
        let rank_one = match &mut rank_one {
            RankOne::None => RankOne::None,
            RankOne::Rule { beta } => RankOne::Rule { beta: beta.next()? },
            RankOne::Free { a, b } => RankOne::Free { a: a.next()?, b: b.next()? },
        };
        let log_decay = log_decay.as_mut().and_then(Iterator::next);
        let state = state.as_mut().and_then(Iterator::next);
        Some(problem::DeltaGradients { q: q.next()?, k: k.next()?, v: v.next()?, rank_one, log_decay, state })
    };
    std::iter::from_fn(&mut part).collect()
}

/// State heads that share operands.
struct Task<'o> {
    batch: usize,
    heads: Range<usize>,
    rooms: problem::DeltaGradients<Vec<SliceMut<'o>>>,
}

fn run<T: Number>(context: &Context<'_, T>, saved: &DeltaSaved<'_>, rooms: problem::DeltaGradients<Rooms<'_>>) {
    let shapes = context.shapes();
    let groups = common_divisor(common_divisor(shapes.query_heads, shapes.key_heads), shapes.value_heads);
    let (count, heads) = (shapes.batch * groups, shapes.state_heads() / groups);
    let problem::DeltaGradients { q, k, v, rank_one, log_decay, state } = rooms;
    let each = |rooms| shares(rooms, count);
    let (mut q, mut k, mut v) = (each(q), each(k), each(v));
    let mut rank_one = rank_one.map(each);
    let (mut log_decay, mut state) = (log_decay.map(each), state.map(each));
    let next = |list: &mut std::vec::IntoIter<Vec<_>>| list.next().unwrap_or_default();
    let tasks = (0..count).map(|index| Task {
        batch: index / groups,
        heads: index % groups * heads..(index % groups + 1) * heads,
        rooms: problem::DeltaGradients {
            q: next(&mut q),
            k: next(&mut k),
            v: next(&mut v),
            rank_one: match &mut rank_one {
                RankOne::None => RankOne::None,
                RankOne::Rule { beta } => RankOne::Rule { beta: next(beta) },
                RankOne::Free { a, b } => RankOne::Free { a: next(a), b: next(b) },
            },
            log_decay: log_decay.as_mut().map(next),
            state: state.as_mut().map(next),
        },
    });
    let tasks = tasks.collect();
    parallel::run(tasks, || Worker::new(context, heads), |worker, task| worker.run(context, saved, task));
}

/// The heads of each of so many tasks.
fn shares<'o>(rooms: Rooms<'o>, count: usize) -> std::vec::IntoIter<Vec<SliceMut<'o>>> {
    rooms.share(count).map(Rooms::into_heads).collect::<Vec<_>>().into_iter()
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// Gradients of a segment's rows of an operand, for some heads that are added to by several state heads.
struct Sums<T> {
    heads: Vec<Buffer<T>>,
    padded: usize,
    width: usize,
}

impl<T: Number> Sums<T> {
    fn new(context: &Context<'_, T>, heads: usize, width: usize) -> Self {
        let padded = context.verbs.padded(width);
        Self { heads: (0..heads).map(|_| Buffer::zeros(SEGMENT * padded)).collect(), padded, width }
    }

    fn clear(&mut self) {
        self.heads.iter_mut().for_each(|head| head.fill(T::ZERO));
    }

    /// Rows of the head that `index` of `count` heads share.
    fn rows(&mut self, index: usize, count: usize, rows: Range<usize>) -> &mut [T] {
        let head = index * self.heads.len() / count;
        &mut self.heads[head][rows.start * self.padded..rows.end * self.padded]
    }

    fn store(&self, rooms: &mut [SliceMut<'_>], segment: &Range<usize>) {
        for (head, room) in self.heads.iter().zip(rooms) {
            store_rows(&head[..segment.len() * self.padded], self.padded, self.width, room, segment.start);
        }
    }
}

struct Worker<T> {
    chunk: Chunk<T>,
    gradient: ChunkGradient<T>,
    /// Of each chunk of a segment, at its start.
    states: Vec<Buffer<T>>,
    /// Per state head.
    d_states: Vec<Buffer<T>>,
    q: Sums<T>,
    k: Sums<T>,
    v: Sums<T>,
    rank_one: RankOne<Sums<T>>,
}

impl<T: Number> Worker<T> {
    fn new(context: &Context<'_, T>, heads: usize) -> Self {
        let shapes = context.shapes();
        let sums = |count: usize, width| Sums::new(context, count * heads / shapes.state_heads(), width);
        let keys = || sums(shapes.key_heads, shapes.width);
        let state = || Buffer::zeros(context.state_len());
        let chunk = Chunk::new(context);
        Self {
            gradient: ChunkGradient::new(context, &chunk),
            chunk,
            states: (0..SEGMENT / CHUNK).map(|_| state()).collect(),
            d_states: (0..heads).map(|_| state()).collect(),
            q: sums(shapes.query_heads, shapes.width),
            k: keys(),
            v: sums(shapes.value_heads, shapes.value_width),
            rank_one: match shapes.rank_one {
                RankOne::Free { .. } => RankOne::Free { a: keys(), b: keys() },
                _ => RankOne::None,
            },
        }
    }

    fn run(&mut self, context: &Context<'_, T>, saved: &DeltaSaved<'_>, mut task: Task<'_>) {
        let ((_, e), shapes) = (context.padded(), context.shapes());
        let at = |head| StateHead { batch: task.batch, head };
        let segments: Vec<Range<usize>> = (0..shapes.tokens.max(1))
            .step_by(SEGMENT)
            .map(|start| start..(start + SEGMENT).min(shapes.tokens))
            .collect();
        let starts: Vec<Vec<Buffer<T>>> =
            task.heads.clone().map(|head| self.segment_starts(context, at(head), &segments)).collect();
        for (d_state, head) in self.d_states.iter_mut().zip(task.heads.clone()) {
            context.load_state(saved.d_state.as_ref(), at(head), d_state);
        }
        for (index, segment) in segments.iter().enumerate().rev() {
            [&mut self.q, &mut self.k, &mut self.v].into_iter().for_each(Sums::clear);
            if let RankOne::Free { a, b } = &mut self.rank_one {
                [a, b].into_iter().for_each(Sums::clear);
            }
            for (own, starts) in starts.iter().enumerate() {
                self.segment(context, saved, &mut task, own, (segment, &starts[index]));
            }
            self.q.store(&mut task.rooms.q, segment);
            self.k.store(&mut task.rooms.k, segment);
            self.v.store(&mut task.rooms.v, segment);
            if let (RankOne::Free { a, b }, RankOne::Free { a: room_a, b: room_b }) =
                (&self.rank_one, &mut task.rooms.rank_one)
            {
                a.store(room_a, segment);
                b.store(room_b, segment);
            }
        }
        for (room, d_state) in task.rooms.state.iter_mut().flatten().zip(&self.d_states) {
            store_rows(d_state, e, shapes.value_width, room, 0);
        }
    }

    /// Moves a state over some tokens.
    fn advance(&mut self, context: &Context<'_, T>, at: StateHead, tokens: Range<usize>, state: &mut [T]) {
        self.chunk.load(context, at, tokens, false);
        self.chunk.solve(context, state);
        self.chunk.step(context, state);
    }

    /// The states at the start of each segment.
    fn segment_starts(&mut self, context: &Context<'_, T>, at: StateHead, segments: &[Range<usize>]) -> Vec<Buffer<T>> {
        let mut state = Buffer::zeros(context.state_len());
        context.load_state(context.inputs.state.as_ref(), at, &mut state);
        let mut starts = vec![state.clone()];
        for segment in &segments[..segments.len() - 1] {
            for tokens in chunks(segment) {
                self.advance(context, at, tokens, &mut state);
            }
            starts.push(state.clone());
        }
        starts
    }

    /// Adds the gradients that one of the task's state heads gives in a segment.
    fn segment(
        &mut self,
        context: &Context<'_, T>,
        saved: &DeltaSaved<'_>,
        task: &mut Task<'_>,
        own: usize,
        (segment, start): (&Range<usize>, &Buffer<T>),
    ) {
        let at = StateHead { batch: task.batch, head: task.heads.start + own };
        let chunks: Vec<Range<usize>> = chunks(segment).collect();
        if chunks.is_empty() {
            return;
        }
        let mut states = std::mem::take(&mut self.states);
        states[0].clone_from(start);
        for (index, tokens) in chunks[..chunks.len() - 1].iter().enumerate() {
            let (before, behind) = states.split_at_mut(index + 1);
            behind[0].copy_from_slice(&before[index]);
            self.advance(context, at, tokens.clone(), &mut behind[0]);
        }
        for (tokens, state) in chunks.iter().zip(&states).rev() {
            self.chunk.load(context, at, tokens.clone(), true);
            self.chunk.solve(context, state);
            let (e, readers) = (context.padded().1, context.readers());
            for (reader, d_out) in self.gradient.d_out[..readers].iter_mut().enumerate() {
                let head = at.head * readers + reader;
                super::HeadRows::new(&saved.d_out, at.batch, head).load(tokens.clone(), d_out, e);
            }
            self.gradient.run(context, &mut self.chunk, state, &mut self.d_states[own]);
            self.hand_out(context, task, own, tokens, segment.start);
        }
        self.states = states;
    }

    /// Adds a chunk's gradients to those of the operands.
    fn hand_out(
        &mut self,
        context: &Context<'_, T>,
        task: &mut Task<'_>,
        own: usize,
        tokens: &Range<usize>,
        first: usize,
    ) {
        let Self { chunk, gradient, q, k, v, rank_one, .. } = self;
        let (verbs, (d, e), readers) = (context.verbs, context.padded(), context.readers());
        let (len, heads) = (tokens.len() * d, task.heads.len());
        let at = tokens.start - first..tokens.end - first;
        for reader in 0..readers {
            let d_rows = &mut gradient.reads[reader][..len];
            normalized(
                context,
                &chunk.reads[reader].rows[..len],
                d_rows,
                &chunk.factors[reader],
                context.problem.scale,
            );
            add(verbs, q.rows(own * readers + reader, heads * readers, at.clone()), d_rows);
        }
        let mut kept = [T::ONE; CHUNK];
        for (kept, token) in kept.iter_mut().zip(tokens.clone()) {
            *kept = if context.keeps(task.batch, token) { T::ONE } else { T::ZERO };
        }
        let d_values = &mut gradient.values.last_mut().expect("at least one")[..tokens.len() * e];
        verbs.scale_rows(d_values, e, &kept);
        add(verbs, v.rows(own, heads, at.clone()), d_values);
        gradient.reads[readers..].iter_mut().chain(&mut gradient.sources).for_each(|rows| {
            verbs.scale_rows(&mut rows[..len], d, &kept);
        });
        let keys = match (&mut *rank_one, &mut task.rooms.rank_one) {
            (RankOne::Free { a, b }, _) => {
                add(verbs, a.rows(own, heads, at.clone()), &gradient.sources[0][..len]);
                add(verbs, b.rows(own, heads, at.clone()), &gradient.reads[readers][..len]);
                (&mut gradient.sources[1], &chunk.sources[1].rows)
            }
            (_, RankOne::Rule { beta }) => {
                // a is β k, b is k.
                let mut d_beta = [T::ZERO; CHUNK];
                let (keys, d_keys) = (&chunk.reads[readers].rows, &mut gradient.reads[readers]);
                let d_beta = &mut d_beta[..tokens.len()];
                verbs.row_pair_products(&gradient.sources[0][..len], &keys[..len], d, d_beta);
                T::store(d_beta, &mut beta[own], tokens.start);
                verbs.add_scaled(&mut d_keys[..len], &gradient.sources[0], d, &chunk.beta);
                (d_keys, keys)
            }
            _ => (&mut gradient.sources[0], &chunk.sources[0].rows),
        };
        let (d_keys, keys) = (&mut keys.0[..len], &keys.1[..len]);
        normalized(context, keys, d_keys, &chunk.factors[readers], 1.0);
        add(verbs, k.rows(own, heads, at), d_keys);
        let Some(room) = &mut task.rooms.log_decay else { return };
        if context.shapes().decay == DeltaDecay::Channel {
            let rows = &mut gradient.log_decay[..len];
            verbs.scale_rows(rows, d, &kept);
            store_rows(rows, d, context.shapes().width, &mut room[own], tokens.start);
        } else {
            let rows = &mut gradient.log_decay[..tokens.len()];
            rows.iter_mut().zip(kept).for_each(|(x, kept)| *x = *x * kept);
            T::store(rows, &mut room[own], tokens.start);
        }
    }
}

fn add<T: Number>(verbs: &Verbs<T>, to: &mut [T], rows: &[T]) {
    let width = to.len();
    verbs.add_outer(to, width, &[T::ONE], rows);
}

fn chunks(segment: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = segment.end;
    segment.clone().step_by(CHUNK).map(move |start| start..(start + CHUNK).min(end))
}

/// Gradients of rows that were multiplied with `factors`, which hold their norms if the problem has it so, and `scale`.
fn normalized<T: Number>(context: &Context<'_, T>, rows: &[T], d_rows: &mut [T], factors: &[T], scale: f64) {
    let (verbs, (d, _)) = (context.verbs, context.padded());
    if context.problem.normalize.is_some() && scale != 0.0 {
        let mut products = [T::ZERO; CHUNK];
        verbs.row_pair_products(rows, d_rows, d, &mut products);
        let inverse = T::from_f64(-1.0 / (scale * scale));
        products.iter_mut().for_each(|product| *product = *product * inverse);
        verbs.add_scaled(d_rows, rows, d, &products);
    }
    verbs.scale_rows(d_rows, d, factors);
}
