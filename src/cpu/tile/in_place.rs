//! Products of a few rows with many rows that stay where they lie, in their own dtype: each of those is read once.

use half::{bf16, f16};

use super::super::simd::{MOST_LANES, Real, Simd, Stored};

/// Elements of one of the dtypes that are summed in T.
#[derive(Clone, Copy)]
pub enum Elements<'a, T> {
    Own(&'a [T]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// StoredRows in memory of the caller: element i of row j at `start + j·stride + i`.
#[derive(Clone, Copy)]
pub struct StoredRows<'a, T> {
    pub elements: Elements<'a, T>,
    pub start: usize,
    pub stride: usize,
    pub count: usize,
    pub width: usize,
}

impl<T> StoredRows<'_, T> {
    /// Panics unless every row is inside its slice.
    pub fn check(&self) {
        let len = match self.elements {
            Elements::Own(x) => x.len(),
            Elements::F16(x) => x.len(),
            Elements::BF16(x) => x.len(),
        };
        assert!(self.count == 0 || self.start + (self.count - 1) * self.stride + self.width <= len);
    }
}

/// Runs a generic function on elements of whichever dtype.
macro_rules! on_elements {
    ($rows:expr, |$lying:ident| $call:expr) => {
        // SAFETY: `StoredRows::check` has seen every row inside its slice.
        unsafe {
            match $rows.elements {
                Elements::Own(x) => {
                    let $lying = Lying::<T, S, T>::new(x, &$rows);
                    $call
                }
                Elements::F16(x) => {
                    let $lying = Lying::<T, S, f16>::new(x, &$rows);
                    $call
                }
                Elements::BF16(x) => {
                    let $lying = Lying::<T, S, bf16>::new(x, &$rows);
                    $call
                }
            }
        }
    };
}

/// Inner products of the rows of `left`, whole vectors filled up with zeros, with rows in place: that of left row r and
/// row j goes to `out[r·row + j]`.
///
/// # Safety
/// The processor has the instruction set of S; [`StoredRows::check`] holds, and `out` has room for each row of `left`.
#[inline(always)]
pub unsafe fn inner_products<T: Real, S: Simd<T>>(out: &mut [T], row: usize, left: &[T], rows: StoredRows<'_, T>) {
    let width = rows.width.next_multiple_of(S::LANES);
    let (left, count) = (Left { data: left.as_ptr(), width }, left.len() / width);
    let out = Out { data: out.as_mut_ptr(), row };
    on_elements!(rows, |lying| {
        let mut j = 0;
        macro_rules! keys {
            ($($keys:literal),*) => { $(
                while rows.count - j >= $keys {
                    lying.products::<$keys>(out, left, count, j);
                    j += $keys;
                }
            )* };
        }
        keys!(4, 1);
    })
}

/// Adds Σ_j weights\[r, j\]·(row j in place) to row r of `sums`, whose rows are whole vectors.
///
/// # Safety
/// As [`inner_products`]; `weights` has a row of at least `rows.count` numbers, `row` apart, for each row of `sums`.
#[inline(always)]
pub unsafe fn add_weighted<T: Real, S: Simd<T>>(sums: &mut [T], weights: &[T], row: usize, rows: StoredRows<'_, T>) {
    /// StoredRows that stay in the first-level cache while all sums take from them.
    const CHUNK: usize = 32;
    let width = rows.width.next_multiple_of(S::LANES);
    let count = sums.len() / width;
    let sums = Out { data: sums.as_mut_ptr(), row: width };
    on_elements!(rows, |lying| {
        for first in (0..rows.count).step_by(CHUNK) {
            let part = first..(first + CHUNK).min(rows.count);
            let mut r = 0;
            macro_rules! sums {
                ($($rows:literal by $vectors:literal),*) => { $(
                    while count - r >= $rows {
                        let weights = Left { data: weights.as_ptr().add(r * row), width: row };
                        lying.add::<$rows, $vectors>(sums.below(r), weights, part.clone());
                        r += $rows;
                    }
                )* };
            }
            sums!(4 by 2, 2 by 4, 1 by 8);
        }
    })
}

