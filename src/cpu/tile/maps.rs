//! Feature maps, and the weights of the linear engine.

use super::super::simd::{Real, Simd, exps, sigmoid};
use crate::linear::FeatureMap;

/// Vectors that are worked on side by side: an exponential is a chain of operations that wait for each other.
const CHAINS: usize = 4;

/// Writes an image of the vectors `$x` for every few of `$len` numbers at `$from`, which may be where they go. (A closure
/// would not be compiled for the instruction set.)
macro_rules! each {
    ($into:expr, $from:expr, $len:expr, $x:ident => $image:expr) => {{
        let (into, from, len, mut at) = ($into, $from, $len, 0);
        while at + CHAINS * S::LANES <= len {
            let mut $x = [S::load(from.add(at)); CHAINS];
            for i in 1..CHAINS {
                $x[i] = S::load(from.add(at + i * S::LANES));
            }
            let images = $image;
            for i in 0..CHAINS {
                S::store(into.add(at + i * S::LANES), images[i]);
            }
            at += CHAINS * S::LANES;
        }
        while at + S::LANES <= len {
            let mut $x = [S::load(from.add(at)); CHAINS];
            let images = $image;
            S::store(into.add(at), images[0]);
            at += S::LANES;
        }
    }};
}

/// φ of the maps that act on single numbers; other maps copy.
///
/// # Safety
/// The processor has the instruction set of S. What is beyond whole vectors is left out.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain indices unroll
pub unsafe fn map<T: Real, S: Simd<T>>(into: &mut [T], from: &[T], map: FeatureMap) {
    let len = into.len().min(from.len());
    let (to, from) = (into.as_mut_ptr(), from.as_ptr());
    // SAFETY: whole vectors below `len`.
    unsafe {
        let (zero, one) = (S::splat(T::ZERO), S::splat(T::ONE));
        match map {
            FeatureMap::EluPlusOne => each!(to, from, len, x => {
                let powers = exps::<T, S, CHAINS, false>(x);
                for i in 0..CHAINS {
                    x[i] = S::select_less(x[i], zero, powers[i], S::add(x[i], one));
                }
                x
            }),
            FeatureMap::Relu => each!(to, from, len, x => {
                for i in 0..CHAINS {
                    x[i] = S::max(zero, x[i]);
                }
                x
            }),
            FeatureMap::ReluSquared => each!(to, from, len, x => {
                for i in 0..CHAINS {
                    x[i] = S::mul(S::max(zero, x[i]), S::max(zero, x[i]));
                }
                x
            }),
            FeatureMap::Silu => each!(to, from, len, x => {
                for i in 0..CHAINS {
                    x[i] = S::mul(x[i], sigmoid::<T, S>(x[i]));
                }
                x
            }),
            FeatureMap::Exp => each!(to, from, len, x => {
                x = exps::<T, S, CHAINS, true>(x);
                x
            }),
            FeatureMap::Identity | FeatureMap::Softmax | FeatureMap::Taylor | FeatureMap::Cosine => {
                std::ptr::copy_nonoverlapping(from, to, len)
            }
        }
    }
}

