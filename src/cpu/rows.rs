//! Rows of operands in and out of tiles: dtype conversion, strides, padding.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::simd::Real;
use super::tile::{self, Elements, StoredRows, prefetch};
use crate::problem::{Operand, Slice, SliceMut, View};

/// A [`Real`] that operands are converted to and from.
pub trait Number: Real {
    /// `from[at..]` widened into `into`.
    fn load(from: Slice<'_>, at: usize, into: &mut [Self]);
    /// `from` rounded into `into[at..]`.
    fn store(from: &[Self], into: &mut SliceMut<'_>, at: usize);
    /// Elements of an operand that is summed in this type.
    fn stored(slice: Slice<'_>) -> Elements<'_, Self>;
    /// The elements where they lie, if they are of this type.
    #[cfg(feature = "candle")]
    fn own(slice: Slice<'_>) -> Option<&[Self]>;
    fn slice(data: &[Self]) -> Slice<'_>;
    fn slice_mut(data: &mut [Self]) -> SliceMut<'_>;
    /// Whether the elements are of this type.
    fn is_type_of(slice: &SliceMut<'_>) -> bool;
    /// The elements, if they are of this type.
    fn elements<'a>(slice: SliceMut<'a>) -> Result<&'a mut [Self], SliceMut<'a>>;
    /// The elements where they lie, if they are of this type.
    fn own_mut<'a>(slice: &'a mut SliceMut<'_>) -> Option<&'a mut [Self]>;
}

fn convert<A: Copy, B>(from: &[A], into: &mut [B], f: impl Fn(A) -> B) {
    for (to, &x) in into.iter_mut().zip(from) {
        *to = f(x);
    }
}

impl Number for f32 {
    fn load(from: Slice<'_>, at: usize, into: &mut [Self]) {
        let range = at..at + into.len();
        match from {
            Slice::F16(x) => x[range].convert_to_f32_slice(into),
            Slice::BF16(x) => tile::bf16::widen(&x[range], into),
            Slice::F32(x) => into.copy_from_slice(&x[range]),
            Slice::F64(x) => convert(&x[range], into, |x| x as f32),
            Slice::U8(x) => convert(&x[range], into, f32::from),
        }
    }

    fn store(from: &[Self], into: &mut SliceMut<'_>, at: usize) {
        let range = at..at + from.len();
        match into {
            SliceMut::F16(x) => x[range].convert_from_f32_slice(from),
            SliceMut::BF16(x) => tile::bf16::round(from, &mut x[range]),
            SliceMut::F32(x) => x[range].copy_from_slice(from),
            SliceMut::F64(x) => convert(from, &mut x[range], f64::from),
        }
    }

    fn stored(slice: Slice<'_>) -> Elements<'_, Self> {
        match slice {
            Slice::F32(x) => Elements::Own(x),
            Slice::F16(x) => Elements::F16(x),
            Slice::BF16(x) => Elements::BF16(x),
            Slice::F64(_) | Slice::U8(_) => unreachable!("operands of this dtype are not summed in f32"),
        }
    }

    #[cfg(feature = "candle")]
    fn own(slice: Slice<'_>) -> Option<&[Self]> {
        if let Slice::F32(elements) = slice { Some(elements) } else { None }
    }

    fn slice(data: &[Self]) -> Slice<'_> {
        Slice::F32(data)
    }

    fn slice_mut(data: &mut [Self]) -> SliceMut<'_> {
        SliceMut::F32(data)
    }

    fn is_type_of(slice: &SliceMut<'_>) -> bool {
        matches!(slice, SliceMut::F32(_))
    }

    fn elements<'a>(slice: SliceMut<'a>) -> Result<&'a mut [Self], SliceMut<'a>> {
        match slice {
            SliceMut::F32(elements) => Ok(elements),
            other => Err(other),
        }
    }

    fn own_mut<'a>(slice: &'a mut SliceMut<'_>) -> Option<&'a mut [Self]> {
        if let SliceMut::F32(elements) = slice { Some(elements) } else { None }
    }
}

impl Number for f64 {
    fn load(from: Slice<'_>, at: usize, into: &mut [Self]) {
        let range = at..at + into.len();
        match from {
            Slice::F16(x) => convert(&x[range], into, f16::to_f64),
            Slice::BF16(x) => convert(&x[range], into, bf16::to_f64),
            Slice::F32(x) => convert(&x[range], into, f64::from),
            Slice::F64(x) => into.copy_from_slice(&x[range]),
            Slice::U8(x) => convert(&x[range], into, f64::from),
        }
    }

    fn store(from: &[Self], into: &mut SliceMut<'_>, at: usize) {
        let range = at..at + from.len();
        match into {
            SliceMut::F16(x) => convert(from, &mut x[range], f16::from_f64),
            SliceMut::BF16(x) => convert(from, &mut x[range], bf16::from_f64),
            SliceMut::F32(x) => convert(from, &mut x[range], |x| x as f32),
            SliceMut::F64(x) => x[range].copy_from_slice(from),
        }
    }

    fn stored(slice: Slice<'_>) -> Elements<'_, Self> {
        match slice {
            Slice::F64(x) => Elements::Own(x),
            _ => unreachable!("operands of this dtype are not summed in f64"),
        }
    }

    #[cfg(feature = "candle")]
    fn own(slice: Slice<'_>) -> Option<&[Self]> {
        if let Slice::F64(elements) = slice { Some(elements) } else { None }
    }

    fn slice(data: &[Self]) -> Slice<'_> {
        Slice::F64(data)
    }

    fn slice_mut(data: &mut [Self]) -> SliceMut<'_> {
        SliceMut::F64(data)
    }

    fn is_type_of(slice: &SliceMut<'_>) -> bool {
        matches!(slice, SliceMut::F64(_))
    }

    fn elements<'a>(slice: SliceMut<'a>) -> Result<&'a mut [Self], SliceMut<'a>> {
        match slice {
            SliceMut::F64(elements) => Ok(elements),
            other => Err(other),
        }
    }

