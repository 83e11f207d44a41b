//! Sums that are carried through the segments of a line.
//!
//! A segment's own sums start empty, so that they do not depend on where they are made, and those entering it join
//! them where they are read: S = e^G E + U with G the log-decay since the segment's start. So a line gives the same
//! bits whether one worker walks through all segments or each has its own.

use super::super::rows::Number;
use super::Context;
use super::state::{Order, State};
use super::tiles::StateHead;

/// E and U of a segment, and their sum.
pub struct Carried<T> {
    /// U; in the line's first segment together with what enters the line.
    pub own: State<T>,
    /// E; none in the line's first segment.
    pub entering: Option<State<T>>,
    both: State<T>,
    /// Whether readers find the sums in `both`.
    apart: bool,
}

impl<T: Number> Carried<T> {
    /// Around empty sums.
    pub fn new(zero: State<T>) -> Self {
        Self { both: zero.clone(), own: zero, entering: None, apart: false }
    }

    /// The line's first segment.
    pub fn begin_line(&mut self, context: &Context<'_, T>, at: StateHead, order: Order) {
        match context.inputs.state {
            Some(_) => self.begin(State::initial(context, at, order)),
            None => {
                self.own.restart(T::NEG_INFINITY);
                (self.entering, self.apart) = (None, false);
            }
        }
    }

    /// Makes the sums at the segment's end those of a segment that does not change any more.
    pub fn settle(&mut self, context: &Context<'_, T>) {
        if let Some(mut entering) = self.entering.take() {
            entering.append(context, &self.own);
            self.own = entering;
        }
        self.apart = false;
    }

    /// Sums that do not change any more, or begin a line.
    pub fn begin(&mut self, own: State<T>) {
        (self.own, self.entering, self.apart) = (own, None, false);
    }

    /// A later segment.
    pub fn enter(&mut self, entering: State<T>) {
        self.own.restart(entering.stabilizer);
        (self.entering, self.apart) = (Some(entering), false);
    }

    /// The segment that follows.
    pub fn next_segment(&mut self, context: &Context<'_, T>) {
        let all = self.last(context);
        self.enter(all);
    }

    /// The sums at the segment's end.
    pub fn last(&mut self, context: &Context<'_, T>) -> State<T> {
        match self.entering.take() {
            Some(mut entering) => {
                entering.append(context, &self.own);
                entering
            }
            None => self.own.clone(),
        }
    }

    /// Makes the sums to be read at this point; a chunk of the chunk-exclusive scan reads those of its edge throughout.
    pub fn refresh(&mut self, context: &Context<'_, T>, at_chunk_edge: bool) {
        let is_chunked = context.chunk().is_some();
        if is_chunked && !at_chunk_edge {
            return;
        }
        self.apart = is_chunked || self.entering.is_some();
        match &self.entering {
            Some(entering) => self.both.sum(context, entering, &self.own),
            None if is_chunked => self.both.clone_from(&self.own),
            None => {}
        }
    }

    /// S and z as they were at the last [`Self::refresh`].
    pub fn sums(&self) -> &State<T> {
        if self.apart { &self.both } else { &self.own }
    }
}