/// dx = dφ ⊙ φ′(x) for the same maps, from x and φ(x).
///
/// # Safety
/// As [`map`], for all four tiles.
#[inline(always)]
pub unsafe fn map_gradient<T: Real, S: Simd<T>>(d_x: &mut [T], d_phi: &[T], x: &[T], phi: &[T], map: FeatureMap) {
    let rows = d_x.chunks_exact_mut(S::LANES).zip(d_phi.chunks_exact(S::LANES));
    for (((d_x, d_phi), x), phi) in rows.zip(x.chunks_exact(S::LANES)).zip(phi.chunks_exact(S::LANES)) {
        // SAFETY: whole vectors.
        unsafe {
            let (zero, one) = (S::splat(T::ZERO), S::splat(T::ONE));
            let (value, image) = (S::load(x.as_ptr()), S::load(phi.as_ptr()));
            let slope = match map {
                FeatureMap::EluPlusOne => S::min(one, image),
                FeatureMap::Relu => S::select_less(zero, value, one, zero),
                FeatureMap::ReluSquared => S::mul(S::splat(T::from_f64(2.0)), S::max(zero, value)),
                FeatureMap::Silu => {
                    let s = sigmoid::<T, S>(value);
                    S::mul(s, S::fma(value, S::sub(one, s), one))
                }
                FeatureMap::Exp => image,
                FeatureMap::Identity | FeatureMap::Softmax | FeatureMap::Taylor | FeatureMap::Cosine => one,
            };
            S::store(d_x.as_mut_ptr(), S::mul(S::load(d_phi.as_ptr()), slope));
        }
    }
}

/// Each row's largest number.
///
/// # Safety
/// The processor has the instruction set of S; rows are whole vectors.
#[inline(always)]
pub unsafe fn row_maxima<T: Real, S: Simd<T>>(tile: &[T], width: usize, maxima: &mut [T]) {
    for (row, maximum) in tile.chunks_exact(width).zip(maxima) {
        // SAFETY: whole vectors.
        unsafe {
            let mut largest = S::splat(T::NEG_INFINITY);
            for x in row.chunks_exact(S::LANES) {
                largest = S::max(S::load(x.as_ptr()), largest);
            }
            *maximum = S::largest(largest);
        }
    }
}

/// x → factor·exp(x − shift) with a shift per row.
///
/// # Safety
/// As [`row_maxima`].
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain indices unroll
pub unsafe fn exp_rows<T: Real, S: Simd<T>>(tile: &mut [T], width: usize, shifts: &[T], factor: T) {
    for (row, &shift) in tile.chunks_exact_mut(width).zip(shifts) {
        // SAFETY: whole vectors.
        unsafe {
            let (shift, factor) = (S::splat(shift), S::splat(factor));
            each!(row.as_mut_ptr(), row.as_ptr(), row.len(), x => {
                for i in 0..CHAINS {
                    x[i] = S::sub(x[i], shift);
                }
                x = exps::<T, S, CHAINS, true>(x);
                for i in 0..CHAINS {
                    x[i] = S::mul(x[i], factor);
                }
                x
            });
        }
    }
}

/// Inner products of each row with a vector.
///
/// # Safety
/// As [`row_maxima`]; `vector` has at least `width` numbers.
#[inline(always)]
pub unsafe fn row_products<T: Real, S: Simd<T>>(tile: &[T], width: usize, vector: &[T], products: &mut [T]) {
    for (row, product) in tile.chunks_exact(width).zip(products) {
        // SAFETY: whole vectors.
        unsafe {
            let mut sum = S::splat(T::ZERO);
            for (x, y) in row.chunks_exact(S::LANES).zip(vector.chunks_exact(S::LANES)) {
                sum = S::fma(S::load(x.as_ptr()), S::load(y.as_ptr()), sum);
            }
            *product = S::sum(sum);
        }
    }
}

/// Inner products of the rows of two tiles.
///
/// # Safety
/// As [`row_maxima`], for both tiles.
#[inline(always)]
pub unsafe fn row_pair_products<T: Real, S: Simd<T>>(a: &[T], b: &[T], width: usize, products: &mut [T]) {
    for ((a, b), product) in a.chunks_exact(width).zip(b.chunks_exact(width)).zip(products) {
        // SAFETY: whole vectors.
        unsafe { row_products::<T, S>(a, width, b, std::slice::from_mut(product)) }
    }
}

