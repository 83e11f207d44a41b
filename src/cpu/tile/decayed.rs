//! Rows that fade from one to the next, each number at its own rate.

use super::super::simd::{Real, Simd};

/// Row r ← row r − 1 ⊙ factors of row r, from the second row on.
///
/// # Safety
/// The processor has the instruction set of S; rows are whole vectors, and as many as there are rows of factors.
#[inline(always)]
pub unsafe fn fade<T: Real, S: Simd<T>>(tile: &mut [T], width: usize, factors: &[T]) {
    for column in (0..width).step_by(S::LANES) {
        // SAFETY: whole vectors of every row.
        unsafe {
            let mut at = tile[column..column + S::LANES].as_mut_ptr();
            let mut x = S::load(at);
            for factors in factors.chunks_exact(width).skip(1) {
                at = at.add(width);
                x = S::mul(x, S::load(factors.as_ptr().add(column)));
                S::store(at, x);
            }
        }
    }
}

/// Row r ← row r + row r + 1 ⊙ factors of row r + 1, from the last row but one up.
///
/// # Safety
/// As [`fade`].
#[inline(always)]
pub unsafe fn gather_faded<T: Real, S: Simd<T>>(tile: &mut [T], width: usize, factors: &[T]) {
    let rows = tile.len() / width;
    for column in (0..width).step_by(S::LANES) {
        // SAFETY: whole vectors of every row.
        unsafe {
            let mut x = S::splat(T::ZERO);
            for row in (0..rows).rev() {
                let at = tile[row * width + column..][..S::LANES].as_mut_ptr();
                if row + 1 < rows {
                    x = S::mul(x, S::load(factors[(row + 1) * width + column..][..S::LANES].as_ptr()));
                }
                x = S::add(S::load(at), x);
                S::store(at, x);
            }
        }
    }
}

/// Adds the inner products of the rows of two tiles, of `width` numbers, `row` apart.
///
/// # Safety
/// As [`fade`]; both tiles have as many rows as there are products.
#[inline(always)]
pub unsafe fn add_row_pair_products<T: Real, S: Simd<T>>(
    products: &mut [T],
    tiles: [&[T]; 2],
    row: usize,
    width: usize,
) {
    for (r, product) in products.iter_mut().enumerate() {
        let [a, b] = tiles.map(|tile| &tile[r * row..][..width]);
        // SAFETY: whole vectors.
        unsafe {
            let mut sum = S::splat(T::ZERO);
            for (x, y) in a.chunks_exact(S::LANES).zip(b.chunks_exact(S::LANES)) {
                sum = S::fma(S::load(x.as_ptr()), S::load(y.as_ptr()), sum);
            }
            *product += S::sum(sum);
        }
    }
}

/// into ← into + a ⊙ b
///
/// # Safety
/// As [`fade`], for all three.
#[inline(always)]
pub unsafe fn add_products<T: Real, S: Simd<T>>(into: &mut [T], a: &[T], b: &[T]) {
    let pairs = a.chunks_exact(S::LANES).zip(b.chunks_exact(S::LANES));
    for (to, (a, b)) in into.chunks_exact_mut(S::LANES).zip(pairs) {
        // SAFETY: whole vectors.
        unsafe { S::store(to.as_mut_ptr(), S::fma(S::load(a.as_ptr()), S::load(b.as_ptr()), S::load(to.as_ptr()))) }
    }
}
