//! Random factors of weights, counted by pairs.

use super::super::simd::{Real, Simd};
use crate::problem::{Dropout, KEY_STEPS, MULTIPLIERS, ROUNDS};

/// Counters whose words are made side by side.
const COUNTERS: usize = 16;

/// A row of pairs.
#[derive(Clone, Copy)]
pub struct PairRow {
    /// Query, head, batch entry.
    pub of: [usize; 3],
    /// The first.
    pub key: usize,
}

/// The words of counters from `first` on, as [`Dropout`] has them: word by word, so that vectors hold one of all.
#[inline(always)]
fn words(first: u32, of: [u32; 3], mut key: [u32; 2]) -> [[u32; COUNTERS]; 4] {
    let mut x = [[0; COUNTERS], [of[0]; COUNTERS], [of[1]; COUNTERS], [of[2]; COUNTERS]];
    for (i, counter) in x[0].iter_mut().enumerate() {
        *counter = first.wrapping_add(i as u32);
    }
    for _ in 0..ROUNDS {
        let [x0, x1, x2, x3] = &mut x;
        for (((x0, x1), x2), x3) in x0.iter_mut().zip(x1).zip(x2).zip(x3) {
            let product = u64::from(MULTIPLIERS[0]) * u64::from(*x0);
            let other = u64::from(MULTIPLIERS[1]) * u64::from(*x2);
            *x0 = (other >> 32) as u32 ^ *x1 ^ key[0];
            *x1 = other as u32;
            *x2 = (product >> 32) as u32 ^ *x3 ^ key[1];
            *x3 = product as u32;
        }
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    x
}

/// The factors of a row of pairs.
///
/// # Safety
/// The processor has the instruction set of S.
#[inline(always)]
pub unsafe fn dropout<T: Real, S: Simd<T>>(factors: &mut [T], row: PairRow, dropout: Dropout) {
    let (of, key) = (row.of.map(|index| index as u32), dropout.key());
    let (threshold, scale) = (dropout.threshold(), T::from_f64(dropout.scale()));
    let first = row.key % 4;
    // Pairs that share a batch of counters; the first may begin inside a counter.
    let (head, others) = factors.split_at_mut((4 * COUNTERS - first).min(factors.len()));
    let pieces = [(first, head)].into_iter().chain(others.chunks_mut(4 * COUNTERS).map(|piece| (0, piece)));
    for (index, (skip, piece)) in pieces.enumerate() {
        let words = words((row.key / 4 + index * COUNTERS) as u32, of, key);
        for (at, factor) in (skip..).zip(piece) {
            let is_kept = u64::from(words[at % 4][at / 4]) >= threshold;
            *factor = if is_kept { scale } else { T::ZERO };
        }
    }
}
