//! Scores of a strip of query rows against a tile of keys, turned into weights and back into gradients.

use std::f64::consts::LOG2_E;

use super::super::simd::{Real, Simd, exp2, exp2s, tanh};

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

/// How far scores times log₂ e may exceed the running maximum before it moves: weights stay below 2^SLACK.
const SLACK: f64 = 8.0;

/// Online-softmax state of a strip: per row the running maximum of the scores times log₂ e to within [`SLACK`], the
/// running sum, and the factor that brings earlier sums to the new maximum.
pub struct Online<'a, T> {
    pub maximum: &'a mut [T],
    pub sum: &'a mut [T],
    pub rescale: &'a mut [T],
}

/// Rows whose weights are made side by side.
const GROUP: usize = 4;

/// Calls the function for each group of the rows, and for each row that is left.
macro_rules! in_groups {
    ($rows:expr, $function:ident($($argument:expr),*)) => {{
        let mut first = 0;
        while $rows - first >= GROUP {
            $function::<T, S, GROUP>(first, $($argument),*);
            first += GROUP;
        }
        while first < $rows {
            $function::<T, S, 1>(first, $($argument),*);
            first += 1;
        }
    }};
}

/// Scores → exp(scale·s − maximum) in place, zero where hidden; updates the running state.
///
/// # Safety
/// The processor has the instruction set of S; `width` is a multiple of its lanes; there is a row of scores and a running state
/// for each of the bounds.
#[inline(always)]
pub unsafe fn softmax<T: Real, S: Simd<T>>(
    scores: &mut [T],
    width: usize,
    bounds: &[Bounds],
    scale: T,
    online: &mut Online<'_, T>,
) {
    let scale = scale * T::from_f64(LOG2_E);
    // SAFETY: the caller's. All maxima before the first weight, so that no row waits for its own.
    unsafe {
        in_groups!(bounds.len(), move_maxima(scores, width, bounds, scale, online));
        in_groups!(bounds.len(), weigh(scores, width, bounds, scale, online));
    }
}

/// The whole vectors that cover the bounds of all rows.
#[inline(always)]
fn covering_all(bounds: &[Bounds], lanes: usize) -> std::ops::Range<usize> {
    let seeing = bounds.iter().filter(|&&(low, high)| low < high);
    let (low, high) = seeing.fold((usize::MAX, 0), |all, &(low, high)| (all.0.min(low), all.1.max(high)));
    covering((low, high), lanes)
}

/// Hides what rows from `first` on do not see, as far as a row of the group sees anything, zeroes the rest and moves the maxima;
/// `online.rescale` receives the old ones.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
unsafe fn move_maxima<T: Real, S: Simd<T>, const ROWS: usize>(
    first: usize,
    scores: &mut [T],
    width: usize,
    bounds: &[Bounds],
    scale: T,
    online: &mut Online<'_, T>,
) {
    let (scores, bounds) = (&mut scores[first * width..][..ROWS * width], &bounds[first..][..ROWS]);
    let range = covering_all(bounds, S::LANES);
    for (row, &(low, high)) in scores.chunks_exact_mut(width).zip(bounds) {
        if (low, high) != (0, width) {
            let (low, high) = if low < high { (low, high) } else { (range.end, range.end) };
            row[..range.start].fill(T::ZERO);
            row[range.start..low].fill(T::NEG_INFINITY);
            row[high..range.end].fill(T::NEG_INFINITY);
            row[range.end..].fill(T::ZERO);
        }
    }
    let (maximum, rescale) = (&mut online.maximum[first..][..ROWS], &mut online.rescale[first..][..ROWS]);
    // SAFETY: whole vectors.
    unsafe {
        let mut largest = [S::splat(T::NEG_INFINITY); ROWS];
        for column in range.step_by(S::LANES) {
            for (r, largest) in largest.iter_mut().enumerate() {
                *largest = S::max(S::load(scores.as_ptr().add(r * width + column)), *largest);
            }
        }
        for r in 0..ROWS {
            let (old, new) = (maximum[r], S::largest(largest[r]) * scale);
            rescale[r] = old;
            maximum[r] = if new > old + T::from_f64(SLACK) { new } else { old };
        }
    }
}

/// Turns scores into weights and adds them up, once the maxima have moved.
///
/// # Safety
/// As [`softmax`], after [`move_maxima`].
#[inline(always)]
unsafe fn weigh<T: Real, S: Simd<T>, const ROWS: usize>(
    first: usize,
    scores: &mut [T],
    width: usize,
    bounds: &[Bounds],
    scale: T,
    online: &mut Online<'_, T>,
) {
    let (scores, range) =
        (&mut scores[first * width..][..ROWS * width], covering_all(&bounds[first..][..ROWS], S::LANES));
    let (maximum, rescale) = (&online.maximum[first..][..ROWS], &mut online.rescale[first..][..ROWS]);
    // SAFETY: whole vectors.
    unsafe {
        let (mut shifts, mut sums) = ([S::splat(T::ZERO); ROWS], [S::splat(T::ZERO); ROWS]);
        for r in 0..ROWS {
            let (old, new) = (rescale[r], maximum[r]);
            // Nothing is there to bring to the first maximum.
            rescale[r] = if new == old || old == T::NEG_INFINITY { T::ONE } else { (old - new).exp2() };
            // Without a key that is seen all weights are 0 whatever is taken off.
            shifts[r] = S::splat(if new == T::NEG_INFINITY { T::ZERO } else { -new });
        }
        let scale = S::splat(scale);
        for column in range.step_by(S::LANES) {
            let mut x = shifts;
            for (r, x) in x.iter_mut().enumerate() {
                *x = S::fma(S::load(scores.as_ptr().add(r * width + column)), scale, *x);
            }
            let weights = exp2s::<T, S, ROWS>(x);
            for r in 0..ROWS {
                sums[r] = S::add(sums[r], weights[r]);
                S::store(scores.as_mut_ptr().add(r * width + column), weights[r]);
            }
        }
        for (r, sum) in online.sum[first..][..ROWS].iter_mut().enumerate() {
            *sum = *sum * rescale[r] + S::sum(sums[r]);
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
