//! Where a task's gradients of one operand gather.

use std::ops::Range;

use super::super::rows::{Number, store_rows};
use crate::problem::SliceMut;

/// Rows of the heads of q, k or v that a task covers.
pub struct Gradient<'o, T> {
    heads: Heads<'o, T>,
    /// The first head, counted within the batch entry.
    first: usize,
    width: usize,
    padded: usize,
    /// Whether several state heads add to a row; else each row is written once.
    shared: bool,
}

/// The output itself where its elements can be summed in place, else tiles that are rounded at the end.
enum Heads<'o, T> {
    InPlace(Vec<&'o mut [T]>),
    Buffered(Vec<(Vec<T>, SliceMut<'o>)>),
}

impl<'o, T: Number> Gradient<'o, T> {
    pub fn new(out: Vec<SliceMut<'o>>, first: usize, width: usize, padded: usize, shared: bool) -> Self {
        let in_place = width == padded && out.iter().all(|slice| T::is_type_of(slice));
        let heads = if in_place {
            let mut slices: Vec<&mut [T]> = out.into_iter().filter_map(|slice| T::elements(slice).ok()).collect();
            if shared {
                slices.iter_mut().for_each(|slice| slice.fill(T::ZERO));
            }
            Heads::InPlace(slices)
        } else {
            Heads::Buffered(out.into_iter().map(|out| (vec![T::ZERO; out.len() / width * padded], out)).collect())
        };
        Self { heads, first, width, padded, shared }
    }

    /// Where the rows of a tile go, if they are nobody else's and lie there as whole vectors.
    pub fn place(&mut self, head: usize, rows: Range<usize>) -> Option<&mut [T]> {
        match &mut self.heads {
            Heads::InPlace(slices) if !self.shared => {
                Some(&mut slices[head - self.first][rows.start * self.padded..rows.end * self.padded])
            }
            _ => None,
        }
    }

    /// Takes the rows of a tile, each written or added to once per state head.
    pub fn put(&mut self, head: usize, rows: Range<usize>, tile: &[T]) {
        let to = match &mut self.heads {
            Heads::InPlace(slices) => &mut *slices[head - self.first],
            Heads::Buffered(heads) => &mut heads[head - self.first].0,
        };
        let to = &mut to[rows.start * self.padded..rows.end * self.padded];
        if self.shared {
            to.iter_mut().zip(tile).for_each(|(to, &x)| *to += x);
        } else {
            to.copy_from_slice(&tile[..to.len()]);
        }
    }

    /// Rounds what was buffered into the output.
    pub fn finish(self) {
        if let Heads::Buffered(heads) = self.heads {
            for (tile, mut out) in heads {
                store_rows(&tile, self.padded, self.width, &mut out, 0);
            }
        }
    }
}