/// Writes decay·row + Σ left·right for each row in place, the decay that of the row or 1, the left numbers those of the row:
/// to rows of as many numbers, `row` apart.
///
/// # Safety
/// As [`inner_products`]; `into` has room for the rows, decays and left numbers are as many, right ones whole vectors as wide.
#[inline(always)]
pub unsafe fn faded_rows<T: Real, S: Simd<T>>(
    into: &mut [T],
    row: usize,
    rows: StoredRows<'_, T>,
    decays: Option<&[T]>,
    outer: &[(&[T], &[T])],
) {
    let Elements::Own(from) = rows.elements else { return };
    let whole = rows.width - rows.width % S::LANES;
    for j in 0..rows.count {
        let from = &from[rows.start + j * rows.stride..][..rows.width];
        let to = &mut into[j * row..][..rows.width];
        let decay = decays.map(|decays| decays[j]);
        // SAFETY: whole vectors of rows that were cut to their widths.
        unsafe {
            for column in (0..whole).step_by(S::LANES) {
                let mut x = S::load(from[column..].as_ptr());
                if let Some(decay) = decay {
                    x = S::mul(x, S::splat(decay));
                }
                for (left, right) in outer {
                    x = S::add(x, S::mul(S::splat(left[j]), S::load(right[column..][..S::LANES].as_ptr())));
                }
                S::store(to[column..].as_mut_ptr(), x);
            }
        }
        for column in whole..rows.width {
            let mut x = from[column];
            if let Some(decay) = decay {
                x = x * decay;
            }
            for (left, right) in outer {
                x += left[j] * right[column];
            }
            to[column] = x;
        }
    }
}

/// StoredRows of numbers, `width` apart.
#[derive(Clone, Copy)]
struct Left<T> {
    data: *const T,
    width: usize,
}

/// StoredRows of sums.
#[derive(Clone, Copy)]
struct Out<T> {
    data: *mut T,
    row: usize,
}

impl<T> Out<T> {
    fn below(self, r: usize) -> Self {
        Self { data: self.data.wrapping_add(r * self.row), ..self }
    }
}

/// StoredRows in place as vectors.
struct Lying<T: Real, S: Simd<T>, X> {
    first: *const X,
    stride: usize,
    /// The last place from which a whole vector may be read; before the elements if there is none.
    last: *const X,
    /// Whole vectors of a row, and the numbers behind them.
    whole: usize,
    rest: usize,
    /// 0, 1, 2, … and `rest`.
    lanes: S::V,
    limit: S::V,
}

// SAFETY of all: the caller has the instruction set of S, and every row lies inside the elements.
impl<T: Real, S: Simd<T>, X: Stored<T>> Lying<T, S, X> {
    #[inline(always)]
    unsafe fn new(elements: &[X], rows: &StoredRows<'_, T>) -> Self {
        let numbers: [T; MOST_LANES] = std::array::from_fn(|i| T::from_f64(i as f64));
        let (whole, rest) = (rows.width / S::LANES, rows.width % S::LANES);
        Self {
            first: elements.as_ptr().wrapping_add(rows.start),
            stride: rows.stride,
            last: elements.as_ptr().wrapping_add(elements.len()).wrapping_sub(S::LANES),
            whole,
            rest,
            lanes: unsafe { S::load(numbers.as_ptr()) },
            limit: unsafe { S::splat(T::from_f64(rest as f64)) },
        }
    }

    fn row(&self, j: usize) -> *const X {
        self.first.wrapping_add(j * self.stride)
    }

    /// Vector p of a row; the last one filled up with zeros.
    #[inline(always)]
    unsafe fn vector(&self, row: *const X, p: usize) -> S::V {
        unsafe { if p < self.whole { X::load::<S>(row.add(p * S::LANES)) } else { self.rest(row) } }
    }

