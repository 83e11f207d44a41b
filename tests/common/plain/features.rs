//! Feature maps and their derivatives in f32.

use attn_kernels::linear::FeatureMap;
use attn_kernels::performer::FavorMap;
use attn_kernels::reference::Array;

use super::super::cases::Operation;
use super::rows::{Round, Rows, add_scaled, dot};

pub enum Features {
    Plain(FeatureMap),
    /// ω `[1, 1, m, D]`
    Favor(FavorMap, Rows),
}

impl Features {
    pub fn new(operation: &Operation, omega: Option<&Array>) -> Self {
        match (operation, omega) {
            (Operation::Linear(options), _) => Self::Plain(options.map),
            (Operation::Norm(options), _) => Self::Plain(options.map),
            (Operation::Performer(options, _), Some(omega)) => Self::Favor(options.map, Rows::new(omega)),
            _ => Self::Plain(FeatureMap::Identity),
        }
    }

    pub fn is_stabilized(&self) -> bool {
        matches!(self, Self::Favor(map, _) if map.is_exponential())
    }

    /// φ(x), and its exponent, which is left out of φ.
    pub fn apply(&self, x: &[f32], round: Round) -> (Vec<f32>, f32) {
        let (mut phi, exponent) = match self {
            Self::Plain(map) => (plain(*map, x), 0.0),
            Self::Favor(map, omega) => favor(*map, omega, x, round),
        };
        phi.iter_mut().for_each(|phi| *phi = round(*phi));
        (phi, exponent)
    }

    /// The gradient by x from that by φ(x).
    pub fn backward(&self, x: &[f32], phi: &[f32], d_phi: &[f32], round: Round) -> Vec<f32> {
        let mut d_x = match self {
            Self::Plain(map) => plain_backward(*map, x, phi, d_phi),
            Self::Favor(map, omega) => favor_backward(*map, omega, x, phi, d_phi, round),
        };
        d_x.iter_mut().for_each(|d| *d = round(*d));
        d_x
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn plain(map: FeatureMap, x: &[f32]) -> Vec<f32> {
    let each = |f: fn(f32) -> f32| x.iter().map(|&x| f(x)).collect();
    match map {
        FeatureMap::Identity => x.to_vec(),
        FeatureMap::EluPlusOne => each(|x| if x >= 0.0 { x + 1.0 } else { x.exp() }),
        FeatureMap::Relu => each(|x| x.max(0.0)),
        FeatureMap::ReluSquared => each(|x| x.max(0.0) * x.max(0.0)),
        FeatureMap::Silu => each(|x| x * sigmoid(x)),
        FeatureMap::Exp => each(f32::exp),
        FeatureMap::Softmax => {
            let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let powers: Vec<f32> = x.iter().map(|x| (x - max).exp()).collect();
            let sum: f32 = powers.iter().sum();
            powers.iter().map(|power| power / sum).collect()
        }
        FeatureMap::Taylor => {
            let squares = x.iter().flat_map(|a| x.iter().map(move |b| a * b * std::f32::consts::FRAC_1_SQRT_2));
            [1.0].into_iter().chain(x.iter().copied()).chain(squares).collect()
        }
        FeatureMap::Cosine => {
            let (largest, norm) = norms(x);
            let unit = x.iter().map(|x| if largest == 0.0 { 0.0 } else { x / largest / norm });
            [1.0].into_iter().chain(unit).collect()
        }
    }
}

fn plain_backward(map: FeatureMap, x: &[f32], phi: &[f32], d_phi: &[f32]) -> Vec<f32> {
    let each = |slope: fn(f32) -> f32| x.iter().zip(d_phi).map(|(&x, d)| d * slope(x)).collect();
    match map {
        FeatureMap::Identity => d_phi.to_vec(),
        FeatureMap::EluPlusOne => each(|x| x.exp().min(1.0)),
        FeatureMap::Relu => each(|x| if x > 0.0 { 1.0 } else { 0.0 }),
        FeatureMap::ReluSquared => each(|x| 2.0 * x.max(0.0)),
        FeatureMap::Silu => each(|x| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))),
        FeatureMap::Exp => each(f32::exp),
        FeatureMap::Softmax => {
            let mean = dot(phi, d_phi);
            phi.iter().zip(d_phi).map(|(phi, d)| phi * (d - mean)).collect()
        }
        FeatureMap::Taylor => {
            let (first, second) = d_phi[1..].split_at(x.len());
            let mut d_x = first.to_vec();
            for (a, row) in second.chunks_exact(x.len()).enumerate() {
                d_x[a] += dot(row, x) * std::f32::consts::FRAC_1_SQRT_2;
                add_scaled(&mut d_x, x[a] * std::f32::consts::FRAC_1_SQRT_2, row);
            }
            d_x
        }
        FeatureMap::Cosine => {
            let ((largest, norm), unit, d_unit) = (norms(x), &phi[1..], &d_phi[1..]);
            if largest == 0.0 {
                return vec![0.0; x.len()];
            }
            let along = dot(unit, d_unit);
            unit.iter().zip(d_unit).map(|(unit, d)| (d - unit * along) / norm / largest).collect()
        }
    }
}

/// max |x| and ‖x‖ over it.
fn norms(x: &[f32]) -> (f32, f32) {
    let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
    (largest, x.iter().map(|x| (x / largest).powi(2)).sum::<f32>().sqrt())
}

/// x̃
fn shrunk(x: &[f32], round: Round) -> Vec<f32> {
    let factor = (x.len() as f32).powf(-0.25);
    x.iter().map(|x| round(x * factor)).collect()
}

fn favor(map: FavorMap, omega: &Rows, x: &[f32], round: Round) -> (Vec<f32>, f32) {
    let x = shrunk(x, round);
    let directions = omega.shape[2];
    let amplitude = 1.0 / (map.feature_width(directions) as f32).sqrt();
    let projections: Vec<f32> = (0..directions).map(|f| round(dot(omega.row([0, 0, f]), &x))).collect();
    if map == FavorMap::Relu {
        let offset = FavorMap::RELU_OFFSET as f32;
        return (projections.iter().map(|p| amplitude * p.max(0.0) + offset).collect(), 0.0);
    }
    let half = round(dot(&x, &x) / 2.0);
    let mut exponents: Vec<f32> = projections.iter().map(|p| round(p - half)).collect();
    if map == FavorMap::Hyperbolic {
        exponents.extend(projections.iter().map(|p| round(-p - half)));
    }
    let max = exponents.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (exponents.iter().map(|u| amplitude * (u - max).exp()).collect(), max)
}

fn favor_backward(map: FavorMap, omega: &Rows, x: &[f32], phi: &[f32], d_phi: &[f32], round: Round) -> Vec<f32> {
    let directions = omega.shape[2];
    let amplitude = 1.0 / (phi.len() as f32).sqrt();
    let small = shrunk(x, round);
    let mut d_x = vec![0.0; x.len()];
    for (f, (phi, d)) in phi.iter().zip(d_phi).enumerate() {
        let row = omega.row([0, 0, f % directions]);
        let sign = if f < directions { 1.0 } else { -1.0 };
        let d = match map {
            FavorMap::Relu if dot(row, &small) > 0.0 => amplitude * d,
            FavorMap::Relu => 0.0,
            _ => d * phi,
        };
        add_scaled(&mut d_x, round(sign * d), row);
    }
    if map != FavorMap::Relu {
        add_scaled(&mut d_x, -round(dot(d_phi, phi)), &small);
    }
    let factor = (x.len() as f32).powf(-0.25);
    d_x.iter().map(|d| d * factor).collect()
}