    fn own_mut<'a>(slice: &'a mut SliceMut<'_>) -> Option<&'a mut [Self]> {
        if let SliceMut::F64(elements) = slice { Some(elements) } else { None }
    }
}

/// 1/n for each batch entry, where n is the number of keys that the mask [B, M] keeps, all without one; 1 for n = 0.
pub fn inverse_key_counts(key_mask: Option<&[u8]>, batch: usize, keys: usize) -> Vec<f64> {
    let kept = |entry: usize| match key_mask {
        Some(mask) => mask[entry * keys..][..keys].iter().filter(|&&keep| keep != 0).count(),
        None => keys,
    };
    (0..batch).map(|entry| 1.0 / kept(entry).max(1) as f64).collect()
}

/// Rows of whole vectors, at a distance of `row` numbers.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    pub data: &'a [T],
    pub row: usize,
}

impl<'a, T> Rows<'a, T> {
    /// The first `count` rows of `width` numbers, in as few pieces as they lie in, each with its first row.
    pub fn pieces(self, count: usize, width: usize) -> impl Iterator<Item = (usize, &'a [T])> {
        let rows = if self.row == width { count.max(1) } else { 1 };
        (0..count).step_by(rows).map(move |r| (r, &self.data[r * self.row..][..rows * width]))
    }

    /// The first `width` numbers of a row.
    pub fn row(self, index: usize, width: usize) -> &'a [T] {
        &self.data[index * self.row..][..width]
    }
}

/// One head of a [batch, heads, rows, width] operand.
#[derive(Clone, Copy)]
pub struct HeadRows<'a> {
    data: Slice<'a>,
    start: usize,
    stride: usize,
    width: usize,
}

