//! The quadratic engine: softmax, ReLU and squared-ReLU attention in tiles, never N×M in memory.

mod attention_bias;
mod backward;
mod bias_sums;
mod decode;
mod forward;
mod means;
mod precision;
#[cfg(test)]
mod tests;

pub use backward::backward;
pub use forward::forward;

use std::ops::Range;

use super::rows::{HeadRows, Number, Rows, gather, inverse_key_counts};
use super::simd::Real;
use super::tile::{Bounds, PairRow, Verbs};
use crate::problem::{self, PerKey, Quadratic, QuadraticFinish, QuadraticShapes, SliceMut, View, Weight};
use attention_bias::AttentionBias;

/// The operands, as views of slices.
pub type QuadraticInputs<'a> = problem::QuadraticInputs<View<'a>>;
/// What the forward pass left behind, as views of slices.
pub type QuadraticSaved<'a> = problem::QuadraticSaved<View<'a>>;
/// Slices that receive the gradients.
pub type QuadraticGradients<'a> = problem::QuadraticGradients<SliceMut<'a>>;

/// What all tasks of a call share.
struct Context<'a, T: 'static> {
    problem: &'a Quadratic,
    inputs: &'a QuadraticInputs<'a>,
    verbs: &'static Verbs<T>,
    /// Rows of 2R + 1.
    bias: Vec<T>,
    attention_bias: Option<AttentionBias<'a>>,
    /// [H], or nothing
    sinks: Vec<T>,
    /// [B, M]
    key_mask: Option<Vec<u8>>,
    /// Keys that the mask leaves before each, and in all: [B, M + 1].
    kept_before: Vec<usize>,
    /// q is multiplied by this (1, −1 or 0) so that `scales` are positive.
    sign: T,
    /// Of the batch entries.
    scales: Vec<T>,
    /// 1/n of the batch entries, where sums are divided by it.
    inverse_counts: Vec<f64>,
}

impl<'a, T: Number> Context<'a, T> {
    fn new(problem: &'a Quadratic, inputs: &'a QuadraticInputs<'a>, verbs: &'static Verbs<T>) -> Self {
        let scale = problem.scale;
        let (sign, scale) = if scale == 0.0 { (0.0, 1.0) } else { (scale.signum(), scale.abs()) };
        let key_mask: Option<Vec<u8>> =
            inputs.key_mask.as_ref().map(|mask| gather::<f32>(mask).into_iter().map(|x| x as u8).collect());
        let QuadraticShapes { batch, keys, .. } = problem.shapes;
        let counts = |what| match problem.per_key == what {
            true => inverse_key_counts(key_mask.as_deref(), batch, keys),
            false => vec![1.0; batch],
        };
        Self {
            problem,
            inputs,
            verbs,
            bias: inputs.bias.as_ref().map(gather).unwrap_or_default(),
            attention_bias: inputs.attention_bias.as_ref().map(AttentionBias::new),
            sinks: inputs.sinks.as_ref().map(gather).unwrap_or_default(),
            sign: T::from_f64(sign),
            scales: counts(PerKey::Scores).into_iter().map(|count| T::from_f64(scale * count)).collect(),
            inverse_counts: counts(PerKey::Sums),
            kept_before: key_mask.as_deref().map(|mask| running_counts(mask, batch, keys)).unwrap_or_default(),
            key_mask,
        }
    }

    /// The scale of products of queries, which carry its sign, and keys.
    fn scale(&self, batch: usize) -> T {
        self.scales[batch]
    }

    /// What becomes of the sums of a batch entry.
    fn finish(&self, batch: usize) -> QuadraticFinish {
        match (self.problem.finish, self.problem.per_key) {
            (QuadraticFinish::Scale(scale), PerKey::Sums) => QuadraticFinish::Scale(scale * self.inverse_counts[batch]),
            (finish, _) => finish,
        }
    }

    fn shapes(&self) -> &QuadraticShapes {
        &self.problem.shapes
    }

    /// About how long the products with so many keys take on one thread: 10 bytes or 20 multiply-adds a nanosecond.
    fn nanoseconds(&self, keys: usize) -> usize {
        let QuadraticShapes { batch, key_heads, queries, width, value_width, dtype, .. } = *self.shapes();
        let numbers = (batch * key_heads * keys).saturating_mul(width + value_width);
        numbers.saturating_mul(2 * dtype.size() + self.group() * queries) / 20
    }

    /// Query heads that read one key head.
    fn group(&self) -> usize {
        self.shapes().heads / self.shapes().key_heads
    }

