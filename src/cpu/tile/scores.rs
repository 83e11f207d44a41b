//! Scores of a strip of query rows against a tile of keys, turned into weights and back into gradients.

use std::f64::consts::LOG2_E;

use super::super::simd::{Real, Simd, exp2, tanh};

/// The columns of a row that its query sees, inside a tile.
pub type Bounds = (usize, usize);

/// The whole vectors that cover `bounds`.
#[inline(always)]
fn covering((low, high): Bounds, lanes: usize) -> std::ops::Range<usize> {
    if low >= high { 0..0 } else { low / lanes * lanes..high.next_multiple_of(lanes) }
}

/// Zeroes a row outside `bounds` and returns the whole vectors that cover the bounds, their hidden entries set
/// to `hidden`.
#[inline(always)]
fn cover<T: Real>(row: &mut [T], bounds: Bounds, lanes: usize, hidden: T) -> std::ops::Range<usize> {
    let ((low, high), range) = (bounds, covering(bounds, lanes));
    if range.is_empty() {
        row.fill(T::ZERO);
    } else if bounds != (0, row.len()) {
        row[..range.start].fill(T::ZERO);
        row[range.start..low].fill(hidden);
        row[high..range.end].fill(hidden);
        row[range.end..].fill(T::ZERO);
    }
    range
}

/// The largest number of whole vectors.
///
/// # Safety
/// The processor has the instruction set of S.
#[inline(always)]
unsafe fn largest<T: Real, S: Simd<T>>(row: &[T]) -> T {
    // SAFETY: whole vectors. Several maxima at a time do not wait for each other.
    unsafe {
        let mut largest = [S::splat(T::NEG_INFINITY); 4];
        let (fours, rest) = (row.chunks_exact(4 * S::LANES), row.chunks_exact(4 * S::LANES).remainder());
        for four in fours {
            for (i, largest) in largest.iter_mut().enumerate() {
                *largest = S::max(S::load(four.as_ptr().add(i * S::LANES)), *largest);
            }
        }
        for x in rest.chunks_exact(S::LANES) {
            largest[0] = S::max(S::load(x.as_ptr()), largest[0]);
        }
        S::largest(S::max(S::max(largest[0], largest[1]), S::max(largest[2], largest[3])))
    }
}

/// How far scores times log₂ e may exceed the running maximum before it moves: weights stay below 2^SLACK.
const SLACK: f64 = 8.0;

/// Online-softmax state of a strip: per row the running maximum of the scores times log₂ e to within [`SLACK`], the
/// running sum, and the factor that brings earlier sums to the new maximum.
pub struct Online<'a, T> {
    pub maximum: &'a mut [T],
    pub sum: &'a mut [T],
    pub rescale: &'a mut [T],
}

/// Scores → exp(scale·s − maximum) in place, zero where hidden; updates the running state.
///
/// # Safety
/// The processor has the instruction set of S; `width` is a multiple of its lanes.
#[inline(always)]
pub unsafe fn softmax<T: Real, S: Simd<T>>(
    scores: &mut [T],
    width: usize,
    bounds: &[Bounds],
    scale: T,
    online: &mut Online<'_, T>,
) {
    let scale = scale * T::from_f64(LOG2_E);
    // All maxima before the first weight, so that no row waits for its own.
    for (r, (row, &bounds)) in scores.chunks_exact_mut(width).zip(bounds).enumerate() {
        let range = cover(row, bounds, S::LANES, T::NEG_INFINITY);
        // SAFETY: the range is whole vectors.
        let (old, new) = (online.maximum[r], unsafe { largest::<T, S>(&row[range]) } * scale);
        online.rescale[r] = if new > old + T::from_f64(SLACK) { new } else { old };
    }
    for (r, (row, &bounds)) in scores.chunks_exact_mut(width).zip(bounds).enumerate() {
        let row = &mut row[covering(bounds, S::LANES)];
        let (old, new) = (online.maximum[r], std::mem::replace(&mut online.rescale[r], T::ONE));
        if row.is_empty() {
            continue;
        }
        if new == T::NEG_INFINITY {
            row.fill(T::ZERO);
            continue;
        }
        // SAFETY: the row is whole vectors.
        unsafe {
            let (scale, shift) = (S::splat(scale), S::splat(-new));
            let mut sum = S::splat(T::ZERO);
            for x in row.chunks_exact_mut(S::LANES) {
                let p = exp2::<T, S>(S::fma(S::load(x.as_ptr()), scale, shift));
                sum = S::add(sum, p);
                S::store(x.as_mut_ptr(), p);
            }
            if new != old {
                // Nothing is there to bring to the first maximum.
                online.rescale[r] = if old == T::NEG_INFINITY { T::ONE } else { (old - new).exp2() };
                online.maximum[r] = new;
            }
            online.sum[r] = online.sum[r] * online.rescale[r] + S::sum(sum);
        }
    }
}

