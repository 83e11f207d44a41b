//! The selective scan: h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t u_t B_t, y_t = C_t h_t + D ⊙ u_t, in memory for some steps at a time.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::elementwise::Element;
use super::super::parallel;
use super::super::tile::{Step, StepGradients, Verbs};
use super::columns::{Columns, ranges};

/// Channels of a task; whole vectors of every instruction set.
const WIDTH: usize = 64;
/// Steps between states that the backward pass keeps.
const SEGMENT: usize = 32;

/// Sizes of a selective scan.
#[derive(Debug, Clone, Copy)]
pub struct SelectiveScan {
    pub batch: usize,
    pub steps: usize,
    pub channels: usize,
    pub states: usize,
}

/// Row-major.
#[derive(Debug, Clone, Copy)]
pub struct SelectiveOperands<'a, T> {
    /// `[batch, steps, channels]`
    pub u: &'a [T],
    /// Δ, as u
    pub delta: &'a [T],
    /// `[channels, states]`
    pub a: &'a [T],
    /// `[batch, steps, states]`
    pub b: &'a [T],
    /// As b
    pub c: &'a [T],
    /// D, `[channels]`
    pub skip: Option<&'a [T]>,
    /// `[batch, channels, states]`
    pub state: Option<&'a [T]>,
}

/// Room for gradients, each in the shape of its operand; those of D and the state also where there are none.
pub struct SelectiveGradients<'o, T> {
    pub u: &'o mut [T],
    pub delta: &'o mut [T],
    pub a: &'o mut [T],
    pub b: &'o mut [T],
    pub c: &'o mut [T],
    pub skip: &'o mut [T],
    pub state: &'o mut [T],
}

impl SelectiveScan {
    fn rows(&self) -> usize {
        self.batch * self.steps
    }

    fn is_empty(&self) -> bool {
        self.rows() == 0 || self.channels == 0
    }

    /// Batch entries and channels of the tasks, in the order of [`Columns::cut`].
    fn tasks(&self) -> Vec<(usize, Range<usize>)> {
        (0..self.batch).flat_map(|batch| ranges(self.channels, WIDTH).map(move |channels| (batch, channels))).collect()
    }

    /// About how long it takes on one thread: one nanosecond for each state and step.
    fn nanoseconds(&self) -> usize {
        self.rows() * self.channels * self.states
    }
}

/// Some channels of a batch entry, with tiles that have a row of [`WIDTH`] channels for each state.
struct Worker<'a, T: 'static> {
    scan: SelectiveScan,
    operands: SelectiveOperands<'a, T>,
    verbs: &'static Verbs<T>,
    a: Buffer<T>,
    h: Buffer<T>,
}

impl<'a, T: Element> Worker<'a, T> {
    fn new(scan: SelectiveScan, operands: SelectiveOperands<'a, T>, verbs: &'static Verbs<T>) -> Self {
        let tile = || Buffer::zeros(scan.states * WIDTH);
        Self { scan, operands, verbs, a: tile(), h: tile() }
    }

    /// Brings A and the first state.
    fn begin(&mut self, batch: usize, channels: &Range<usize>) {
        let (states, first) = (self.scan.states, channels.start);
        self.a.fill(T::ZERO);
        self.h.fill(T::ZERO);
        for (column, channel) in channels.clone().enumerate() {
            for state in 0..states {
                let place = state * WIDTH + column;
                self.a[place] = self.operands.a[channel * states + state];
                if let Some(given) = self.operands.state {
                    self.h[place] = given[(batch * self.scan.channels + first + column) * states + state];
                }
            }
        }
    }

    /// What is read at a step.
    fn step(&self, batch: usize, step: usize, channels: &Range<usize>) -> Step<'a, T> {
        let row = batch * self.scan.steps + step;
        let part = |all: &'a [T]| &all[row * self.scan.channels..][channels.clone()];
        let all = |all: &'a [T]| &all[row * self.scan.states..][..self.scan.states];
        let SelectiveOperands { u, delta, b, c, .. } = self.operands;
        Step { delta: part(delta), u: part(u), b: all(b), c: all(c) }
    }

    fn advance(&mut self, step: Step<'_, T>, y: &mut [T]) {
        self.verbs.selective(&mut self.h, WIDTH, &self.a, step, y);
    }

    /// The tile `[states, WIDTH]` as rows of channels.
    fn store(&self, tile: &[T], channels: usize, into: &mut [T]) {
        for (column, into) in into.chunks_exact_mut(self.scan.states.max(1)).take(channels).enumerate() {
            for (state, to) in into.iter_mut().enumerate() {
                *to = tile[state * WIDTH + column];
            }
        }
    }
}

