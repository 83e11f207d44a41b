//! Tile products: out (+)= left · right.

use std::hint::black_box;

use super::super::simd::{MultiplyAdd, Plain, Real, Simd};

/// Vectors in a column panel: a right operand is read in panels of `PANEL_VECTORS · LANES` columns.
pub const PANEL_VECTORS: usize = 2;

/// A left operand: element (i, p) at `i·row + p·col`, so that a transposed tile needs no copy.
#[derive(Clone, Copy)]
pub struct Left<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

impl<'a, T> Left<'a, T> {
    /// A row-major tile.
    pub fn rows(data: &'a [T], row: usize) -> Self {
        Self { data, row, col: 1 }
    }

    /// The transpose of a row-major tile.
    pub fn transposed(data: &'a [T], row: usize) -> Self {
        Self { data, row: 1, col: row }
    }
}

/// A right operand in column panels: element (p, j) at `(j / w)·panel + p·row + j % w` with w the panel width.
#[derive(Clone, Copy)]
pub struct Right<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub panel: usize,
}

/// What is left out of a product whose left or result is a causal tile: entries above a diagonal are neither read
/// nor written. Row i of the tile has its first hidden column at or before i + `offset`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Band {
    /// Nothing.
    Full,
    /// The result: columns j ≥ i + offset may be skipped.
    Result(i64),
    /// The left operand: inner indices p ≥ i + offset are zero.
    Left(i64),
    /// The left operand transposed: inner indices p with i ≥ p + offset are zero.
    Transposed(i64),
}

impl Band {
    /// Columns and inner range that rows `i..end` need.
    fn limits(self, i: usize, end: usize, n: usize, k: usize) -> (usize, std::ops::Range<usize>) {
        let last = (end - 1) as i64;
        let upto = |limit: i64, size: usize| limit.clamp(0, size as i64) as usize;
        match self {
            Self::Full => (n, 0..k),
            Self::Result(offset) => (upto(last + offset, n), 0..k),
            Self::Left(offset) => (n, 0..upto(last + offset, k)),
            Self::Transposed(offset) => (n, upto(i as i64 - offset + 1, k)..k),
        }
    }
}

/// Sizes of a product and what to do with the old result.
#[derive(Clone, Copy)]
pub struct Product {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result, a multiple of the vector length.
    pub n: usize,
    /// Inner size.
    pub k: usize,
    /// Whether the result is added to.
    pub accumulate: bool,
    pub band: Band,
}

/// Where the result of a product lies: element (i, j) at `(j / w)·panel + i·row + j % w`, with w the panel width.
#[derive(Clone, Copy)]
pub struct Place {
    pub row: usize,
    pub panel: usize,
}

/// Panics unless every element that the product touches is inside its slice.
pub fn check<T, X>(
    out: &[T],
    to: Place,
    left: &Left<'_, X>,
    right: &Right<'_, X>,
    size: &Product,
    panel: usize,
    lanes: usize,
) {
    let Product { m, n, k, .. } = *size;
    if m == 0 || n == 0 {
        return;
    }
    let last = (n - 1) / panel;
    assert!(n.is_multiple_of(lanes) && last * to.panel + (m - 1) * to.row + (n - last * panel) <= out.len());
    if k > 0 {
        assert!((m - 1) * left.row + (k - 1) * left.col < left.data.len());
        assert!(last * right.panel + (k - 1) * right.row + (n - last * panel) <= right.data.len());
    }
}

/// out (+)= left · right.
///
/// # Safety
/// The processor has the instruction set of S, and [`check`] holds.
#[inline(always)]
pub unsafe fn multiply<T: Real, S: Simd<T>, M: MultiplyAdd<T, S>>(
    out: &mut [T],
    to: Place,
    left: Left<'_, M::X>,
    right: Right<'_, M::X>,
    size: Product,
) {
    let width = PANEL_VECTORS * S::LANES;
    let mut column = 0;
    while column < size.n {
        let mut i = 0;
        while i < size.m {
            let rows = strip(size.m - i, S::ROWS);
            let (n, inner) = size.band.limits(i, i + rows, size.n, size.k);
            if column < n {
                let k = inner.len();
                // SAFETY: inside the bounds that `check` has verified.
                unsafe {
                    let a = left.data.as_ptr().add(if k > 0 { i * left.row + inner.start * left.col } else { 0 });
                    let b = right.data.as_ptr().add(if k > 0 {
                        column / width * right.panel + inner.start * right.row
                    } else {
                        0
                    });
                    let c = out.as_mut_ptr().add(column / width * to.panel + i * to.row);
                    let strip = Strip {
                        a,
                        row: left.row,
                        col: left.col,
                        b,
                        b_row: right.row,
                        c,
                        c_row: to.row,
                        k,
                        accumulate: size.accumulate,
                    };
                    if n - column > S::LANES {
                        strip.run::<S, M, PANEL_VECTORS>(rows)
                    } else {
                        strip.run::<S, M, 1>(rows)
                    }
                }
            }
            i += rows;
        }
        column += width;
    }
}