    /// Loads rows of k or v into a tile; keys that the mask removes are zeros, unread.
    fn load_keys(&self, view: &View<'_>, batch: usize, head: usize, keys: Range<usize>, into: &mut [T], padded: usize) {
        let rows = HeadRows::new(view, batch, head);
        match &self.key_mask {
            None => rows.load(keys, into, padded),
            Some(mask) => rows.load_kept(keys, into, padded, |key| mask[batch * self.shapes().keys + key] != 0),
        }
    }

    /// Rows of k or v where they lie, if they are of the type of sums, of this width, and the mask removes none, else in `room`.
    fn keys_at<'r>(
        &self,
        view: &'r View<'a>,
        (batch, head): (usize, usize),
        keys: &Range<usize>,
        room: &'r mut [T],
        width: usize,
    ) -> Rows<'r, T> {
        let there = HeadRows::new(view, batch, head).in_place(keys, width);
        there.filter(|_| self.key_mask.is_none()).unwrap_or_else(|| {
            let row = self.verbs.padded(width);
            self.load_keys(view, batch, head, keys.clone(), room, row);
            Rows { data: room, row }
        })
    }

    /// Runs of `keys` that the key mask leaves, in order.
    fn for_kept(&self, batch: usize, keys: &Range<usize>, mut act: impl FnMut(Range<usize>)) {
        let Some(mask) = &self.key_mask else { return act(keys.clone()) };
        let mut start = keys.start;
        for run in mask[batch * self.shapes().keys..][keys.clone()].chunk_by(|&a, &b| (a == 0) == (b == 0)) {
            if run[0] != 0 {
                act(start..start + run.len());
            }
            start += run.len();
        }
    }

    /// Keys that query `i` sees, key mask aside, and with a mask that has gaps those between them.
    fn visible(&self, i: usize) -> Range<usize> {
        self.problem.mask.visible(i as i64 + self.shapes().offset(), self.shapes().keys)
    }

    /// Runs of those of the keys that query `i` sees, key mask aside.
    fn runs(&self, i: usize, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        self.problem.mask.runs(i as i64 + self.shapes().offset(), keys)
    }

    /// From the first to the last key that any query sees, key mask aside.
    fn visible_to_any(&self) -> Range<usize> {
        match self.shapes().queries {
            0 => 0..0,
            queries => self.visible(0).start..self.visible(queries - 1).end,
        }
    }

    /// From the first to the last of the keys that query `i` sees and the key mask leaves, and how many they are.
    fn kept(&self, batch: usize, i: usize) -> (Range<usize>, usize) {
        if self.problem.mask.has_gaps() {
            return self.kept_in_runs(batch, i);
        }
        let visible = self.visible(i);
        if self.key_mask.is_none() {
            return (visible.clone(), visible.len());
        }
        let len = self.shapes().keys + 1;
        let before = &self.kept_before[batch * len..][..len];
        let (first, last) = (before[visible.start], before[visible.end]);
        if first == last {
            return (visible.start..visible.start, 0);
        }
        // Of the first key with more kept ones behind it, and behind the last kept one.
        let start = before.partition_point(|&count| count <= first) - 1;
        (start..before.partition_point(|&count| count < last), last - first)
    }

    fn kept_in_runs(&self, batch: usize, i: usize) -> (Range<usize>, usize) {
        let (mut range, mut count) = (0..0, 0);
        for run in self.runs(i, 0..self.shapes().keys) {
            self.for_kept(batch, &run, |kept| {
                range = if count == 0 { kept.clone() } else { range.start..kept.end };
                count += kept.len();
            });
        }
        (range, count)
    }

    /// The queries between the first and the last that see one of `keys`.
    fn seeing(&self, keys: &Range<usize>) -> Range<usize> {
        let first_not = |holds: &dyn Fn(usize) -> bool| {
            let (mut low, mut high) = (0, self.shapes().queries);
            while low < high {
                let middle = (low + high) / 2;
                if holds(middle) { low = middle + 1 } else { high = middle }
            }
            low
        };
        let start = first_not(&|query| self.visible(query).end <= keys.start);
        start..first_not(&|query| self.visible(query).start < keys.end).max(start)
    }

    /// From the first visible column of row `i` in a tile of keys to the last, or with a mask that has gaps to the end of what
    /// may be.
    fn bounds(&self, i: usize, tile: &Range<usize>) -> Bounds {
        if self.problem.mask.has_gaps() {
            let Some(first) = self.runs(i, tile.clone()).next() else { return (0, 0) };
            return (first.start - tile.start, self.visible(i).end.min(tile.end) - tile.start);
        }
        let visible = self.visible(i);
        let low = visible.start.clamp(tile.start, tile.end) - tile.start;
        let high = visible.end.clamp(tile.start, tile.end) - tile.start;
        (low, high)
    }

    /// Whether scores are changed beyond a scale before they become weights.
    fn adjusts(&self) -> bool {
        let is_biased = !self.bias.is_empty() || self.attention_bias.is_some();
        self.problem.soft_cap.is_some() || is_biased || self.key_mask.is_some() || self.problem.mask.has_gaps()
    }

    /// Applies soft-cap, biases, key mask and gaps of the mask to the scores of a strip (rows from query `first` on, columns from key
    /// `key` on) and returns the scale that is left to apply. `tanh`, when wanted, receives tanh(scale·s/c).
    fn adjust(&self, at: Place, scores: &mut [T], width: usize, bounds: &[Bounds], tanh: Option<&mut [T]>) -> T {
        let mut scale = self.scale(at.batch);
        if let Some(cap) = self.problem.soft_cap {
            let cap = T::from_f64(cap);
            self.verbs.scaled_tanh(scores, scale / cap);
            if let Some(tanh) = tanh {
                tanh.copy_from_slice(scores);
            }
            multiply_by(scores, cap);
            scale = T::ONE;
        }
        if let Some(bias) = self.bias_row(at.head) {
            multiply_by(scores, scale);
            scale = T::ONE;
            for (r, (row, &(low, high))) in scores.chunks_exact_mut(width).zip(bounds).enumerate() {
                if low < high {
                    let start = self.bias_index(at.query + r, at.key + low);
                    for (s, &b) in row[low..high].iter_mut().zip(&bias[start..]) {
                        *s += b;
                    }
                }
            }
        }
        if let Some(term) = &self.attention_bias {
            for (r, (row, &(low, high))) in scores.chunks_exact_mut(width).zip(bounds).enumerate() {
                if low < high {
                    let at = Place { query: at.query + r, key: at.key + low, ..at };
                    term.apply(at, &mut row[low..high], scale);
                }
            }
            scale = if term.is_added() { T::ONE } else { scale };
        }
        if let Some(mask) = &self.key_mask {
            let mask = &mask[at.batch * self.shapes().keys + at.key..];
            for row in scores.chunks_exact_mut(width) {
                for (s, &keep) in row.iter_mut().zip(mask) {
                    *s = if keep == 0 { T::NEG_INFINITY } else { *s };
                }
            }
        }
        if self.problem.mask.has_gaps() {
            for (r, (row, &(low, high))) in scores.chunks_exact_mut(width).zip(bounds).enumerate() {
                let mut next = low;
                for run in self.runs(at.query + r, at.key + low..at.key + high) {
                    row[next..run.start - at.key].fill(T::NEG_INFINITY);
                    next = run.end - at.key;
                }
                row[next..high.max(next)].fill(T::NEG_INFINITY);
            }
        }
        scale
    }

    /// Writes the factors of dropout for a strip (rows from query `at.query` on, columns from key `at.key` on), as far as rows see
    /// keys; whether there are any.
    fn dropout(&self, at: Place, factors: &mut [T], width: usize, bounds: &[Bounds]) -> bool {
        let Some(dropout) = self.problem.dropout else { return false };
        for (r, (factors, &(low, high))) in factors.chunks_exact_mut(width).zip(bounds).enumerate() {
            if low < high {
                let of = [at.query + r, at.head, self.problem.first_entry + at.batch];
                self.verbs.dropout(&mut factors[low..high], PairRow { of, key: at.key + low }, dropout);
            }
        }
        true
    }

    /// The bias of a head, by distance.
    fn bias_row(&self, head: usize) -> Option<&[T]> {
        let (heads, radius) = self.shapes().bias?;
        let row = if heads == 1 { 0 } else { head };
        Some(&self.bias[row * (2 * radius + 1)..][..2 * radius + 1])
    }

    /// Entry of the bias for a query and a key that it sees.
    fn bias_index(&self, query: usize, key: usize) -> usize {
        let radius = self.shapes().bias.map_or(0, |(_, radius)| radius);
        (radius as i64 + key as i64 - query as i64 - self.shapes().offset()) as usize
    }

    fn squared(&self) -> bool {
        self.problem.weight == Weight::ReluSquared
    }
}

/// Keys that are left before each of a batch entry's, and in all.
fn running_counts(key_mask: &[u8], batch: usize, keys: usize) -> Vec<usize> {
    let mut counts = Vec::with_capacity(batch * (keys + 1));
    for entry in 0..batch {
        let mut count = 0;
        counts.push(count);
        for &keep in &key_mask[entry * keys..][..keys] {
            count += usize::from(keep != 0);
            counts.push(count);
        }
    }
    counts
}

/// Where a tile of scores lies.
#[derive(Clone, Copy)]
struct Place {
    batch: usize,
    head: usize,
    query: usize,
    key: usize,
}

fn multiply_by<T: Real>(x: &mut [T], factor: T) {
    for x in x {
        *x = *x * factor;
    }
}
