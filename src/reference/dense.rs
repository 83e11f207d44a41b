//! The linear family through its materialised weights.

use std::borrow::Cow;

use super::array::{add_scaled, assert_shape, dot};
use super::linear::LinearCall;
use super::pairs::{is_kept, is_visible, position, shared_head};
use super::quadratic::rows;
use super::rotary::rotated;
use super::{Array, Gradients};
use crate::problem::Mask;

/// φ(q) `[B, Hq, N, D']`, φ(k) `[B, Hk, M, D']` without their exponents, and those of the keys `[B, Hk, M, 1]`.
/// Rows of masked keys are 0.
struct Mapped {
    q: Array,
    k: Array,
    exponents: Array,
}

/// One row of W: `weights[a] = ⟨φ(q), R φ(k_j)⟩·factors[a]` for the visible keys j = `keys[a]`, with R the rotation by
/// j less the query's position where there is one. The factor is the decay from j to the query, times
/// e^{exponent of j − c} with the stabiliser c, the largest visible exponent. `shares` are those of the divisor,
/// without R.
struct Row {
    keys: Vec<usize>,
    factors: Vec<f64>,
    weights: Vec<f64>,
    shares: Vec<f64>,
}

impl LinearCall<'_> {
    pub fn dense(&self) -> Array {
        let (sums, divisors) = self.sums(&self.mapped());
        self.finish.apply(&sums, &divisors)
    }

    pub fn dense_backward(&self, d_out: &Array) -> Gradients {
        let mapped = self.mapped();
        let (sums, divisors) = self.sums(&mapped);
        assert_shape("d_out", d_out, sums.shape);
        let (d_sums, d_divisors) = self.finish.backward(&sums, &divisors, d_out);
        let mut by_features = Gradients {
            q: Array::zeros(mapped.q.shape),
            k: Array::zeros(mapped.k.shape),
            v: Array::zeros(self.v.shape),
            bias: None,
            attention_bias: None,
            sinks: None,
            log_decay: self.log_decay.map(|log_decay| Array::zeros(log_decay.shape)),
        };
        for at in rows(d_out) {
            self.row_backward(&mapped, at, &d_sums, &d_divisors, &mut by_features);
        }
        let mut gradients = Gradients { q: Array::zeros(self.q.shape), k: Array::zeros(self.k.shape), ..by_features };
        for [b, h, i] in rows(self.q) {
            let (phi, d_phi) = (mapped.q.row(b, h, i), by_features.q.row(b, h, i));
            let position = position(i, self.q.shape[2], self.k.shape[2]);
            self.row_features_backward(self.q.row(b, h, i), position, phi, d_phi, gradients.q.row_mut(b, h, i));
        }
        for [b, h, j] in rows(self.k).filter(|&[b, _, j]| is_kept(self.key_mask, b, j)) {
            let (phi, d_phi) = (mapped.k.row(b, h, j), by_features.k.row(b, h, j));
            self.row_features_backward(self.k.row(b, h, j), j as i128, phi, d_phi, gradients.k.row_mut(b, h, j));
        }
        gradients
    }

    fn mapped(&self) -> Mapped {
        let features = |x: &Array| [x.shape[0], x.shape[1], x.shape[2], self.feature_width()];
        let mut q = Array::zeros(features(self.q));
        for [b, h, i] in rows(self.q) {
            let position = position(i, self.q.shape[2], self.k.shape[2]);
            self.features.apply(&self.before_features(self.q.row(b, h, i), position), q.row_mut(b, h, i));
        }
        let mut k = Array::zeros(features(self.k));
        let mut exponents = Array::zeros([k.shape[0], k.shape[1], k.shape[2], 1]);
        for [b, h, j] in rows(self.k).filter(|&[b, _, j]| is_kept(self.key_mask, b, j)) {
            let row = self.before_features(self.k.row(b, h, j), j as i128);
            exponents.row_mut(b, h, j)[0] = self.features.apply(&row, k.row_mut(b, h, j));
        }
        Mapped { q, k, exponents }
    }

    fn row(&self, mapped: &Mapped, [b, h, i]: [usize; 3]) -> Row {
        let (heads, keys) = (self.heads(), self.k.shape[2]);
        let position = position(i, self.q.shape[2], keys);
        let mask = if self.causal { Mask::Causal } else { Mask::Full };
        let visible = |&j: &usize| is_visible(mask, position, j) && is_kept(self.key_mask, b, j);
        let visible: Vec<usize> = (0..keys).filter(visible).collect();
        let (query_head, key_head) = (shared_head(h, heads, self.q.shape[1]), shared_head(h, heads, self.k.shape[1]));
        let exponent = |&j: &usize| mapped.exponents.row(b, key_head, j)[0];
        let stabilizer = visible.iter().map(exponent).fold(f64::NEG_INFINITY, f64::max);
        let decay = self.log_decays(b, h, position);
        let factors: Vec<f64> = visible.iter().map(|j| (exponent(j) - stabilizer + decay[*j]).exp()).collect();
        let phi_q = mapped.q.row(b, query_head, i);
        let share = |(&j, factor): (&usize, &f64)| dot(phi_q, mapped.k.row(b, key_head, j)) * factor;
        let weight = |(&j, factor): (&usize, &f64)| {
            dot(phi_q, &self.behind_features(mapped.k.row(b, key_head, j), j as i128 - position)) * factor
        };
        let weights = visible.iter().zip(&factors).map(weight).collect();
        let shares = visible.iter().zip(&factors).map(share).collect();
        Row { keys: visible, factors, weights, shares }
    }

    /// x as φ takes it.
    fn before_features(&self, x: &[f64], position: i128) -> Vec<f64> {
        match self.rotary {
            Some(base) if self.features.are_of_products() => rotated(x, base, position),
            _ => x.to_vec(),
        }
    }

    /// φ of a key at a distance from the query, as the numerator takes it.
    fn behind_features<'a>(&self, phi: &'a [f64], distance: i128) -> Cow<'a, [f64]> {
        match self.rotary {
            Some(base) if !self.features.are_of_products() => rotated(phi, base, distance).into(),
            _ => phi.into(),
        }
    }

    /// d_x ← d_x + (∂φ/∂x)ᵀ d_phi
    fn row_features_backward(&self, x: &[f64], position: i128, phi: &[f64], d_phi: &[f64], d_x: &mut [f64]) {
        let mut d_row = vec![0.0; x.len()];
        self.features.backward(&self.before_features(x, position), phi, d_phi, &mut d_row);
        add_scaled(d_x, 1.0, &self.before_features(&d_row, -position));
    }

    /// Σ_{j < t ≤ position} g_t for every key j.
    fn log_decays(&self, b: usize, h: usize, position: i128) -> Vec<f64> {
        let mut sums = vec![0.0; self.k.shape[2]];
        if self.log_decay.is_some() {
            for j in (0..sums.len()).rev().filter(|&j| (j as i128) < position) {
                sums[j] = sums[j + 1] + self.log_decay_at(b, h, j + 1);
            }
        }
        sums
    }

    /// Σ_j W_ij v_j `[B, H, N, E]` and Σ_j W_ij `[B, H, N, 1]`.
    fn sums(&self, mapped: &Mapped) -> (Array, Array) {
        let [batch, value_heads, _, value_width] = self.v.shape;
        let (heads, queries) = (self.heads(), self.q.shape[2]);
        let mut sums = Array::zeros([batch, heads, queries, value_width]);
        let mut divisors = Array::zeros([batch, heads, queries, 1]);
        for [b, h, i] in rows(&divisors) {
            let row = self.row(mapped, [b, h, i]);
            let value_head = shared_head(h, heads, value_heads);
            for (&j, &weight) in row.keys.iter().zip(&row.weights) {
                add_scaled(sums.row_mut(b, h, i), weight, self.v.row(b, value_head, j));
            }
            divisors.row_mut(b, h, i)[0] = row.shares.iter().sum();
        }
        (sums, divisors)
    }

    /// Adds what row `[b, h, i]` of W contributes to the gradients by φ(q), φ(k), v and the log-decay.
    fn row_backward(
        &self,
        mapped: &Mapped,
        [b, h, i]: [usize; 3],
        d_sums: &Array,
        d_divisors: &Array,
        gradients: &mut Gradients,
    ) {
        let head = |x: &Array| shared_head(h, self.heads(), x.shape[1]);
        let (query_head, key_head, value_head) = (head(self.q), head(self.k), head(self.v));
        let (d_sum, d_divisor) = (d_sums.row(b, h, i), d_divisors.row(b, h, i)[0]);
        let row = self.row(mapped, [b, h, i]);
        let mut d_logarithms = vec![0.0; self.k.shape[2]];
        let position = position(i, self.q.shape[2], self.k.shape[2]);
        for (index, (&j, &factor)) in row.keys.iter().zip(&row.factors).enumerate() {
            let (weight, share) = (row.weights[index], row.shares[index]);
            let d_weight = dot(d_sum, self.v.row(b, value_head, j));
            add_scaled(gradients.v.row_mut(b, value_head, j), weight, d_sum);
            let (phi_q, phi_k) = (mapped.q.row(b, query_head, i), mapped.k.row(b, key_head, j));
            let d_q = gradients.q.row_mut(b, query_head, i);
            add_scaled(d_q, d_weight * factor, &self.behind_features(phi_k, j as i128 - position));
            add_scaled(d_q, d_divisor * factor, phi_k);
            let d_k = gradients.k.row_mut(b, key_head, j);
            add_scaled(d_k, d_weight * factor, &self.behind_features(phi_q, position - j as i128));
            add_scaled(d_k, d_divisor * factor, phi_q);
            d_logarithms[j] = d_weight * weight + d_divisor * share;
        }
        if let Some(d_log_decay) = &mut gradients.log_decay {
            let mut before = 0.0;
            for t in (1..d_logarithms.len()).filter(|&t| t as i128 <= position) {
                before += d_logarithms[t - 1];
                if is_kept(self.key_mask, b, t) {
                    let index = self.decay_index(d_log_decay, b, h, t);
                    d_log_decay.data[index] += before;
                }
            }
        }
    }
}
