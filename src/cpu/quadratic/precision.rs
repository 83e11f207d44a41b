//! The operands of the forward products: numbers as they are summed, or pairs of bf16.

use super::super::buffer::Kept;
use super::super::rows::Number;
use super::super::tile::{Left, Pairs, Product, Right, Verbs};

/// How tiles become operands.
pub trait Precision<T: Number>: Copy + Sync {
    /// An element of an operand.
    type X: Kept + Send + Sync;

    /// Elements that hold `len` numbers along the inner dimension.
    fn inner(self, len: usize) -> usize;
    /// Writes rows, or as much of them as [`Precision::operand`] does not take from `rows` itself.
    fn narrow(self, rows: &[T], into: &mut [Self::X]);
    /// The left operand of rows that `narrow` has seen.
    fn operand<'a>(self, rows: &'a [T], narrowed: &'a [Self::X]) -> &'a [Self::X];
    /// Keys as the panels of their transpose.
    fn keys(self, verbs: &Verbs<T>, into: &mut [Self::X], rows: &[T], row: usize, count: usize, width: usize);
    /// Values as rows of a right operand.
    fn values(self, into: &mut [Self::X], rows: &[T], row: usize);
    fn multiply(
        self,
        verbs: &Verbs<T>,
        out: &mut [T],
        row: usize,
        left: Left<'_, Self::X>,
        right: Right<'_, Self::X>,
        size: Product,
    );
}

/// Numbers as they are summed.
#[derive(Clone, Copy)]
pub struct Plain;

impl<T: Number> Precision<T> for Plain {
    type X = T;

    fn inner(self, len: usize) -> usize {
        len
    }

    fn narrow(self, _rows: &[T], _into: &mut [T]) {}

    fn operand<'a>(self, rows: &'a [T], _narrowed: &'a [T]) -> &'a [T] {
        rows
    }

    fn keys(self, verbs: &Verbs<T>, into: &mut [T], rows: &[T], row: usize, count: usize, width: usize) {
        verbs.transpose(into, rows, row, count, width);
    }

    fn values(self, into: &mut [T], rows: &[T], _row: usize) {
        into.copy_from_slice(rows);
    }

    fn multiply(
        self,
        verbs: &Verbs<T>,
        out: &mut [T],
        row: usize,
        left: Left<'_, T>,
        right: Right<'_, T>,
        size: Product,
    ) {
        verbs.multiply(out, row, left, right, size);
    }
}

impl Precision<f32> for Pairs {
    type X = u32;

    fn inner(self, len: usize) -> usize {
        len.div_ceil(2)
    }

    fn narrow(self, rows: &[f32], into: &mut [u32]) {
        Pairs::narrow(self, rows, into);
    }

    fn operand<'a>(self, _rows: &'a [f32], narrowed: &'a [u32]) -> &'a [u32] {
        narrowed
    }

    fn keys(self, _verbs: &Verbs<f32>, into: &mut [u32], rows: &[f32], row: usize, count: usize, width: usize) {
        self.transpose(into, rows, row, count, width);
    }

    fn values(self, into: &mut [u32], rows: &[f32], row: usize) {
        self.interleave(into, rows, row);
    }

    fn multiply(
        self,
        _verbs: &Verbs<f32>,
        out: &mut [f32],
        row: usize,
        left: Left<'_, u32>,
        right: Right<'_, u32>,
        size: Product,
    ) {
        Pairs::multiply(self, out, row, left, right, size);
    }
}
