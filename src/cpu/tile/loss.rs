//! Rows of logits, of any length.

use super::super::simd::{Real, Simd, exp};
use super::parts::{load, store};

/// Numbers that are summed before the sum goes into a wider one.
const PIECE: usize = 1024;

/// ln Σ exp(x), of a row that is not empty.
///
/// # Safety
/// The processor has the instruction set of S.
#[inline(always)]
pub unsafe fn log_sum_exp<T: Real, S: Simd<T>>(row: &[T], result: &mut T) {
    let whole = row.len() / S::LANES * S::LANES;
    // SAFETY: whole vectors.
    unsafe {
        let mut largest = S::splat(row[0]);
        for x in row[..whole].chunks_exact(S::LANES) {
            largest = S::max(S::load(x.as_ptr()), largest);
        }
        let largest =
            row[whole..].iter().fold(S::largest(largest), |largest, &x| if x > largest { x } else { largest });
        // Where every number is −∞ or one is +∞.
        let shift = if largest.to_f64().is_finite() { largest } else { T::ZERO };
        let mut total = 0.0;
        for piece in row[..whole].chunks(PIECE) {
            let mut sum = S::splat(T::ZERO);
            for x in piece.chunks_exact(S::LANES) {
                sum = S::add(sum, exp::<T, S>(S::sub(S::load(x.as_ptr()), S::splat(shift))));
            }
            total += S::sum(sum).to_f64();
        }
        total += row[whole..].iter().map(|&x| (x - shift).exp().to_f64()).sum::<f64>();
        *result = T::from_f64(shift.to_f64() + total.ln());
    }
}

/// into = factor·exp(x − shift)
///
/// # Safety
/// As [`log_sum_exp`].
#[inline(always)]
pub unsafe fn scaled_exp<T: Real, S: Simd<T>>(into: &mut [T], row: &[T], shift: T, factor: T) {
    for (piece, to) in into.chunks_mut(S::LANES).enumerate() {
        // SAFETY: as here.
        unsafe {
            let x = load::<T, S>(&row[piece * S::LANES..]);
            store::<T, S>(to, S::mul(exp::<T, S>(S::sub(x, S::splat(shift))), S::splat(factor)));
        }
    }
}