/// Writes y, `[batch, steps, channels]`, and the last state.
pub fn selective_scan<T: Element>(scan: SelectiveScan, operands: SelectiveOperands<'_, T>, [y, last]: [&mut [T]; 2]) {
    if scan.is_empty() {
        return match operands.state {
            Some(state) => last.copy_from_slice(state),
            None => last.fill(T::ZERO),
        };
    }
    let columns = Columns::cut(y, scan.steps, scan.channels, WIDTH);
    let lasts =
        last.chunks_mut((scan.channels * scan.states).max(1)).flat_map(|of| of.chunks_mut(WIDTH * scan.states.max(1)));
    let mut lasts: Vec<&mut [T]> = lasts.collect();
    lasts.resize_with(columns.len(), Default::default);
    let tasks: Vec<_> = scan.tasks().into_iter().zip(columns).zip(lasts).collect();
    let verbs = T::verbs();
    parallel::run_brief(
        scan.nanoseconds(),
        tasks,
        || Worker::new(scan, operands, verbs),
        |worker, (((batch, channels), mut y), last)| {
            worker.begin(batch, &channels);
            for t in 0..scan.steps {
                let step = worker.step(batch, t, &channels);
                let y = y.row(t);
                worker.advance(step, y);
                if let Some(skip) = operands.skip {
                    let sums: &mut [T] = y;
                    for ((y, &d), &u) in sums.iter_mut().zip(&skip[channels.clone()]).zip(step.u) {
                        *y += d * u;
                    }
                }
            }
            worker.store(&worker.h, channels.len(), last);
        },
    );
}

/// Gradients of ⟨d_y, y⟩ + ⟨d_last, the last state⟩.
pub fn selective_scan_backward<T: Element>(
    scan: SelectiveScan,
    operands: SelectiveOperands<'_, T>,
    d_y: &[T],
    d_last: Option<&[T]>,
    gradients: SelectiveGradients<'_, T>,
) {
    for sum in [&mut *gradients.a, &mut *gradients.b, &mut *gradients.c, &mut *gradients.skip] {
        sum.fill(T::ZERO);
    }
    if scan.is_empty() || scan.states == 0 {
        return gradients.without_states(scan, operands, d_y, d_last);
    }
    let zeros = |len: usize| vec![T::ZERO; len];
    let all = scan.channels * scan.states;
    let places = scan.tasks();
    let blocks = places.len() / scan.batch;
    // Of each task; added up afterwards, in order.
    let (mut d_a, mut d_skip) = (zeros(scan.batch * all), zeros(scan.batch * scan.channels));
    let (mut d_b, mut d_c) = (zeros(blocks * gradients.b.len()), zeros(blocks * gradients.c.len()));
    let of_rows = scan.steps * scan.states;
    let width = WIDTH * scan.states;
    let tasks: Vec<_> = places
        .into_iter()
        .zip(Columns::cut(gradients.u, scan.steps, scan.channels, WIDTH))
        .zip(Columns::cut(gradients.delta, scan.steps, scan.channels, WIDTH))
        .zip(chunks(gradients.state, all, width))
        .zip(chunks(&mut d_a, all, width))
        .zip(chunks(&mut d_skip, scan.channels, WIDTH))
        .zip(d_b.chunks_mut(of_rows).zip(d_c.chunks_mut(of_rows)))
        .map(|((((((place, u), delta), state), a), skip), (b, c))| Way { place, u, delta, state, a, skip, b, c })
        .collect();
    let verbs = T::verbs();
    parallel::run_brief(
        4 * scan.nanoseconds(),
        tasks,
        || (Worker::new(scan, operands, verbs), Back::new(scan)),
        |(worker, back), way| back.run(worker, way, d_y, d_last),
    );
    let add = |into: &mut [T], from: &[T]| into.iter_mut().zip(from).for_each(|(into, &from)| *into += from);
    d_a.chunks(all).for_each(|d_a| add(gradients.a, d_a));
    d_skip.chunks(scan.channels).for_each(|d_skip| add(gradients.skip, d_skip));
    for (sum, parts) in [(gradients.b, &d_b), (gradients.c, &d_c)] {
        for (sum, parts) in sum.chunks_mut(of_rows).zip(parts.chunks(blocks * of_rows)) {
            parts.chunks(of_rows).for_each(|part| add(sum, part));
        }
    }
}

