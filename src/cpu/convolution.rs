//! Causal convolution of rows, every channel on its own: a few taps, so memory is what it waits for.

use std::ops::Range;

use super::elementwise::Element;
use super::parallel;
use super::tile::Verbs;
use crate::activation::Activation;

/// Numbers of a row that are gone through at a time, so that the rows of all taps stay in the first-level cache.
const CHANNELS: usize = 512;
/// Numbers of x of a task.
const PIECE: usize = 1 << 15;
/// Rows of a task at least: the backward pass goes twice over those of the taps.
const FEWEST_ROWS: usize = 32;

/// y_t = a(b + Σ_j w_j ⊙ x_{t−j}) with a the SiLU or nothing.
pub(crate) struct Convolution<'a, T: 'static> {
    verbs: &'static Verbs<T>,
    channels: usize,
    /// Of the current row, of the one before …; last the bias.
    weights: Vec<Vec<T>>,
    taps: usize,
    silu: bool,
    /// `[tokens, channels]`, sequences one behind another.
    x: &'a [T],
    /// `[sequences, taps − 1, channels]`: the rows before the first.
    state: &'a [T],
    sequences: &'a [Range<usize>],
    ones: Vec<T>,
}

/// What a convolution is of.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a, T> {
    /// `[tokens, channels]`
    pub x: &'a [T],
    /// `[channels, taps]`, the last tap that of the current row; with a bias `[channels, taps + 1]`, the bias last.
    pub weights: &'a [T],
    /// `[sequences, taps − 1, channels]`
    pub state: &'a [T],
}

/// The choices of a convolution.
#[derive(Clone, Copy)]
pub(crate) struct Choices<'a> {
    pub channels: usize,
    pub taps: usize,
    pub has_bias: bool,
    pub silu: bool,
    /// Which tokens each sequence has, in order and without gaps.
    pub sequences: &'a [Range<usize>],
}

/// Room for gradients as the [`Operands`].
pub(crate) struct Gradients<'o, T> {
    pub x: &'o mut [T],
    pub weights: &'o mut [T],
    pub state: &'o mut [T],
}

/// Rows of a sequence.
struct Task<'r, T> {
    sequence: usize,
    /// From the beginning of the sequence on.
    rows: Range<usize>,
    /// Of y, or of dx.
    room: &'r mut [T],
    /// Of the gradient of the state, in the first task of a sequence.
    state: &'r mut [T],
    /// Of this task's part of the gradients of the weights.
    weights: &'r mut [T],
}

impl<'a, T: Element> Convolution<'a, T> {
    /// # Panics
    /// Lengths that do not fit together.
    pub fn new(operands: Operands<'a, T>, choices: Choices<'a>) -> Self {
        let Operands { x, weights, state } = operands;
        let Choices { channels, taps, has_bias, silu, sequences } = choices;
        let columns = taps + usize::from(has_bias);
        assert!(channels > 0 && taps > 0 && weights.len() == channels * columns && x.len().is_multiple_of(channels));
        assert!(state.len() == sequences.len() * (taps - 1) * channels);
        assert!(sequences.last().map_or(0, |last| last.end) * channels == x.len());
        let column = |column: usize| weights.iter().skip(column).step_by(columns).copied().collect();
        // The last tap is that of the current row.
        let weights = (0..taps).rev().chain(taps..columns).map(column).collect();
        let ones = if has_bias { vec![T::ONE; channels] } else { Vec::new() };
        Self { verbs: T::verbs(), channels, weights, taps, silu, x, state, sequences, ones }
    }

    /// Writes y, `[tokens, channels]`.
    pub fn forward(&self, y: &mut [T]) {
        let tasks = self.tasks(y, &mut [], &mut []);
        parallel::run_brief(self.x.len() * self.taps / 2, tasks, Vec::new, |scratch, task| self.piece(scratch, task));
    }

