//! Operands and results of one part of a call.

use std::ops::Range;

use super::{
    DeltaInputs, DeltaSaved, LinearInputs, LinearSaved, Operand, QuadraticInputs, QuadraticSaved, Sequences,
    StateGradient, StateView, View,
};

/// What is computed alone: a sequence, or all batch entries where nothing is packed.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Which sequence it is.
    pub sequence: Option<usize>,
    pub queries: Range<usize>,
    pub keys: Range<usize>,
}

impl Part {
    /// The parts of so many queries and keys.
    pub(super) fn all(sequences: Option<&Sequences>, queries: usize, keys: usize) -> Vec<Self> {
        let Some(sequences) = sequences else {
            return vec![Self { sequence: None, queries: 0..queries, keys: 0..keys }];
        };
        let part = |(index, [queries, keys]): (usize, [Range<usize>; 2])| Self { sequence: Some(index), queries, keys };
        sequences.ranges().enumerate().map(part).collect()
    }
}

impl Part {
    /// That of the sequence, of a state of all.
    fn state<'a>(&self, state: View<'a>) -> View<'a> {
        self.sequence.map_or(state, |index| state.narrow(0, &(index..index + 1)))
    }
}

impl<'a> View<'a> {
    fn narrow(&self, dimension: usize, range: &Range<usize>) -> Self {
        let start = range.start * self.strides()[dimension];
        self.with_size(self.data().tail(start), dimension, range.len())
    }

    /// One batch entry.
    fn entry(&self, index: usize) -> Self {
        self.narrow(0, &(index..index + 1))
    }

    /// The queries or keys of a part: the rows of `[batch, heads, rows, width]`, the last dimension of fewer.
    fn rows(&self, range: &Range<usize>) -> Self {
        self.narrow((self.dims().len() - 1).min(2), range)
    }
}

impl QuadraticInputs<View<'_>> {
    pub(crate) fn part(&self, part: &Part) -> Self {
        Self {
            q: self.q.rows(&part.queries),
            k: self.k.rows(&part.keys),
            v: self.v.rows(&part.keys),
            key_mask: self.key_mask.map(|mask| mask.rows(&part.keys)),
            ..*self
        }
    }
}

impl QuadraticSaved<View<'_>> {
    pub(crate) fn part(&self, part: &Part) -> Self {
        Self {
            out: self.out.rows(&part.queries),
            statistic: self.statistic.rows(&part.queries),
            d_out: self.d_out.rows(&part.queries),
            d_statistic: self.d_statistic.as_ref().map(|statistic| statistic.rows(&part.queries)),
        }
    }
}

impl LinearInputs<View<'_>> {
    pub(crate) fn part(&self, part: &Part) -> Self {
        let is_per_token = |decay: &View<'_>| decay.dims().len() > 1;
        Self {
            q: self.q.rows(&part.queries),
            k: self.k.rows(&part.keys),
            v: self.v.rows(&part.keys),
            key_mask: self.key_mask.map(|mask| mask.rows(&part.keys)),
            log_decay: self.log_decay.map(|decay| if is_per_token(&decay) { decay.rows(&part.keys) } else { decay }),
            omega: self.omega,
            state: self.state.map(|state| part.sequence.map_or(state, |index| state.of(index))),
        }
    }
}

impl<'a> StateView<View<'a>> {
    /// That of one sequence.
    fn of(&self, index: usize) -> Self {
        let of = |tensor: &View<'a>| tensor.entry(index);
        let stabilizer = self.stabilizer.as_ref().map(of);
        Self { s: of(&self.s), z: of(&self.z), stabilizer, position: self.position }
    }
}

impl StateGradient<View<'_>> {
    /// That of one sequence.
    fn of(&self, index: usize) -> Self {
        Self { s: self.s.entry(index), z: self.z.entry(index) }
    }
}

impl LinearSaved<View<'_>> {
    pub(crate) fn part(&self, part: &Part) -> Self {
        Self {
            out: self.out.rows(&part.queries),
            statistic: self.statistic.as_ref().map(|statistic| statistic.rows(&part.queries)),
            d_out: self.d_out.rows(&part.queries),
            d_state: self.d_state.map(|state| part.sequence.map_or(state, |index| state.of(index))),
        }
    }
}

impl<'a> DeltaInputs<View<'a>> {
    pub(crate) fn part(&self, part: &Part) -> Self {
        let rows = |view: View<'a>| view.rows(&part.queries);
        Self {
            q: rows(self.q),
            k: rows(self.k),
            v: rows(self.v),
            rank_one: self.rank_one.map(rows),
            log_decay: self.log_decay.map(|decay| if decay.dims().len() > 1 { rows(decay) } else { decay }),
            bonus: self.bonus,
            key_mask: self.key_mask.map(rows),
            state: self.state.map(|state| part.state(state)),
        }
    }
}

impl DeltaInputs<View<'_>> {
    /// Some columns of the values.
    pub(crate) fn columns(&self, columns: &Range<usize>) -> Self {
        Self { v: self.v.narrow(3, columns), state: self.state.map(|state| state.narrow(3, columns)), ..*self }
    }
}

impl DeltaSaved<View<'_>> {
    /// Those of some columns of the values.
    pub(crate) fn columns(&self, columns: &Range<usize>) -> Self {
        Self { d_out: self.d_out.narrow(3, columns), d_state: self.d_state.map(|state| state.narrow(3, columns)) }
    }

    pub(crate) fn part(&self, part: &Part) -> Self {
        Self { d_out: self.d_out.rows(&part.queries), d_state: self.d_state.map(|state| part.state(state)) }
    }
}