/// Pieces of `len` numbers, cut into those of `width`.
fn chunks<T>(all: &mut [T], len: usize, width: usize) -> Vec<&mut [T]> {
    all.chunks_mut(len).flat_map(|of| of.chunks_mut(width)).collect()
}

impl<T: Element> SelectiveGradients<'_, T> {
    /// Where nothing goes through a state.
    fn without_states(self, scan: SelectiveScan, operands: SelectiveOperands<'_, T>, d_y: &[T], d_last: Option<&[T]>) {
        self.delta.fill(T::ZERO);
        self.u.fill(T::ZERO);
        if let Some(skip) = operands.skip {
            for (at, (&d_y, &u)) in d_y.iter().zip(operands.u).enumerate() {
                self.u[at] = d_y * skip[at % scan.channels];
                self.skip[at % scan.channels] += d_y * u;
            }
        }
        match d_last {
            Some(d_last) => self.state.copy_from_slice(d_last),
            None => self.state.fill(T::ZERO),
        }
    }
}

/// A task of the way back.
struct Way<'o, T> {
    place: (usize, Range<usize>),
    u: Columns<'o, T>,
    delta: Columns<'o, T>,
    state: &'o mut [T],
    a: &'o mut [T],
    skip: &'o mut [T],
    b: &'o mut [T],
    c: &'o mut [T],
}

/// Tiles of the way back.
struct Back<T> {
    /// States that enter the segments.
    entering: Buffer<T>,
    /// States that enter the steps of a segment.
    before: Buffer<T>,
    d_h: Buffer<T>,
    d_a: Buffer<T>,
    y: [T; WIDTH],
}

impl<T: Element> Back<T> {
    fn new(scan: SelectiveScan) -> Self {
        let tiles = |count| Buffer::zeros(count * scan.states * WIDTH);
        let segments = scan.steps.div_ceil(SEGMENT);
        Self {
            entering: tiles(segments),
            before: tiles(SEGMENT.min(scan.steps)),
            d_h: tiles(1),
            d_a: tiles(1),
            y: [T::ZERO; WIDTH],
        }
    }

    fn run(&mut self, worker: &mut Worker<'_, T>, mut way: Way<'_, T>, d_y: &[T], d_last: Option<&[T]>) {
        let (scan, skip) = (worker.scan, worker.operands.skip);
        let (batch, channels) = way.place.clone();
        let (tile, count) = (scan.states * WIDTH, channels.len());
        worker.begin(batch, &channels);
        for t in 0..scan.steps {
            if t % SEGMENT == 0 {
                self.entering[t / SEGMENT * tile..][..tile].copy_from_slice(&worker.h);
            }
            worker.advance(worker.step(batch, t, &channels), &mut self.y[..count]);
        }
        self.d_a.fill(T::ZERO);
        self.d_h.fill(T::ZERO);
        if let Some(d_last) = d_last {
            let start = (batch * scan.channels + channels.start) * scan.states;
            for (column, row) in d_last[start..].chunks_exact(scan.states).take(count).enumerate() {
                row.iter().enumerate().for_each(|(state, &d)| self.d_h[state * WIDTH + column] = d);
            }
        }
        for start in (0..scan.steps).step_by(SEGMENT).rev() {
            let steps = start..(start + SEGMENT).min(scan.steps);
            worker.h.copy_from_slice(&self.entering[start / SEGMENT * tile..][..tile]);
            for t in steps.clone() {
                self.before[(t - start) * tile..][..tile].copy_from_slice(&worker.h);
                if t + 1 < steps.end {
                    worker.advance(worker.step(batch, t, &channels), &mut self.y[..count]);
                }
            }
            for t in steps.rev() {
                let d_y = &d_y[(batch * scan.steps + t) * scan.channels..][channels.clone()];
                let step = worker.step(batch, t, &channels);
                let of_states = t * scan.states..(t + 1) * scan.states;
                let to = StepGradients {
                    delta: way.delta.row(t),
                    u: way.u.row(t),
                    a: &mut self.d_a,
                    b: &mut way.b[of_states.clone()],
                    c: &mut way.c[of_states],
                };
                let before = &self.before[(t - start) * tile..][..tile];
                worker.verbs.selective_gradient(&mut self.d_h, before, WIDTH, &worker.a, step, d_y, to);
                if let Some(skip) = skip {
                    for (column, d_u) in way.u.row(t).iter_mut().enumerate() {
                        *d_u += d_y[column] * skip[channels.start + column];
                        way.skip[column] += d_y[column] * step.u[column];
                    }
                }
            }
        }
        worker.store(&self.d_h, count, way.state);
        worker.store(&self.d_a, count, way.a);
    }
}