    /// The numbers behind the whole vectors, filled up with zeros.
    #[inline(always)]
    unsafe fn rest(&self, row: *const X) -> S::V {
        unsafe {
            let from = row.add(self.whole * S::LANES);
            if from > self.last {
                let mut copy = [X::default(); MOST_LANES];
                std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), self.rest);
                return X::load::<S>(copy.as_ptr());
            }
            // What lies behind the row is read and dropped, NaN included.
            S::select_less(self.lanes, self.limit, X::load::<S>(from), S::splat(T::ZERO))
        }
    }

    /// Products of all of `left`'s `count` rows with KEYS rows from `j` on.
    #[inline(always)]
    unsafe fn products<const KEYS: usize>(&self, out: Out<T>, left: Left<T>, count: usize, j: usize) {
        unsafe {
            let mut r = 0;
            // Where there are 32 registers.
            while S::ROWS >= 8 && KEYS == 4 && count - r >= 6 {
                self.products_tile::<6, KEYS>(out, left, r, j);
                r += 6;
            }
            while count - r >= 4 {
                if S::ROWS >= 8 {
                    self.products_tile::<4, KEYS>(out, left, r, j);
                } else {
                    for pair in 0..KEYS / 2 {
                        self.products_tile::<4, 2>(out, left, r, j + 2 * pair);
                    }
                    if KEYS % 2 == 1 {
                        self.products_tile::<4, 1>(out, left, r, j + KEYS - 1);
                    }
                }
                r += 4;
            }
            while count > r {
                self.products_tile::<1, KEYS>(out, left, r, j);
                r += 1;
            }
        }
    }

    #[allow(clippy::needless_range_loop)] // plain indices unroll, so that the sums stay in registers
    #[inline(always)]
    unsafe fn products_tile<const ROWS: usize, const KEYS: usize>(
        &self,
        out: Out<T>,
        left: Left<T>,
        r: usize,
        j: usize,
    ) {
        unsafe {
            let mut sums = [[S::splat(T::ZERO); KEYS]; ROWS];
            for p in 0..self.whole + usize::from(self.rest > 0) {
                let mut x = [S::splat(T::ZERO); ROWS];
                for m in 0..ROWS {
                    x[m] = S::load(left.data.add((r + m) * left.width + p * S::LANES));
                }
                for n in 0..KEYS {
                    let column = self.vector(self.row(j + n), p);
                    for m in 0..ROWS {
                        sums[m][n] = S::fma(x[m], column, sums[m][n]);
                    }
                }
            }
            let to = out.data.add(r * out.row + j);
            if ROWS * KEYS < 4 {
                // In the order of four at once: a product is the same wherever it is computed.
                *to = S::sum_each([sums[0][0]; 4])[0];
            }
            for i in 0..ROWS * KEYS / 4 {
                // Four of one row where it has them, else the rows of one column.
                let mut four = [sums[0][0]; 4];
                for n in 0..4 {
                    four[n] = if KEYS >= 4 { sums[4 * i / KEYS][4 * i % KEYS + n] } else { sums[n][i] };
                }
                let four = S::sum_each(four);
                for n in 0..4 {
                    let (m, key) = if KEYS >= 4 { (4 * i / KEYS, 4 * i % KEYS + n) } else { (n, i) };
                    *to.add(m * out.row + key) = four[n];
                }
            }
        }
    }

    /// Adds weighted rows to ROWS sums, N vectors of them in registers at a time.
    #[inline(always)]
    unsafe fn add<const ROWS: usize, const N: usize>(
        &self,
        sums: Out<T>,
        weights: Left<T>,
        rows: std::ops::Range<usize>,
    ) {
        unsafe {
            let mut p = 0;
            while self.whole - p >= N {
                self.add_tile::<ROWS, N>(sums, weights, rows.clone(), p);
                p += N;
            }
            while self.whole + usize::from(self.rest > 0) > p {
                self.add_tile::<ROWS, 1>(sums, weights, rows.clone(), p);
                p += 1;
            }
        }
    }

    #[allow(clippy::needless_range_loop)] // as in `products_tile`
    #[inline(always)]
    unsafe fn add_tile<const ROWS: usize, const N: usize>(
        &self,
        sums: Out<T>,
        weights: Left<T>,
        rows: std::ops::Range<usize>,
        p: usize,
    ) {
        unsafe {
            let mut totals = [[S::splat(T::ZERO); N]; ROWS];
            for m in 0..ROWS {
                for n in 0..N {
                    totals[m][n] = S::load(sums.data.add(m * sums.row + (p + n) * S::LANES));
                }
            }
            for j in rows {
                let mut weight = [S::splat(T::ZERO); ROWS];
                for m in 0..ROWS {
                    weight[m] = S::splat(*weights.data.add(m * weights.width + j));
                }
                for n in 0..N {
                    let column = self.vector(self.row(j), p + n);
                    for m in 0..ROWS {
                        totals[m][n] = S::fma(weight[m], column, totals[m][n]);
                    }
                }
            }
            for m in 0..ROWS {
                for n in 0..N {
                    S::store(sums.data.add(m * sums.row + (p + n) * S::LANES), totals[m][n]);
                }
            }
        }
    }
}
