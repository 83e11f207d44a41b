//! Softmax and squared-ReLU attention through the matrix of weights.

use attn_kernels::problem::Mask;

use super::Head;
use super::matrix::Matrix;
use crate::common::mechanism::Pass;

pub struct Quadratic {
    pub mask: Mask,
    pub scale: f32,
    /// Weights relu(s)² instead of softmax(s).
    pub squared_relu: bool,
}

impl Quadratic {
    /// `[out]` or `[dq, dk, dv]`
    pub fn run(&self, head: &Head, pass: Pass) -> Vec<Matrix> {
        let float = head.float;
        let scores = head.q.times(&head.k.transposed()).scaled(self.scale).rounded(float);
        let weights = self.weights(head, &scores).rounded(float);
        let out = weights.times(&head.v).rounded(float);
        if pass == Pass::Fwd {
            return vec![out];
        }
        let d_weights = head.d_out.times(&head.v.transposed()).rounded(float);
        let mut d_scores = Matrix::zeros(scores.rows, scores.cols);
        for i in 0..scores.rows {
            let (weights, d_weights, scores) = (weights.row(i), d_weights.row(i), scores.row(i));
            let mean = if self.squared_relu { 0.0 } else { reversed_dot(head.d_out.row(i), out.row(i)) };
            for (j, d_score) in d_scores.row_mut(i).iter_mut().enumerate() {
                *d_score = match self.squared_relu {
                    true if weights[j] > 0.0 => 2.0 * scores[j] * d_weights[j],
                    true => 0.0,
                    false => weights[j] * (d_weights[j] - mean),
                };
            }
        }
        let d_scores = d_scores.rounded(float);
        vec![
            d_scores.times(&head.k).scaled(self.scale).rounded(float),
            d_scores.transposed().times(&head.q).scaled(self.scale).rounded(float),
            weights.transposed().times(&head.d_out).rounded(float),
        ]
    }

    fn weights(&self, head: &Head, scores: &Matrix) -> Matrix {
        let mut weights = Matrix::zeros(scores.rows, scores.cols);
        for i in 0..scores.rows {
            let visible = self.mask.visible(head.position(i), scores.cols);
            let visible: Vec<usize> = visible.filter(|&j| head.keep[j]).collect();
            let (scores, weights) = (scores.row(i), weights.row_mut(i));
            if self.squared_relu {
                visible.iter().for_each(|&j| weights[j] = scores[j].max(0.0).powi(2));
                continue;
            }
            let maximum = visible.iter().map(|&j| scores[j]).fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = visible.iter().map(|&j| (scores[j] - maximum).exp()).sum();
            visible.iter().for_each(|&j| weights[j] = (scores[j] - maximum).exp() / sum);
        }
        weights
    }
}

/// Summed from the end: in a row with one visible key, sums in equal order cancel exactly, which is luck.
fn reversed_dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).rev().map(|(x, y)| x * y).sum()
}