/// [`multiply`] with operands of the type of the sums.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
pub unsafe fn plain<T: Real, S: Simd<T>>(
    out: &mut [T],
    to: Place,
    left: Left<'_, T>,
    right: Right<'_, T>,
    size: Product,
) {
    // SAFETY: the caller's.
    unsafe { multiply::<T, S, Plain>(out, to, left, right, size) }
}

/// Rows of the next register tile: `most`, but 8 as 4 and 4, as 2 rows have too few sums to hide the latency of an
/// addition.
#[inline(always)]
fn strip(left: usize, most: usize) -> usize {
    if most == 6 && left == 8 { 4 } else { left.min(most) }
}

/// A few rows of the result in one column panel.
struct Strip<T, X> {
    a: *const X,
    row: usize,
    col: usize,
    b: *const X,
    b_row: usize,
    c: *mut T,
    c_row: usize,
    k: usize,
    accumulate: bool,
}

impl<T: Real, X: Copy> Strip<T, X> {
    /// Splits `rows` into register tiles of a constant number of rows.
    #[inline(always)]
    unsafe fn run<S: Simd<T>, M: MultiplyAdd<T, S, X = X>, const N: usize>(mut self, mut rows: usize) {
        // SAFETY: every tile lies in the rows that the caller vouches for.
        unsafe {
            macro_rules! tiles {
                ($($m:literal),*) => { $(
                    while rows >= $m && $m <= S::ROWS {
                        self.tile::<S, M, $m, N>();
                        self.a = self.a.wrapping_add($m * self.row);
                        self.c = self.c.wrapping_add($m * self.c_row);
                        rows -= $m;
                    }
                )* };
            }
            tiles!(8, 6, 4, 2, 1);
        }
    }

    #[allow(clippy::needless_range_loop)] // plain indices unroll, so that the sums stay in registers
    /// The result tile of ROWS rows × N vectors, kept in registers over the inner dimension.
    #[inline(always)]
    unsafe fn tile<S: Simd<T>, M: MultiplyAdd<T, S, X = X>, const ROWS: usize, const N: usize>(&self) {
        // SAFETY: see `run`.
        unsafe {
            let mut sums = [[S::splat(T::ZERO); N]; ROWS];
            // Every third row has a pointer that the compiler cannot derive from the others: it would walk from row to row by
            // additions that wait for each other, as long a chain as the multiply-adds need.
            let mut a = [0, 3, 6].map(|m| if m < ROWS { self.a.wrapping_add(m * self.row) } else { self.a });
            if ROWS > 3 {
                a = black_box(a);
            }
            let mut b = self.b;
            for _ in 0..self.k {
                let mut columns = [M::load(b); N];
                for n in 1..N {
                    columns[n] = M::load(b.add(n * S::LANES));
                }
                for m in 0..ROWS {
                    let x = M::splat(*a[m / 3].wrapping_add(m % 3 * self.row));
                    for n in 0..N {
                        sums[m][n] = M::multiply_add(x, columns[n], sums[m][n]);
                    }
                }
                for a in &mut a {
                    *a = a.wrapping_add(self.col);
                }
                b = b.wrapping_add(self.b_row);
            }
            for m in 0..ROWS {
                for n in 0..N {
                    let to = self.c.add(m * self.c_row + n * S::LANES);
                    let old = if self.accumulate { S::load(to) } else { S::splat(T::ZERO) };
                    S::store(to, S::add(old, sums[m][n]));
                }
            }
        }
    }
}
