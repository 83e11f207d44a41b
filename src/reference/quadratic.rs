//! Scores and sums of the operations that weigh every visible pair: softmax, diagonal, GAU, local chunk.

use std::ops::Range;

use super::array::{add_scaled, assert_shape, dot};
use super::pairs::{is_kept, is_visible, position, shared_head};
use super::{Array, Gradients};
use crate::problem::Mask;

/// s_ij = cap(scale·⟨q_i, k_j⟩) + bias[R + j − p] + b_ij, for the visible pairs, with a scale for each batch entry.
pub(super) struct Scores<'a> {
    pub q: &'a Array,
    pub k: &'a Array,
    pub v: &'a Array,
    pub mask: Mask,
    pub scales: Vec<f64>,
    pub soft_cap: Option<f64>,
    pub key_mask: Option<&'a Array>,
    pub bias: Option<&'a Array>,
    /// b `[B, H, N, M]`, each of them or 1.
    pub attention_bias: Option<&'a Array>,
}

/// What one query sees: `scores[a]` belongs to key `keys[a]`, `slopes[a]` is its derivative by ⟨q, k⟩.
pub(super) struct Row {
    pub keys: Vec<usize>,
    pub scores: Vec<f64>,
    slopes: Vec<f64>,
}

impl Scores<'_> {
    pub fn check(&self) {
        let [batch, heads, _, width] = self.q.shape;
        let [_, key_heads, keys, _] = self.k.shape;
        assert!(key_heads > 0 && heads % key_heads == 0, "{heads} query heads, {key_heads} key heads");
        assert_shape("q", self.q, self.q.shape);
        assert_shape("k", self.k, [batch, key_heads, keys, width]);
        assert_shape("v", self.v, [batch, key_heads, keys, self.v.shape[3]]);
        if let Some(key_mask) = self.key_mask {
            assert_shape("key_mask", key_mask, [1, 1, batch, keys]);
        }
        if let Some(bias) = self.bias {
            let [_, _, bias_heads, entries] = bias.shape;
            assert_shape("bias", bias, [1, 1, bias_heads, entries]);
            assert!(bias_heads == 1 || bias_heads == heads, "{bias_heads} bias heads for {heads} heads");
            assert!(entries % 2 == 1, "{entries} bias entries, needs 2R + 1");
        }
        if let Some(term) = self.attention_bias {
            let full = [batch, heads, self.q.shape[2], keys];
            let fits = term.shape.iter().zip(full).all(|(&size, full)| size == 1 || size == full);
            assert!(fits, "attention_bias of shape {:?} for {full:?}", term.shape);
        }
        if let Mask::Blocks { size, .. } = self.mask {
            assert!(size > 0, "block size 0");
        }
    }

    pub fn row(&self, b: usize, h: usize, i: usize) -> Row {
        self.row_within(b, h, i, 0..self.k.shape[2])
    }

    /// As `row`, for the keys in `range` only.
    pub fn row_within(&self, b: usize, h: usize, i: usize, range: Range<usize>) -> Row {
        let position = position(i, self.q.shape[2], self.k.shape[2]);
        let visible = |&j: &usize| is_visible(self.mask, position, j) && is_kept(self.key_mask, b, j);
        let mut row = Row { keys: range.filter(visible).collect(), scores: vec![], slopes: vec![] };
        let key_head = shared_head(h, self.q.shape[1], self.k.shape[1]);
        for &j in &row.keys {
            let x = self.scales[b] * dot(self.q.row(b, h, i), self.k.row(b, key_head, j));
            let (capped, slope) = match self.soft_cap {
                None => (x, 1.0),
                Some(cap) => (cap * (x / cap).tanh(), 1.0 - (x / cap).tanh().powi(2)),
            };
            let bias = self.bias.map_or(0.0, |bias| {
                let (head, entry) = bias_index(bias, h, position, j);
                bias.row(0, 0, head)[entry]
            });
            let term = self.attention_bias.map_or(0.0, |term| term.data[pair_index(term, [b, h, i, j])]);
            row.scores.push(capped + bias + term);
            row.slopes.push(self.scales[b] * slope);
        }
        row
    }

    /// Σ_j weights_j v_j of one query.
    pub fn weighted_sum(&self, b: usize, h: usize, row: &Row, weights: &[f64]) -> Vec<f64> {
        let head = shared_head(h, self.q.shape[1], self.v.shape[1]);
        let mut sum = vec![0.0; self.v.shape[3]];
        for (&j, &weight) in row.keys.iter().zip(weights) {
            add_scaled(&mut sum, weight, self.v.row(b, head, j));
        }
        sum
    }

    /// o_i = Σ_j w_ij v_j, where `weigh` turns row `[b, h, i]` of scores into its weights.
    pub fn output(&self, weigh: impl Fn([usize; 3], &Row) -> Vec<f64>) -> Array {
        self.check();
        let [batch, heads, queries, _] = self.q.shape;
        let mut out = Array::zeros([batch, heads, queries, self.v.shape[3]]);
        for [b, h, i] in rows(&out) {
            let row = self.row(b, h, i);
            let sum = self.weighted_sum(b, h, &row, &weigh([b, h, i], &row));
            out.row_mut(b, h, i).copy_from_slice(&sum);
        }
        out
    }

    /// Gradients of Σ ⟨d_out_i, Σ_j w_ij v_j⟩. `weigh` gives the weights of a row, `weigh_backward` the derivatives
    /// by its scores from those by the weights.
    pub fn backward(
        &self,
        d_out: &Array,
        weigh: impl Fn([usize; 3], &Row) -> Vec<f64>,
        weigh_backward: impl Fn([usize; 3], &Row, &[f64]) -> Vec<f64>,
    ) -> Gradients {
        self.check();
        let [batch, heads, queries, _] = self.q.shape;
        assert_shape("d_out", d_out, [batch, heads, queries, self.v.shape[3]]);
        let mut gradients = self.zero_gradients();
        for [b, h, i] in rows(d_out) {
            let row = self.row(b, h, i);
            let (key_head, d_o) = (shared_head(h, heads, self.k.shape[1]), d_out.row(b, h, i));
            let d_weights = self.d_weights([b, h, i], &row, d_out);
            for (&j, weight) in row.keys.iter().zip(weigh([b, h, i], &row)) {
                add_scaled(gradients.v.row_mut(b, key_head, j), weight, d_o);
            }
            let d_scores = weigh_backward([b, h, i], &row, &d_weights);
            self.score_backward([b, h, i], &row, &d_scores, &mut gradients);
        }
        gradients
    }

    /// Derivatives by the weights of a row.
    pub fn d_weights(&self, [b, h, i]: [usize; 3], row: &Row, d_out: &Array) -> Vec<f64> {
        let key_head = shared_head(h, self.q.shape[1], self.v.shape[1]);
        row.keys.iter().map(|&j| dot(d_out.row(b, h, i), self.v.row(b, key_head, j))).collect()
    }

    fn score_backward(&self, [b, h, i]: [usize; 3], row: &Row, d_scores: &[f64], gradients: &mut Gradients) {
        let key_head = shared_head(h, self.q.shape[1], self.k.shape[1]);
        let position = position(i, self.q.shape[2], self.k.shape[2]);
        for ((&j, &slope), &d_score) in row.keys.iter().zip(&row.slopes).zip(d_scores) {
            if let Some(d_bias) = &mut gradients.bias {
                let (head, entry) = bias_index(d_bias, h, position, j);
                d_bias.row_mut(0, 0, head)[entry] += d_score;
            }
            if let Some(d_term) = &mut gradients.attention_bias {
                let index = pair_index(d_term, [b, h, i, j]);
                d_term.data[index] += d_score;
            }
            add_scaled(gradients.q.row_mut(b, h, i), d_score * slope, self.k.row(b, key_head, j));
            add_scaled(gradients.k.row_mut(b, key_head, j), d_score * slope, self.q.row(b, h, i));
        }
    }

    fn zero_gradients(&self) -> Gradients {
        Gradients {
            q: Array::zeros(self.q.shape),
            k: Array::zeros(self.k.shape),
            v: Array::zeros(self.v.shape),
            bias: self.bias.map(|bias| Array::zeros(bias.shape)),
            attention_bias: self.attention_bias.map(|term| Array::zeros(term.shape)),
            sinks: None,
            log_decay: None,
        }
    }
}

