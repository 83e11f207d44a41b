//! Vectors at the end of slices of any length.

use super::super::simd::{MOST_LANES, Real, Simd};

/// The first numbers of a slice that is not empty; zeros where it ends.
///
/// # Safety
/// The processor has the instruction set of S.
#[inline(always)]
pub unsafe fn load<T: Real, S: Simd<T>>(from: &[T]) -> S::V {
    // SAFETY: a whole vector.
    unsafe {
        if from.len() >= S::LANES {
            return S::load(from.as_ptr());
        }
        let mut all = [T::ZERO; MOST_LANES];
        all[..from.len()].copy_from_slice(from);
        S::load(all.as_ptr())
    }
}

/// The vector, as far as there is room for it.
///
/// # Safety
/// As [`load`].
#[inline(always)]
pub unsafe fn store<T: Real, S: Simd<T>>(to: &mut [T], x: S::V) {
    // SAFETY: a whole vector.
    unsafe {
        if to.len() >= S::LANES {
            return S::store(to.as_mut_ptr(), x);
        }
        let mut all = [T::ZERO; MOST_LANES];
        S::store(all.as_mut_ptr(), x);
        to.copy_from_slice(&all[..to.len()]);
    }
}
