//! The gradient of the attention bias: gradients of scores, summed over what shares an entry, in order.

use std::ops::Range;

use super::super::rows::Number;
use super::{Context, Place};
use crate::problem::{QuadraticShapes, SliceMut};

/// Sums of every lane and segment of keys. A lane is all key heads whose queries share entries, so that it alone adds to them.
pub struct BiasSums<T> {
    /// Of lane after lane, segment after segment: [planes, rows, columns of the segment].
    sums: Vec<T>,
    lanes: usize,
    segment: usize,
    keys: usize,
    /// Heads of a lane that have entries of their own, and the entries of a head.
    planes: usize,
    rows: usize,
    columns: usize,
}

/// What is shared: batch entries, heads.
fn shares(shapes: &QuadraticShapes) -> [bool; 2] {
    let dims = shapes.attention_bias.map_or([1; 4], |term| term.dims);
    [dims[0] == 1, dims[1] == 1 && shapes.heads > 1]
}

impl<T: Number> BiasSums<T> {
    /// The key heads of each lane: one where no gradient is wanted.
    pub fn lanes(context: &Context<'_, T>, is_wanted: bool) -> Vec<Vec<usize>> {
        let shapes = context.shapes();
        let units = shapes.batch * shapes.key_heads;
        if !is_wanted {
            return (0..units).map(|unit| vec![unit]).collect();
        }
        let [of_batch, of_heads] = shares(shapes);
        let heads = if of_heads { 1 } else { shapes.key_heads };
        let count = if units == 0 { 0 } else { heads * if of_batch { 1 } else { shapes.batch } };
        let mut lanes = vec![Vec::new(); count];
        for unit in 0..units {
            let (batch, head) = (unit / shapes.key_heads, unit % shapes.key_heads);
            lanes[if of_batch { 0 } else { batch } * heads + if of_heads { 0 } else { head }].push(unit);
        }
        lanes
    }

    pub fn new(context: &Context<'_, T>, lanes: usize, segment: usize) -> Self {
        let shapes = context.shapes();
        let [.., rows, columns] = shapes.attention_bias.map_or([1; 4], |term| term.dims);
        let planes = if shares(shapes)[1] { 1 } else { context.group() };
        let all = Self { sums: Vec::new(), lanes, segment, keys: shapes.keys, planes, rows, columns };
        let len = all.widths().map(|width| planes * rows * width).sum::<usize>() * lanes;
        Self { sums: vec![T::ZERO; len], ..all }
    }

    /// Columns of each segment.
    fn widths(&self) -> impl Iterator<Item = usize> + use<T> {
        let (keys, segment, columns) = (self.keys, self.segment, self.columns);
        let width = move |start| if columns == 1 { 1 } else { segment.min(keys - start) };
        (0..keys.max(1)).step_by(segment).map(width)
    }

    /// The sums of each lane and segment.
    pub fn parts(&mut self) -> Vec<&mut [T]> {
        let lens: Vec<_> = self.widths().map(|width| self.planes * self.rows * width).collect();
        let mut sums = &mut self.sums[..];
        let mut part = |len: &usize| sums.split_off_mut(..*len).unwrap_or_default();
        (0..self.lanes).flat_map(|_| lens.iter()).map(&mut part).collect()
    }

    /// Writes the gradient, [B, H, N, M], each of them or 1.
    pub fn store(&self, mut room: SliceMut<'_>) {
        if self.columns == 0 {
            return;
        }
        let widths: Vec<_> = self.widths().collect();
        let mut row = vec![T::ZERO; self.columns];
        let all = self.planes * self.rows * widths.iter().sum::<usize>();
        for (index, at) in (0..self.lanes * self.planes * self.rows).zip((0..).step_by(self.columns)) {
            let (lane, line) = (index / (self.planes * self.rows), index % (self.planes * self.rows));
            row.fill(T::ZERO);
            let (mut part, mut column) = (lane * all, 0);
            for &width in &widths {
                let own = &self.sums[part + line * width..][..width];
                row[column..].iter_mut().zip(own).for_each(|(sum, &x)| *sum += x);
                part += self.planes * self.rows * width;
                column += if self.columns == 1 { 0 } else { width };
            }
            T::store(&row, &mut room, at);
        }
    }
}

/// The sums of a head and a segment.
pub struct BiasPlane<'a, T> {
    /// [rows, width], or nothing
    sums: &'a mut [T],
    is_row_shared: bool,
    is_column_shared: bool,
    first_key: usize,
    width: usize,
    tile: Vec<T>,
}

impl<'a, T: Number> BiasPlane<'a, T> {
    /// Out of the sums of a lane and segment, for a member of a group.
    pub fn of(context: &Context<'_, T>, sums: &'a mut [T], member: usize, segment: &Range<usize>) -> Self {
        let [.., rows, columns] = context.shapes().attention_bias.map_or([1; 4], |term| term.dims);
        let width = if columns == 1 { 1 } else { segment.len() };
        let plane = if shares(context.shapes())[1] { 0 } else { member };
        let sums = if sums.is_empty() { sums } else { &mut sums[plane * rows * width..][..rows * width] };
        let (is_row_shared, is_column_shared) = (rows == 1, columns == 1);
        Self { sums, is_row_shared, is_column_shared, first_key: segment.start, width, tile: Vec::new() }
    }

    /// Adds the gradients of a tile of scores, 0 where hidden.
    pub fn add(&mut self, at: Place, d_scores: &[T], row: usize, keys: usize) {
        if self.sums.is_empty() {
            return;
        }
        let column = if self.is_column_shared { 0 } else { at.key - self.first_key };
        let columns = if self.is_column_shared { 1 } else { keys };
        // Where rows share entries, those of a tile are added up first: sums of sums have smaller roundings.
        self.tile.clear();
        self.tile.resize(columns, T::ZERO);
        for (r, d_row) in d_scores.chunks_exact(row).enumerate() {
            let own = match self.is_row_shared {
                true => &mut self.tile[..],
                false => &mut self.sums[(at.query + r) * self.width + column..][..columns],
            };
            match self.is_column_shared {
                true => own[0] += d_row[..keys].iter().copied().sum::<T>(),
                false => own.iter_mut().zip(d_row).for_each(|(sum, &d)| *sum += d),
            }
        }
        if self.is_row_shared {
            self.sums[column..].iter_mut().zip(&self.tile).for_each(|(sum, &d)| *sum += d);
        }
    }
}