impl<'a> HeadRows<'a> {
    pub fn new(view: &View<'a>, batch: usize, head: usize) -> Self {
        let strides = view.strides();
        let start = batch * strides[0] + head * strides[1];
        Self { data: view.data(), start, stride: strides[2], width: view.dims()[3] }
    }

    /// `rows` where they lie, if they are of the type of sums and whole vectors of `padded` numbers.
    pub fn in_place<T: Number>(&self, rows: &Range<usize>, padded: usize) -> Option<Rows<'a, T>> {
        match T::stored(self.data) {
            Elements::Own(data) if self.width == padded && !rows.is_empty() => {
                Some(Rows { data: &data[self.start + rows.start * self.stride..], row: self.stride })
            }
            _ => None,
        }
    }

    /// Loads `rows` into a tile with rows of `padded` numbers, filling up with zeros.
    pub fn load<T: Number>(&self, rows: Range<usize>, into: &mut [T], padded: usize) {
        if self.stride == self.width && self.width == padded {
            T::load(self.data, self.start + rows.start * self.stride, &mut into[..rows.len() * padded]);
        } else {
            self.load_kept(rows, into, padded, |_| true);
        }
    }

    /// As [`HeadRows::load`]; rows that `keep` refuses are zeroed unread.
    pub fn load_kept<T: Number>(
        &self,
        rows: Range<usize>,
        into: &mut [T],
        padded: usize,
        keep: impl Fn(usize) -> bool,
    ) {
        for (row, to) in rows.zip(into.chunks_exact_mut(padded)) {
            if !keep(row) {
                to.fill(T::ZERO);
                continue;
            }
            let (to, padding) = to.split_at_mut(self.width);
            T::load(self.data, self.start + row * self.stride, to);
            padding.fill(T::ZERO);
        }
    }
}

impl<'a> HeadRows<'a> {
    /// `rows` where they lie, as they are stored.
    pub fn stored<T: Number>(&self, rows: Range<usize>) -> StoredRows<'a, T> {
        let (start, count) = (self.start + rows.start * self.stride, rows.len());
        StoredRows { elements: T::stored(self.data), start, stride: self.stride, count, width: self.width }
    }

    /// Asks for rows that will be loaded soon.
    pub fn prefetch(&self, rows: Range<usize>) {
        let count = if self.stride == self.width { 1 } else { rows.len() };
        let len = if self.stride == self.width { rows.len() * self.width } else { self.width };
        for row in rows.start..rows.start + count {
            let range = self.start + row * self.stride..self.start + row * self.stride + len;
            match self.data {
                Slice::F16(x) => x.get(range).map(prefetch),
                Slice::BF16(x) => x.get(range).map(prefetch),
                Slice::F32(x) => x.get(range).map(prefetch),
                Slice::F64(x) => x.get(range).map(prefetch),
                Slice::U8(x) => x.get(range).map(prefetch),
            };
        }
    }
}

/// Stores the first `width` numbers of each row of a tile at consecutive rows of `into` from row `first` on.
pub fn store_rows<T: Number>(tile: &[T], padded: usize, width: usize, into: &mut SliceMut<'_>, first: usize) {
    if padded == width {
        return T::store(tile, into, first * width);
    }
    for (r, row) in tile.chunks_exact(padded).enumerate() {
        T::store(&row[..width], into, (first + r) * width);
    }
}

/// All elements of a view of any rank, row-major.
pub fn gather<T: Number>(view: &View<'_>) -> Vec<T> {
    let (dims, strides) = (view.dims(), view.strides());
    let (&width, outer) = dims.split_last().unwrap_or((&0, &[]));
    let rows: usize = outer.iter().product();
    let mut all = vec![T::ZERO; rows * width];
    if width == 0 {
        return all;
    }
    for (index, to) in all.chunks_exact_mut(width).enumerate() {
        let (mut rest, mut at) = (index, 0);
        for (&size, &stride) in outer.iter().zip(strides).rev() {
            at += rest % size * stride;
            rest /= size;
        }
        T::load(view.data(), at, to);
    }
    all
}
