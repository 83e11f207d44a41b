//! The linear family: forward token by token, backward through the matrix of weights.

use attn_kernels::gau::GlobalNorm;
use attn_kernels::problem::{LinearFinish, Scan};

use super::Head;
use super::features::{Features, Map};
use super::matrix::{Matrix, add_scaled, dot};
use crate::common::mechanism::Pass;

pub struct Linear {
    pub map: Map,
    pub scan: Scan,
    pub finish: LinearFinish,
    /// Per token.
    pub log_decay: f32,
}

/// The weights of the visible pairs, and what each is besides a product of features.
struct Weights {
    factors: Matrix,
    weights: Matrix,
}

impl Linear {
    /// `[out]` or `[dq, dk, dv]`
    pub fn run(&self, head: &Head, pass: Pass) -> Vec<Matrix> {
        let (q, k) = (self.map.apply(&head.q, head.float), self.map.apply(&head.k, head.float));
        match pass {
            Pass::Fwd => vec![self.forward(head, &q, &k)],
            Pass::Bwd => self.backward(head, &q, &k),
        }
    }

    /// How many keys a query reads.
    fn reads(&self, head: &Head, i: usize) -> usize {
        match self.scan {
            Scan::Full => head.k.rows,
            Scan::Causal => (head.position(i) + 1).max(0) as usize,
            Scan::ChunkExclusive { chunk } => head.position(i).max(0) as usize / chunk * chunk,
        }
    }

    fn forward(&self, head: &Head, q: &Features, k: &Features) -> Matrix {
        let (features, width) = (k.phi.cols, head.v.cols);
        let (mut s, mut z) = (Matrix::zeros(features, width), vec![0.0; features]);
        let (mut absorbed, mut stabilizer) = (0, f32::NEG_INFINITY);
        let mut out = Matrix::zeros(head.q.rows, width);
        for i in 0..head.q.rows {
            for j in absorbed..self.reads(head, i) {
                let grown = if head.keep[j] { stabilizer.max(k.exponents[j]) } else { stabilizer };
                let carry = if grown == stabilizer {
                    self.log_decay.exp()
                } else {
                    (self.log_decay + stabilizer - grown).exp()
                };
                if carry != 1.0 {
                    s.data.iter_mut().chain(&mut z).for_each(|sum| *sum *= carry);
                }
                stabilizer = grown;
                if head.keep[j] {
                    let enter = (k.exponents[j] - stabilizer).exp();
                    add_scaled(&mut z, enter, k.phi.row(j));
                    for (f, phi) in k.phi.row(j).iter().enumerate() {
                        add_scaled(s.row_mut(f), enter * phi, head.v.row(j));
                    }
                }
            }
            absorbed = absorbed.max(self.reads(head, i));
            for (f, &phi) in q.phi.row(i).iter().enumerate() {
                add_scaled(out.row_mut(i), phi, s.row(f));
            }
            let divisor = self.divisor(head, i, out.row(i), dot(q.phi.row(i), &z));
            out.row_mut(i).iter_mut().for_each(|x| *x = divide(*x, divisor));
        }
        out.rounded(head.float)
    }

    /// What the row Σ_j w_ij v_j is divided by, given Σ_j w_ij.
    fn divisor(&self, head: &Head, i: usize, row: &[f32], sum: f32) -> f32 {
        match self.finish {
            LinearFinish::None => 1.0,
            LinearFinish::Normalize { epsilon } => sum + epsilon as f32,
            LinearFinish::RmsNorm { epsilon, .. } => (dot(row, row) / row.len() as f32 + epsilon as f32).sqrt(),
            LinearFinish::ChunkNorm { norm: GlobalNorm::Mean, .. } => self.reads(head, i) as f32,
            LinearFinish::ChunkNorm { norm: GlobalNorm::Chunk, chunk } => chunk as f32,
            LinearFinish::ChunkNorm { norm: GlobalNorm::Length, .. } => head.k.rows as f32,
        }
    }

    fn weights(&self, head: &Head, q: &Features, k: &Features) -> Weights {
        let mut factors = Matrix::zeros(head.q.rows, head.k.rows);
        for i in 0..head.q.rows {
            let visible: Vec<usize> = (0..self.reads(head, i)).filter(|&j| head.keep[j]).collect();
            let stabilizer = visible.iter().map(|&j| k.exponents[j]).fold(f32::NEG_INFINITY, f32::max);
            for j in visible {
                let decay =
                    if self.log_decay == 0.0 { 0.0 } else { self.log_decay * (head.position(i) - j as i64) as f32 };
                factors.row_mut(i)[j] = (decay + k.exponents[j] - stabilizer).exp();
            }
        }
        let products = q.phi.times(&k.phi.transposed()).rounded(head.float);
        Weights { weights: products.times_elements(&factors).rounded(head.float), factors }
    }

    fn backward(&self, head: &Head, q: &Features, k: &Features) -> Vec<Matrix> {
        let float = head.float;
        let Weights { factors, weights } = self.weights(head, q, k);
        let sums = weights.times(&head.v).rounded(float);
        let mut d_sums = Matrix::zeros(sums.rows, sums.cols);
        let mut d_divisors = vec![0.0; sums.rows];
        for (i, d_divisor) in d_divisors.iter_mut().enumerate() {
            let (row, d_out) = (sums.row(i), head.d_out.row(i));
            let divisor = self.divisor(head, i, row, weights.row(i).iter().sum());
            let along = divide(divide(dot(row, d_out), divisor), divisor);
            d_sums.row_mut(i).iter_mut().zip(d_out).for_each(|(d, &d_out)| *d = divide(d_out, divisor));
            match self.finish {
                LinearFinish::Normalize { .. } => *d_divisor = float.round(-along),
                LinearFinish::RmsNorm { .. } => {
                    add_scaled(d_sums.row_mut(i), -along / divisor / row.len() as f32, row);
                }
                LinearFinish::None | LinearFinish::ChunkNorm { .. } => {}
            }
        }
        let d_sums = d_sums.rounded(float);
        let mut d_weights = d_sums.times(&head.v.transposed());
        for (i, &d_divisor) in d_divisors.iter().enumerate() {
            d_weights.row_mut(i).iter_mut().for_each(|d| *d += d_divisor);
        }
        let d_weights = d_weights.rounded(float);
        let d_products = d_weights.times_elements(&factors).rounded(float);
        let d_phi_q = d_products.times(&k.phi).rounded(float);
        let d_phi_k = d_products.transposed().times(&q.phi).rounded(float);
        vec![
            self.map.backward(&head.q, &q.phi, &d_phi_q, float),
            self.map.backward(&head.k, &k.phi, &d_phi_k, float),
            weights.transposed().times(&d_sums).rounded(float),
        ]
    }
}

/// x/y, or 0 for y = 0.
fn divide(x: f32, y: f32) -> f32 {
    if y == 0.0 { 0.0 } else { x / y }
}
