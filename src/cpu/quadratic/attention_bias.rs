//! A number for each pair, read where it lies: added to the score, or 0 to remove the pair.

use super::super::rows::Number;
use super::Place;
use crate::problem::{Operand, Slice, View};

/// Numbers that are widened at a time.
const CHUNK: usize = 64;

/// [B, H, N, M]; a size of 1 has stride 0.
pub struct AttentionBias<'a> {
    data: Slice<'a>,
    strides: [usize; 4],
}

impl<'a> AttentionBias<'a> {
    pub fn new(view: &View<'a>) -> Self {
        let stride = |i: usize| if view.dims()[i] == 1 { 0 } else { view.strides()[i] };
        Self { data: view.data(), strides: std::array::from_fn(stride) }
    }

    /// Whether it is added to scores.
    pub fn is_added(&self) -> bool {
        !matches!(self.data, Slice::U8(_))
    }

    /// Scores of the keys from `at` on: times `scale` and the bias added, or −∞ where the pair is removed.
    pub fn apply<T: Number>(&self, at: Place, scores: &mut [T], scale: T) {
        let (mut start, step) = (self.start(at), self.strides[3]);
        if let Slice::U8(keep) = self.data {
            let hide = |(score, &keep): (&mut T, &u8)| *score = if keep == 0 { T::NEG_INFINITY } else { *score };
            return match step {
                0 => scores.iter_mut().zip(std::iter::repeat(&keep[start])).for_each(hide),
                _ => scores.iter_mut().zip(&keep[start..]).for_each(hide),
            };
        }
        let mut numbers = [T::ZERO; CHUNK];
        for scores in scores.chunks_mut(CHUNK) {
            match step {
                0 => numbers.fill(self.number(start)),
                _ => T::load(self.data, start, &mut numbers[..scores.len()]),
            }
            start += step * scores.len();
            scores.iter_mut().zip(&numbers).for_each(|(score, &number)| *score = *score * scale + number);
        }
    }

    /// The score of one pair.
    pub fn score<T: Number>(&self, at: Place, score: T) -> T {
        let mut scores = [score];
        self.apply(at, &mut scores, T::ONE);
        scores[0]
    }

    fn start(&self, at: Place) -> usize {
        [at.batch, at.head, at.query, at.key].iter().zip(&self.strides).map(|(at, stride)| at * stride).sum()
    }

    fn number<T: Number>(&self, at: usize) -> T {
        let mut number = [T::ZERO];
        T::load(self.data, at, &mut number);
        number[0]
    }
}
