//! Sums of rows with a weight for every channel. Slices of any length, all of one.

use super::super::simd::{Real, Simd};
use super::parts::{load, store};

/// Vectors whose sums are in registers at a time.
const VECTORS: usize = 4;

/// into = Σ_j weights_j ⊙ rows_j
///
/// # Safety
/// The processor has the instruction set of S; as many rows as weights, all as long as `into`.
#[inline(always)]
pub unsafe fn weighted_rows<T: Real, S: Simd<T>>(into: &mut [T], weights: &[&[T]], rows: &[&[T]]) {
    let block = VECTORS * S::LANES;
    let whole = into.len() / block * block;
    for at in (0..whole).step_by(block) {
        // SAFETY: `VECTORS` vectors from `at` on are inside all of them.
        unsafe {
            let mut sums = [S::splat(T::ZERO); VECTORS];
            for (weights, row) in weights.iter().zip(rows) {
                let (weights, row) = (weights.as_ptr().add(at), row.as_ptr().add(at));
                for (vector, sum) in sums.iter_mut().enumerate() {
                    let lane = vector * S::LANES;
                    *sum = S::fma(S::load(weights.add(lane)), S::load(row.add(lane)), *sum);
                }
            }
            for (vector, sum) in sums.into_iter().enumerate() {
                S::store(into.as_mut_ptr().add(at + vector * S::LANES), sum);
            }
        }
    }
    for at in (whole..into.len()).step_by(S::LANES) {
        // SAFETY: the caller has the instruction set of S.
        unsafe {
            let mut sum = S::splat(T::ZERO);
            for (weights, row) in weights.iter().zip(rows) {
                sum = S::fma(load::<T, S>(&weights[at..]), load::<T, S>(&row[at..]), sum);
            }
            store::<T, S>(&mut into[at..], sum);
        }
    }
}

/// sums_j ← sums_j + row ⊙ rows_j, the sums one behind another, each as long as `row`.
///
/// # Safety
/// As [`weighted_rows`]; as many sums as rows.
#[inline(always)]
pub unsafe fn add_row_products<T: Real, S: Simd<T>>(sums: &mut [T], row: &[T], rows: &[&[T]]) {
    for (sums, other) in sums.chunks_exact_mut(row.len().max(1)).zip(rows) {
        let whole = row.len() / S::LANES * S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: a whole vector from `at` on is inside all three.
            unsafe {
                let to = sums.as_mut_ptr().add(at);
                let (a, b) = (S::load(row.as_ptr().add(at)), S::load(other.as_ptr().add(at)));
                S::store(to, S::fma(a, b, S::load(to)));
            }
        }
        if whole < row.len() {
            // SAFETY: the caller has the instruction set of S.
            unsafe {
                let (a, b) = (load::<T, S>(&row[whole..]), load::<T, S>(&other[whole..]));
                let sum = S::fma(a, b, load::<T, S>(&sums[whole..]));
                store::<T, S>(&mut sums[whole..], sum);
            }
        }
    }
}
