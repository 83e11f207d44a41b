//! Columns of values: blocks, in which they are summed, and strips of blocks, which are computed apart.

use std::ops::Range;

use super::super::parallel;
use super::super::rows::{Number, store_rows};
use super::super::tile::Verbs;
use super::{Context, DeltaInputs, DeltaSaved};
use crate::problem::{Delta, SliceMut};

/// Columns that are summed together. Sums over all columns are those of blocks, in order, so that they do not depend on who
/// computes which.
pub const BLOCK: usize = 32;

/// The blocks of so many columns.
pub fn blocks(columns: usize) -> impl Iterator<Item = Range<usize>> {
    cut(columns, BLOCK)
}

/// All columns in strips of as many blocks each, one for each of so many threads, where there are enough.
pub fn strips(columns: usize, threads: usize) -> Vec<Range<usize>> {
    let each = columns.div_ceil(BLOCK).div_ceil(threads.max(1));
    cut(columns, each * BLOCK).collect()
}

fn cut(columns: usize, each: usize) -> impl Iterator<Item = Range<usize>> {
    (0..columns).step_by(each.max(1)).map(move |start| start..(start + each).min(columns))
}

/// Threads for each of `heads`, which take about so many nanoseconds each, while all heads of a call together take
/// `share` times as long as these.
pub fn threads(heads: usize, nanoseconds: usize, share: usize) -> usize {
    if heads == 0 || parallel::is_brief(heads * nanoseconds) { 1 } else { parallel::threads().div_ceil(heads * share) }
}

/// A problem on some of its columns.
pub struct Strip<'a> {
    pub problem: Delta,
    pub inputs: DeltaInputs<'a>,
    pub columns: Range<usize>,
}

impl<'a> Strip<'a> {
    pub fn new(problem: &Delta, inputs: &DeltaInputs<'a>, columns: Range<usize>) -> Self {
        Self { problem: problem.columns(&columns), inputs: inputs.columns(&columns), columns }
    }

    pub fn saved<'s>(&self, saved: &DeltaSaved<'s>) -> DeltaSaved<'s> {
        saved.columns(&self.columns)
    }

    pub fn context<T: Number>(&'a self, verbs: &'static Verbs<T>) -> Context<'a, T> {
        Context::new(&self.problem, &self.inputs, verbs)
    }
}

/// Room for the columns of a strip in consecutive rows.
pub enum Room<'o> {
    /// All columns there are.
    Whole(SliceMut<'o>),
    /// Some of each row.
    Rows(Vec<SliceMut<'o>>),
}

impl<'o> Room<'o> {
    /// Room for each strip in so many rows.
    pub fn cut(mut all: SliceMut<'o>, rows: usize, strips: &[Range<usize>]) -> Vec<Self> {
        if strips.len() == 1 {
            return vec![Self::Whole(all)];
        }
        let mut rooms: Vec<_> = strips.iter().map(|_| Vec::with_capacity(rows)).collect();
        for _ in 0..rows {
            for (room, columns) in rooms.iter_mut().zip(strips) {
                room.push(all.take(columns.len()));
            }
        }
        rooms.into_iter().map(Self::Rows).collect()
    }

    /// Stores rows of a tile from row `first` on.
    pub fn store<T: Number>(&mut self, tile: &[T], padded: usize, width: usize, first: usize) {
        match self {
            Self::Whole(room) => store_rows(tile, padded, width, room, first),
            Self::Rows(rooms) => {
                for (row, room) in tile.chunks_exact(padded).zip(&mut rooms[first..]) {
                    T::store(&row[..width], room, 0);
                }
            }
        }
    }
}

/// The scratch of the strip before, if that was as wide.
pub struct Kept<W>(Option<(usize, W)>);

impl<W> Kept<W> {
    pub fn none() -> Self {
        Self(None)
    }

    /// Scratch for a strip of `width` columns.
    pub fn get(&mut self, width: usize, new: impl FnOnce() -> W) -> &mut W {
        if self.0.as_ref().is_some_and(|(kept, _)| *kept != width) {
            self.0 = None;
        }
        &mut self.0.get_or_insert_with(|| (width, new())).1
    }
}
