//! The way back through the columns of a state head.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::Number;
use super::chunk::Chunk;
use super::gradient::ChunkGradient;
use super::operands::chunks;
use super::{CHUNK, Context, SEGMENT, StateHead};
use crate::problem::View;

/// Rebuilds states from those at the starts of segments and carries the gradient of the state from chunk to chunk.
pub struct Walk<T> {
    chunk: Chunk<T>,
    gradient: ChunkGradient<T>,
    /// Of each chunk of a segment, at its start.
    states: Vec<Buffer<T>>,
}

impl<T: Number> Walk<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let chunk = Chunk::new(context);
        Self {
            gradient: ChunkGradient::new(context, &chunk),
            chunk,
            states: (0..SEGMENT / CHUNK).map(|_| Buffer::zeros(context.state_len())).collect(),
        }
    }

    /// Moves a state over some tokens.
    fn advance(&mut self, context: &Context<'_, T>, at: StateHead, tokens: Range<usize>, state: &mut [T]) {
        self.chunk.load(context, at, tokens, false);
        self.chunk.solve(context, state);
        self.chunk.step(context, state);
    }

    /// The states at the start of each segment.
    pub fn starts(&mut self, context: &Context<'_, T>, at: StateHead, segments: &[Range<usize>]) -> Vec<Buffer<T>> {
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

    /// Walks a segment from its end; `finish` gets each chunk with what its columns give.
    pub fn segment(
        &mut self,
        context: &Context<'_, T>,
        d_out: &View<'_>,
        at: StateHead,
        (segment, start): (&Range<usize>, &Buffer<T>),
        d_state: &mut [T],
        mut finish: impl FnMut(&mut Chunk<T>, &mut ChunkGradient<T>, Range<usize>),
    ) {
        let mut states = std::mem::take(&mut self.states);
        states[0].copy_from_slice(start);
        let last = chunks(segment).len().saturating_sub(1);
        for (index, tokens) in chunks(segment).take(last).enumerate() {
            let (before, behind) = states.split_at_mut(index + 1);
            behind[0].copy_from_slice(&before[index]);
            self.advance(context, at, tokens, &mut behind[0]);
        }
        for (tokens, state) in chunks(segment).zip(&states).rev() {
            let Self { chunk, gradient, .. } = self;
            chunk.load(context, at, tokens.clone(), true);
            chunk.solve(context, state);
            gradient.load(context, d_out, at, tokens.clone());
            gradient.columns(context, chunk, state, d_state);
            finish(chunk, gradient, tokens);
        }
        self.states = states;
    }
}
