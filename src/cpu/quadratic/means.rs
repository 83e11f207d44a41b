//! Rows that see few keys in more than one tile: their mean gradient, key by key.

use std::ops::Range;

use super::super::finish::dot;
use super::super::rows::{HeadRows, Number};
use super::{Context, Place};
use crate::problem::{QuadraticFinish, Weight};

/// Most keys of such a row. With more of them the mean is an average over enough for ⟨d_out, out⟩ to be as exact.
pub const FEW: usize = 16;

impl<T: Number> Context<'_, T> {
    /// Whether weights are divided by their sum, so that a mean is taken off their gradients.
    pub fn takes_mean(&self) -> bool {
        self.problem.weight == Weight::Softmax || self.epsilon().is_some()
    }

    /// ε of the row's sum.
    pub fn epsilon(&self) -> Option<T> {
        match self.problem.finish {
            QuadraticFinish::RowSum { epsilon } if self.problem.weight != Weight::Softmax => Some(T::from_f64(epsilon)),
            _ => None,
        }
    }

    /// Σ_j w_ij ⟨d_row, v_j⟩ / (Σ_j w_ij + ε) over the `kept` keys of query `at.query`, whose row of q is given as tiles
    /// have it. A sink has its share of the divisor.
    pub fn mean_gradient(&self, at: Place, kept: Range<usize>, q: &[T], d_row: &[T], statistic: T) -> T {
        let shapes = self.shapes();
        let (d, e, head) = (shapes.width, shapes.value_width, at.head / self.group());
        let [keys, values] = [&self.inputs.k, &self.inputs.v].map(|view| HeadRows::new(view, at.batch, head));
        let (mut k, mut v) = (vec![T::ZERO; d], vec![T::ZERO; e]);
        let mut pairs = Vec::with_capacity(FEW);
        for key in kept.filter(|&key| self.keeps(Place { key, ..at })) {
            keys.load(key..key + 1, &mut k, d);
            values.load(key..key + 1, &mut v, e);
            let score = self.score(Place { key, ..at }, dot(&q[..d], &k));
            let weight = match self.problem.weight {
                Weight::Softmax => (score - statistic).exp(),
                Weight::Relu => score.larger(T::ZERO),
                Weight::ReluSquared => score.larger(T::ZERO) * score.larger(T::ZERO),
            };
            let mut gradient = dot(&d_row[..e], &v);
            if let Some(dropout) = self.problem.dropout {
                let pair = [self.problem.first_entry + at.batch, at.head, at.query, key];
                gradient = gradient * T::from_f64(dropout.factor(pair));
            }
            pairs.push((weight, gradient));
        }
        let rest = self.epsilon().unwrap_or(T::ZERO) + self.sink_weight(at.head, statistic);
        let sum = pairs.iter().map(|&(weight, _)| weight).sum::<T>() + rest;
        if sum == T::ZERO {
            return T::ZERO;
        }
        pairs.into_iter().map(|(weight, gradient)| weight / sum * gradient).sum()
    }

    /// exp(sink − L)
    pub fn sink_weight(&self, head: usize, statistic: T) -> T {
        match self.sinks.get(head) {
            Some(&sink) if sink != T::NEG_INFINITY => (sink - statistic).exp(),
            _ => T::ZERO,
        }
    }

    fn keeps(&self, at: Place) -> bool {
        let is_kept = self.key_mask.as_ref().is_none_or(|mask| mask[at.batch * self.shapes().keys + at.key] != 0);
        is_kept && self.problem.mask.sees(at.query as i64 + self.shapes().offset(), at.key)
    }

    /// The score of a pair, from the product of q and k.
    fn score(&self, at: Place, product: T) -> T {
        let mut score = product * self.scale(at.batch);
        if let Some(cap) = self.problem.soft_cap {
            score = T::from_f64(cap * (score.to_f64() / cap).tanh());
        }
        if let Some(bias) = self.bias_row(at.head) {
            score += bias[self.bias_index(at.query, at.key)];
        }
        self.attention_bias.as_ref().map_or(score, |term| term.score(at, score))
    }
}