/// Adds factors\[r\]·vector to row r.
///
/// # Safety
/// As [`row_products`].
#[inline(always)]
pub unsafe fn add_outer<T: Real, S: Simd<T>>(tile: &mut [T], width: usize, factors: &[T], vector: &[T]) {
    for (row, &factor) in tile.chunks_exact_mut(width).zip(factors) {
        for (x, y) in row.chunks_exact_mut(S::LANES).zip(vector.chunks_exact(S::LANES)) {
            // SAFETY: whole vectors.
            unsafe { S::store(x.as_mut_ptr(), S::fma(S::splat(factor), S::load(y.as_ptr()), S::load(x.as_ptr()))) }
        }
    }
}

/// Adds factors\[r\] times row r of another tile.
///
/// # Safety
/// As [`row_maxima`], for both tiles.
#[inline(always)]
pub unsafe fn add_scaled<T: Real, S: Simd<T>>(tile: &mut [T], other: &[T], width: usize, factors: &[T]) {
    for ((row, other), factor) in tile.chunks_exact_mut(width).zip(other.chunks_exact(width)).zip(factors) {
        // SAFETY: whole vectors.
        unsafe { add_outer::<T, S>(row, width, std::slice::from_ref(factor), other) }
    }
}

/// tile ← tile ⊙ other
///
/// # Safety
/// As [`row_maxima`], for both tiles.
#[inline(always)]
pub unsafe fn multiply_elements<T: Real, S: Simd<T>>(tile: &mut [T], other: &[T]) {
    for (x, y) in tile.chunks_exact_mut(S::LANES).zip(other.chunks_exact(S::LANES)) {
        // SAFETY: whole vectors.
        unsafe { S::store(x.as_mut_ptr(), S::mul(S::load(x.as_ptr()), S::load(y.as_ptr()))) }
    }
}

/// Adds factors\[r\] times row r to a vector.
///
/// # Safety
/// As [`row_products`].
#[inline(always)]
pub unsafe fn add_rows<T: Real, S: Simd<T>>(vector: &mut [T], tile: &[T], width: usize, factors: &[T]) {
    for column in (0..width).step_by(S::LANES) {
        // SAFETY: whole vectors.
        unsafe {
            let to = vector[column..column + S::LANES].as_mut_ptr();
            // Two sums, as an addition waits for the one before.
            let (mut even, mut odd) = (S::load(to), S::splat(T::ZERO));
            let mut pairs = tile.chunks_exact(2 * width);
            for (rows, factors) in pairs.by_ref().zip(factors.chunks_exact(2)) {
                even = S::fma(S::splat(factors[0]), S::load(rows[column..].as_ptr()), even);
                odd = S::fma(S::splat(factors[1]), S::load(rows[width + column..].as_ptr()), odd);
            }
            let rest = pairs.remainder();
            if !rest.is_empty() {
                even = S::fma(S::splat(factors[tile.len() / width - 1]), S::load(rest[column..].as_ptr()), even);
            }
            S::store(to, S::add(even, odd));
        }
    }
}

/// into ← factor·a + b
///
/// # Safety
/// As [`row_maxima`], for all three.
#[inline(always)]
pub unsafe fn combine<T: Real, S: Simd<T>>(into: &mut [T], a: &[T], factor: T, b: &[T]) {
    let pairs = a.chunks_exact(S::LANES).zip(b.chunks_exact(S::LANES));
    for (to, (a, b)) in into.chunks_exact_mut(S::LANES).zip(pairs) {
        // SAFETY: whole vectors.
        unsafe { S::store(to.as_mut_ptr(), S::fma(S::splat(factor), S::load(a.as_ptr()), S::load(b.as_ptr()))) }
    }
}

/// into ← factors\[r\]·row r
///
/// # Safety
/// As [`row_maxima`], for both tiles.
#[inline(always)]
pub unsafe fn scaled_rows<T: Real, S: Simd<T>>(into: &mut [T], tile: &[T], width: usize, factors: &[T]) {
    for ((to, row), &factor) in into.chunks_exact_mut(width).zip(tile.chunks_exact(width)).zip(factors) {
        for (to, x) in to.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
            // SAFETY: a whole vector.
            unsafe { S::store(to.as_mut_ptr(), S::mul(S::load(x.as_ptr()), S::splat(factor))) }
        }
    }
}