/// What is taken off the gradients dP of the weights of a row.
#[derive(Clone, Copy)]
pub struct Delta<'a, T> {
    /// Of each row.
    pub delta: &'a [T],
    /// Rows whose keys all lie in this tile, of which the mean of dP is taken off, too, with weights that sum up to 1. It is
    /// made of the very numbers that it is taken off, so that what cancels leaves nothing.
    pub is_whole: &'a [bool],
    /// ε, where weights are divided by their sum and ε; the tile's weights are those before the division.
    pub epsilon: Option<T>,
}

/// Scores → P = exp(scale·s − L), and dP → dS = P ⊙ (dP − δ), both in place, zero where hidden. Whole rows of P are divided
/// by their sum, which is 1 but for rounding.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
pub unsafe fn softmax_gradient<T: Real, S: Simd<T>>(
    scores: &mut [T],
    d_scores: &mut [T],
    width: usize,
    bounds: &[Bounds],
    scale: T,
    statistic: &[T],
    delta: Delta<'_, T>,
) {
    let log2_e = T::from_f64(LOG2_E);
    let rows = scores.chunks_exact_mut(width).zip(d_scores.chunks_exact_mut(width));
    for (r, ((row, d_row), &bounds)) in rows.zip(bounds).enumerate() {
        let bounds = if statistic[r] == T::NEG_INFINITY { (0, 0) } else { bounds };
        let range = cover(row, bounds, S::LANES, T::NEG_INFINITY);
        cover(d_row, bounds, S::LANES, T::ZERO);
        let (row, d_row) = (&mut row[range.clone()], &mut d_row[range]);
        // SAFETY: the rows are whole vectors.
        unsafe {
            let (scale, shift) = (S::splat(scale * log2_e), S::splat(-statistic[r] * log2_e));
            let own = S::splat(delta.delta[r]);
            if delta.is_whole[r] && !row.is_empty() {
                let mut sum = S::splat(T::ZERO);
                for x in row.chunks_exact_mut(S::LANES) {
                    let p = exp2::<T, S>(S::fma(S::load(x.as_ptr()), scale, shift));
                    sum = S::add(sum, p);
                    S::store(x.as_mut_ptr(), p);
                }
                let sum = S::sum(sum);
                if sum == T::ZERO {
                    // Another tile has the keys that the key mask leaves.
                    d_row.fill(T::ZERO);
                    continue;
                }
                let (sum, mut mean) = (S::splat(sum), S::splat(T::ZERO));
                for (x, d) in row.chunks_exact_mut(S::LANES).zip(d_row.chunks_exact(S::LANES)) {
                    let p = S::div(S::load(x.as_ptr()), sum);
                    mean = S::fma(p, S::load(d.as_ptr()), mean);
                    S::store(x.as_mut_ptr(), p);
                }
                let mean = S::splat(S::sum(mean));
                for (x, d) in row.chunks_exact(S::LANES).zip(d_row.chunks_exact_mut(S::LANES)) {
                    let rest = S::sub(S::sub(S::load(d.as_ptr()), mean), own);
                    S::store(d.as_mut_ptr(), S::mul(S::load(x.as_ptr()), rest));
                }
                continue;
            }
            for (x, d) in row.chunks_exact_mut(S::LANES).zip(d_row.chunks_exact_mut(S::LANES)) {
                let p = exp2::<T, S>(S::fma(S::load(x.as_ptr()), scale, shift));
                S::store(x.as_mut_ptr(), p);
                S::store(d.as_mut_ptr(), S::mul(p, S::sub(S::load(d.as_ptr()), own)));
            }
        }
    }
}

