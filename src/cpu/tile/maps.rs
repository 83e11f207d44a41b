//! Feature maps, and the weights of the linear engine.

use super::super::simd::{Real, Simd, exp, sigmoid};
use crate::linear::FeatureMap;

/// φ of the maps that act on single numbers; other maps copy.
///
/// # Safety
/// The processor has the instruction set of S; the lengths are multiples of its lanes.
#[inline(always)]
pub unsafe fn map<T: Real, S: Simd<T>>(into: &mut [T], from: &[T], map: FeatureMap) {
    for (to, x) in into.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
        // SAFETY: a whole vector.
        unsafe {
            let (zero, one) = (S::splat(T::ZERO), S::splat(T::ONE));
            let value = S::load(x.as_ptr());
            let image = match map {
                FeatureMap::EluPlusOne => S::select_less(value, zero, exp::<T, S>(value), S::add(value, one)),
                FeatureMap::Relu => S::max(zero, value),
                FeatureMap::ReluSquared => S::mul(S::max(zero, value), S::max(zero, value)),
                FeatureMap::Silu => S::mul(value, sigmoid::<T, S>(value)),
                FeatureMap::Exp => exp::<T, S>(value),
                FeatureMap::Identity | FeatureMap::Softmax | FeatureMap::Taylor | FeatureMap::Cosine => value,
            };
            S::store(to.as_mut_ptr(), image);
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
pub unsafe fn exp_rows<T: Real, S: Simd<T>>(tile: &mut [T], width: usize, shifts: &[T], factor: T) {
    for (row, &shift) in tile.chunks_exact_mut(width).zip(shifts) {
        for x in row.chunks_exact_mut(S::LANES) {
            // SAFETY: a whole vector.
            unsafe {
                let power = exp::<T, S>(S::sub(S::load(x.as_ptr()), S::splat(shift)));
                S::store(x.as_mut_ptr(), S::mul(power, S::splat(factor)));
            }
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
    for (row, &factor) in tile.chunks_exact(width).zip(factors) {
        for (x, y) in vector.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
            // SAFETY: whole vectors.
            unsafe { S::store(x.as_mut_ptr(), S::fma(S::splat(factor), S::load(y.as_ptr()), S::load(x.as_ptr()))) }
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

/// Zeroes the entries above the diagonal, multiplies entry (i, j) below it by exp(Σ_{j < t ≤ i} g_t) when the
/// log-decays g of the rows are given, and writes the row sums that there is room for.
///
/// # Safety
/// As [`row_maxima`]; rows are at least as wide as there are rows, and at most 64 numbers.
#[inline(always)]
pub unsafe fn causal_weights<T: Real, S: Simd<T>>(tile: &mut [T], width: usize, logs: Option<&[f64]>, sums: &mut [T]) {
    let mut decays = [0.0; 64];
    let columns: [T; 64] = std::array::from_fn(|column| T::from_f64(column as f64));
    for (i, row) in tile.chunks_exact_mut(width).enumerate() {
        let diagonal = i / S::LANES * S::LANES;
        let (seen, hidden) = row.split_at_mut(diagonal + S::LANES);
        // SAFETY: whole vectors.
        unsafe {
            let zero = S::splat(T::ZERO);
            let (last, end) = (seen.as_mut_ptr().add(diagonal), S::splat(T::from_f64((i - diagonal + 1) as f64)));
            S::store(last, S::select_less(S::load(columns.as_ptr()), end, S::load(last), zero));
            hidden.chunks_exact_mut(S::LANES).for_each(|x| S::store(x.as_mut_ptr(), zero));
            if let Some(logs) = logs {
                // From row to row: a difference of sums over rows would lose what is small beside a large term.
                decays[..i].iter_mut().for_each(|decay| *decay += logs[i]);
                let mut powers = [T::ZERO; 64];
                powers[..i].iter_mut().zip(&decays).for_each(|(power, &decay)| *power = T::from_f64(decay));
                for (x, power) in seen.chunks_exact_mut(S::LANES).zip(powers.chunks_exact(S::LANES)) {
                    S::store(x.as_mut_ptr(), S::mul(S::load(x.as_ptr()), exp::<T, S>(S::load(power.as_ptr()))));
                }
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