/// Multiplies row r by factors\[r\].
///
/// # Safety
/// As [`row_maxima`].
#[inline(always)]
pub unsafe fn scale_rows<T: Real, S: Simd<T>>(tile: &mut [T], width: usize, factors: &[T]) {
    for (row, &factor) in tile.chunks_exact_mut(width).zip(factors) {
        for x in row.chunks_exact_mut(S::LANES) {
            // SAFETY: a whole vector.
            unsafe { S::store(x.as_mut_ptr(), S::mul(S::load(x.as_ptr()), S::splat(factor))) }
        }
    }
}

/// How sums shrink at each row of a tile.
#[derive(Clone, Copy)]
pub struct Decays<'a> {
    /// g, at most 0
    pub logs: &'a [f64],
    /// e^g
    pub factors: &'a [f64],
}

/// Multiplies entry (i, j) below the diagonal by exp(Σ_{j < t ≤ i} g_t) when the decays of the rows are given, zeroes the
/// entries above it as far as a product in strips of rows reads them, and writes the row sums that there is room for.
///
/// # Safety
/// As [`row_maxima`]; rows are at least as wide as there are rows, and at most 64 numbers.
#[inline(always)]
pub unsafe fn causal_weights<T: Real, S: Simd<T>>(
    tile: &mut [T],
    width: usize,
    decays: Option<Decays<'_>>,
    sums: &mut [T],
) {
    // From row to row, for every column: as a difference of sums over rows, what is small beside a large term would be lost.
    let (mut products, mut exponents) = ([1.0; 64], [0.0; 64]);
    let columns: [T; 64] = std::array::from_fn(|column| T::from_f64(column as f64));
    for (i, row) in tile.chunks_exact_mut(width).enumerate() {
        let diagonal = i / S::LANES * S::LANES;
        // SAFETY: whole vectors.
        unsafe {
            let zero = S::splat(T::ZERO);
            let (last, end) = (row.as_mut_ptr().add(diagonal), S::splat(T::from_f64((i - diagonal + 1) as f64)));
            S::store(last, S::select_less(S::load(columns.as_ptr()), end, S::load(last), zero));
            for column in (diagonal + S::LANES..width.min(i + S::ROWS)).step_by(S::LANES) {
                S::store(row.as_mut_ptr().add(column), zero);
            }
            let seen = &mut row[..diagonal + S::LANES];
            match decays {
                Some(decays) if T::IS_NARROW => {
                    products[..seen.len()].iter_mut().for_each(|product| *product *= decays.factors[i]);
                    products[i] = 1.0;
                    for (x, products) in seen.chunks_exact_mut(S::LANES).zip(products.chunks_exact(S::LANES)) {
                        for (x, &product) in x.iter_mut().zip(products) {
                            *x = *x * T::from_f64(product);
                        }
                    }
                }
                Some(decays) => {
                    exponents[..seen.len()].iter_mut().for_each(|exponent| *exponent += decays.logs[i]);
                    exponents[i] = 0.0;
                    for (x, exponents) in seen.chunks_exact_mut(S::LANES).zip(exponents.chunks_exact(S::LANES)) {
                        let mut powers = [T::ZERO; 64];
                        powers.iter_mut().zip(exponents).for_each(|(power, &e)| *power = T::from_f64(e));
                        let [power] = exps::<T, S, 1, false>([S::load(powers.as_ptr())]);
                        S::store(x.as_mut_ptr(), S::mul(S::load(x.as_ptr()), power));
                    }
                }
                None => {}
            }
            if let Some(sum) = sums.get_mut(i) {
                let mut total = zero;
                for x in seen.chunks_exact(S::LANES) {
                    total = S::add(total, S::load(x.as_ptr()));
                }
                *sum = S::sum(total);
            }
        }
    }
}