/// Head and entry of the bias for key `j` seen from `position`.
fn bias_index(bias: &Array, h: usize, position: i128, j: usize) -> (usize, usize) {
    let [_, _, heads, entries] = bias.shape;
    let entry = (entries / 2) as i128 + j as i128 - position;
    assert!((0..entries as i128).contains(&entry), "bias of {entries} entries, key {j} seen from position {position}");
    (if heads == 1 { 0 } else { h }, entry as usize)
}

/// Where a pair has its entry in an array `[B, H, N, M]`, each of them or 1.
fn pair_index(term: &Array, pair: [usize; 4]) -> usize {
    let at = |index: usize, (&size, at)| index * size + if size == 1 { 0 } else { at };
    term.shape.iter().zip(pair).fold(0, at)
}

/// Every `[b, h, i]` of an array.
pub(super) fn rows(array: &Array) -> impl Iterator<Item = [usize; 3]> + use<> {
    let [batch, heads, rows, _] = array.shape;
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..rows).map(move |i| [b, h, i])))
}

/// max(x, 0), NaN for NaN
pub(super) fn relu(x: f64) -> f64 {
    if x < 0.0 { 0.0 } else { x }
}

/// Keys of batch entry `b` that the key mask leaves, at least 1.
pub(super) fn kept_keys(key_mask: Option<&Array>, b: usize, keys: usize) -> f64 {
    (0..keys).filter(|&j| is_kept(key_mask, b, j)).count().max(1) as f64
}

/// relu(s)²
pub(super) fn relu_squared(scores: &[f64]) -> Vec<f64> {
    scores.iter().map(|&s| relu(s).powi(2)).collect()
}

/// Derivatives by s of Σ d_weights·relu(s)².
pub(super) fn relu_squared_backward(scores: &[f64], d_weights: &[f64]) -> Vec<f64> {
    scores.iter().zip(d_weights).map(|(&s, d)| 2.0 * relu(s) * d).collect()
}