    /// From the gradient of what [`Self::forward`] gives.
    pub fn backward(&self, d_y: &[T], gradients: Gradients<'_, T>) {
        let Gradients { x, weights, state } = gradients;
        // No row reads that of an empty sequence.
        state.fill(T::ZERO);
        let count: usize = self.sequences.iter().map(|rows| rows.len().div_ceil(self.rows())).sum();
        let one = self.weights.len() * self.channels;
        let mut parts = vec![T::ZERO; count * one];
        let tasks = self.tasks(x, state, &mut parts);
        let work = |scratch: &mut Vec<T>, task| self.piece_gradient(scratch, task, d_y);
        parallel::run_brief(4 * self.x.len() * self.taps, tasks, Vec::new, work);
        // In the order of the tasks, whoever ran them.
        let mut sums = vec![T::ZERO; one];
        for part in parts.chunks_exact(one.max(1)) {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += *part);
        }
        let columns = self.weights.len();
        for (lag, sums) in sums.chunks_exact(self.channels).enumerate() {
            let column = if lag < self.taps { self.taps - 1 - lag } else { lag };
            weights.iter_mut().skip(column).step_by(columns).zip(sums).for_each(|(weight, sum)| *weight = *sum);
        }
    }

    /// Rows of a task; the sums of a gradient do not depend on the number of threads.
    fn rows(&self) -> usize {
        (PIECE / self.channels).max(FEWEST_ROWS)
    }

    fn tasks<'r>(&self, mut room: &'r mut [T], mut state: &'r mut [T], mut parts: &'r mut [T]) -> Vec<Task<'r, T>> {
        fn take<'r, T>(room: &mut &'r mut [T], count: usize) -> &'r mut [T] {
            let (taken, rest) = std::mem::take(room).split_at_mut(count);
            *room = rest;
            taken
        }
        let (backward, mut tasks) = (!parts.is_empty(), Vec::new());
        for (sequence, range) in self.sequences.iter().enumerate() {
            let mut before = if backward { take(&mut state, (self.taps - 1) * self.channels) } else { &mut [] };
            for first in (0..range.len()).step_by(self.rows()) {
                let rows = first..range.len().min(first + self.rows());
                let weights = if backward { take(&mut parts, self.weights.len() * self.channels) } else { &mut [] };
                let room = take(&mut room, rows.len() * self.channels);
                tasks.push(Task { sequence, rows, room, state: std::mem::take(&mut before), weights });
            }
        }
        tasks
    }

    /// Channels of row t of a sequence; those before the first are of the state.
    fn row(&self, sequence: usize, t: usize, lag: usize, channels: &Range<usize>) -> &[T] {
        let (rows, row) = if t >= lag {
            (self.x, self.sequences[sequence].start + t - lag)
        } else {
            (self.state, (sequence + 1) * (self.taps - 1) + t - lag)
        };
        &rows[row * self.channels..][channels.clone()]
    }

    /// Channels of the rows that row t of the result reads, in the order of the weights.
    fn inputs<'r>(&'r self, sequence: usize, t: usize, channels: &Range<usize>, into: &mut Vec<&'r [T]>) {
        into.clear();
        into.extend((0..self.taps).map(|lag| self.row(sequence, t, lag, channels)));
        if !self.ones.is_empty() {
            into.push(&self.ones[channels.clone()]);
        }
    }

    /// Blocks of channels, and the weights of each.
    fn blocks(&self) -> impl Iterator<Item = (Range<usize>, Vec<&[T]>)> {
        let blocks = (0..self.channels).step_by(CHANNELS).map(|first| first..self.channels.min(first + CHANNELS));
        blocks.map(|channels| (channels.clone(), self.weights.iter().map(|all| &all[channels.clone()]).collect()))
    }

    fn piece(&self, scratch: &mut Vec<T>, task: Task<'_, T>) {
        let (verbs, mut inputs) = (self.verbs, Vec::new());
        scratch.resize(self.channels.min(CHANNELS), T::ZERO);
        for (channels, weights) in self.blocks() {
            for (t, y) in task.rows.clone().zip(task.room.chunks_exact_mut(self.channels)) {
                self.inputs(task.sequence, t, &channels, &mut inputs);
                let y = &mut y[channels.clone()];
                if self.silu {
                    let sums = &mut scratch[..channels.len()];
                    verbs.weighted_rows(sums, &weights, &inputs);
                    verbs.activate(y, sums, None, Activation::Silu);
                } else {
                    verbs.weighted_rows(y, &weights, &inputs);
                }
            }
        }
    }

    /// With z the sum and dz = dy ⊙ a′(z): dx_t = Σ_j w_j ⊙ dz_{t+j}, dw_j = Σ_t dz_t ⊙ x_{t−j}.
    fn piece_gradient(&self, scratch: &mut Vec<T>, task: Task<'_, T>, d_y: &[T]) {
        let (verbs, mut inputs) = (self.verbs, Vec::new());
        let Task { sequence, rows, room, state, weights: sums } = task;
        let range = &self.sequences[sequence];
        // The rows whose results read those of the task.
        let reading = rows.start..range.len().min(rows.end + self.taps - 1);
        let block = self.channels.min(CHANNELS);
        scratch.resize((reading.len() + 1 + self.weights.len()) * block, T::ZERO);
        for (channels, weights) in self.blocks() {
            let width = channels.len();
            let (z, rest) = scratch.split_at_mut(width);
            let (block_sums, rest) = rest.split_at_mut(self.weights.len() * width);
            let d_z = &mut rest[..reading.len() * width];
            block_sums.fill(T::ZERO);
            for (t, d_z) in reading.clone().zip(d_z.chunks_exact_mut(width)) {
                self.inputs(sequence, t, &channels, &mut inputs);
                let d_y = &d_y[(range.start + t) * self.channels..][channels.clone()];
                if self.silu {
                    verbs.weighted_rows(z, &weights, &inputs);
                    verbs.activate_gradient(d_z, d_y, z, None, Activation::Silu);
                } else {
                    d_z.copy_from_slice(d_y);
                }
                if t < rows.end {
                    verbs.add_row_products(block_sums, d_z, &inputs);
                }
            }
            let later = |first: usize, count: usize| d_z.chunks_exact(width).skip(first).take(count).collect();
            for (index, d_x) in room.chunks_exact_mut(self.channels).enumerate() {
                let read: Vec<&[T]> = later(index, self.taps);
                verbs.weighted_rows(&mut d_x[channels.clone()], &weights[..read.len()], &read);
            }
            // Row −lag of the state is read by the first taps − lag rows of the sequence.
            for (index, d_row) in state.chunks_exact_mut(self.channels).enumerate() {
                let lag = self.taps - 1 - index;
                let read: Vec<&[T]> = later(0, self.taps - lag);
                verbs.weighted_rows(&mut d_row[channels.clone()], &weights[lag..lag + read.len()], &read);
            }
            for (all, block) in sums.chunks_exact_mut(self.channels).zip(block_sums.chunks_exact(width)) {
                all[channels.clone()].copy_from_slice(block);
            }
        }
    }
}
