//! Feature maps row by row.

use super::matrix::{Matrix, add_scaled, dot};
use crate::common::tensor::Float;

pub enum Map {
    Identity,
    EluPlusOne,
    /// Positive FAVOR+ features of the directions `[m, D]`.
    Favor(Matrix),
}

/// Features of all rows; the features proper are e^exponent times `phi`.
pub struct Features {
    pub phi: Matrix,
    pub exponents: Vec<f32>,
}

impl Map {
    pub fn apply(&self, x: &Matrix, float: Float) -> Features {
        let (phi, exponents) = match self {
            Self::Identity => (x.clone(), vec![0.0; x.rows]),
            Self::EluPlusOne => {
                let map = |x: f32| if x >= 0.0 { x + 1.0 } else { x.exp() };
                (Matrix::from_fn(x.rows, x.cols, |i, j| map(x.get(i, j))), vec![0.0; x.rows])
            }
            Self::Favor(omega) => favor(omega, x),
        };
        Features { phi: phi.rounded(float), exponents }
    }

    /// The gradient of x.
    pub fn backward(&self, x: &Matrix, phi: &Matrix, d_phi: &Matrix, float: Float) -> Matrix {
        let d_x = match self {
            Self::Identity => d_phi.clone(),
            Self::EluPlusOne => Matrix::from_fn(x.rows, x.cols, |i, j| d_phi.get(i, j) * x.get(i, j).min(0.0).exp()),
            Self::Favor(omega) => {
                let shrink = shrink(x);
                let products = d_phi.clone().times_elements(phi).rounded(float);
                let mut d_x = products.times(omega).scaled(shrink);
                for i in 0..x.rows {
                    let sum: f32 = products.row(i).iter().sum();
                    add_scaled(d_x.row_mut(i), -sum * shrink * shrink, x.row(i));
                }
                d_x
            }
        };
        d_x.rounded(float)
    }
}

/// D^{-1/4}
fn shrink(x: &Matrix) -> f32 {
    (x.cols as f32).powf(-0.25)
}

fn favor(omega: &Matrix, x: &Matrix) -> (Matrix, Vec<f32>) {
    let x = x.clone().scaled(shrink(x));
    let mut phi = x.times(&omega.transposed());
    let amplitude = (omega.rows as f32).sqrt().recip();
    let mut exponents = Vec::new();
    for i in 0..x.rows {
        let half = dot(x.row(i), x.row(i)) / 2.0;
        let maximum = phi.row(i).iter().copied().fold(f32::NEG_INFINITY, f32::max);
        phi.row_mut(i).iter_mut().for_each(|u| *u = amplitude * (*u - maximum).exp());
        exponents.push(maximum - half);
    }
    (phi, exponents)
}