/// Scores → relu(scale·s), squared on demand, in place, zero where hidden; adds the row sums to `sums`.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
pub unsafe fn relu<T: Real, S: Simd<T>>(
    scores: &mut [T],
    width: usize,
    bounds: &[Bounds],
    scale: T,
    squared: bool,
    sums: &mut [T],
) {
    for (r, (row, &bounds)) in scores.chunks_exact_mut(width).zip(bounds).enumerate() {
        let range = cover(row, bounds, S::LANES, T::ZERO);
        // SAFETY: the row is whole vectors.
        unsafe {
            let (scale, mut sum) = (S::splat(scale), S::splat(T::ZERO));
            for x in row[range].chunks_exact_mut(S::LANES) {
                let w = rectified::<T, S>(S::load(x.as_ptr()), scale, squared);
                sum = S::add(sum, w);
                S::store(x.as_mut_ptr(), w);
            }
            sums[r] += S::sum(sum);
        }
    }
}

/// Scores → weights as in [`relu`], and dP → dS = weight′ ⊙ (dP − δ), both in place, zero where hidden.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
pub unsafe fn relu_gradient<T: Real, S: Simd<T>>(
    scores: &mut [T],
    d_scores: &mut [T],
    width: usize,
    bounds: &[Bounds],
    scale: T,
    squared: bool,
    delta: Delta<'_, T>,
) {
    let rows = scores.chunks_exact_mut(width).zip(d_scores.chunks_exact_mut(width));
    for (r, ((row, d_row), &bounds)) in rows.zip(bounds).enumerate() {
        let range = cover(row, bounds, S::LANES, T::ZERO);
        cover(d_row, bounds, S::LANES, T::ZERO);
        let (row, d_row) = (&mut row[range.clone()], &mut d_row[range]);
        // SAFETY: the rows are whole vectors.
        unsafe {
            let (scale, zero, one) = (S::splat(scale), S::splat(T::ZERO), S::splat(T::ONE));
            let mut own = S::splat(delta.delta[r]);
            if let (true, Some(epsilon)) = (delta.is_whole[r] && !row.is_empty(), delta.epsilon) {
                own = S::add(own, mean_gradient::<T, S>(row, d_row, scale, squared, epsilon));
            }
            for (x, d) in row.chunks_exact_mut(S::LANES).zip(d_row.chunks_exact_mut(S::LANES)) {
                let s = S::max(zero, S::mul(S::load(x.as_ptr()), scale));
                let slope = if squared { S::add(s, s) } else { S::select_less(zero, s, one, zero) };
                S::store(x.as_mut_ptr(), if squared { S::mul(s, s) } else { s });
                let dp = S::sub(S::load(d.as_ptr()), own);
                S::store(d.as_mut_ptr(), S::select_less(zero, s, S::mul(slope, dp), zero));
            }
        }
    }
}

/// relu(scale·s), squared on demand.
///
/// # Safety
/// The processor has the instruction set of S.
#[inline(always)]
unsafe fn rectified<T: Real, S: Simd<T>>(score: S::V, scale: S::V, squared: bool) -> S::V {
    // SAFETY: no pointers.
    unsafe {
        let s = S::max(S::splat(T::ZERO), S::mul(score, scale));
        if squared { S::mul(s, s) } else { s }
    }
}

/// Σ w dP / (Σ w + ε) of a row of scores, on all lanes.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
unsafe fn mean_gradient<T: Real, S: Simd<T>>(row: &[T], d_row: &[T], scale: S::V, squared: bool, epsilon: T) -> S::V {
    // SAFETY: the rows are whole vectors.
    unsafe {
        let zero = S::splat(T::ZERO);
        let mut sum = zero;
        for x in row.chunks_exact(S::LANES) {
            sum = S::add(sum, rectified::<T, S>(S::load(x.as_ptr()), scale, squared));
        }
        let divisor = S::sum(sum) + epsilon;
        if divisor == T::ZERO {
            return zero;
        }
        let (divisor, mut mean) = (S::splat(divisor), zero);
        for (x, d) in row.chunks_exact(S::LANES).zip(d_row.chunks_exact(S::LANES)) {
            let weight = rectified::<T, S>(S::load(x.as_ptr()), scale, squared);
            mean = S::fma(S::div(weight, divisor), S::load(d.as_ptr()), mean);
        }
        S::splat(S::sum(mean))
    }
}

/// x → tanh(scale·x), whole vectors.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
pub unsafe fn scaled_tanh<T: Real, S: Simd<T>>(row: &mut [T], scale: T) {
    for x in row.chunks_exact_mut(S::LANES) {
        // SAFETY: a whole vector.
        unsafe { S::store(x.as_mut_ptr(), tanh::<T, S>(S::mul(S::load(x.as_ptr()), S::splat(scale)))) }
    }
}
