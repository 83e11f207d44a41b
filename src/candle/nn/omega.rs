//! The random directions of a Performer layer, kept with its weights.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::fresh::assign;
use crate::candle::engine::accumulator;
use crate::random_features::{FeatureKind, random_features};

/// ω `[m, D]` and the seed that it was drawn from.
#[derive(Debug, Clone)]
pub(super) struct Omega {
    kind: FeatureKind,
    omega: Tensor,
    /// Four digits of 16 bits, the lowest first: exact in f32.
    seed: Tensor,
}

impl Omega {
    /// From the weights `features.omega` and `features.seed`; fresh ones are drawn.
    pub fn new(kind: FeatureKind, directions: usize, width: usize, seed: u64, weights: &VarBuilder) -> Result<Self> {
        let weights = weights.pp("features");
        let is_fresh = !weights.contains_tensor("omega");
        let get =
            |shape: &[usize], name: &str, dtype| weights.get_with_hints_dtype(shape, name, Init::Const(0.0), dtype);
        let omega = get(&[directions, width], "omega", accumulator(weights.dtype()))?;
        let mut omega = Self { kind, omega, seed: get(&[4], "seed", DType::F32)? };
        if is_fresh {
            omega.redraw(seed)?;
        }
        Ok(omega)
    }

    /// ω, outside of any graph.
    pub fn tensor(&self) -> Tensor {
        self.omega.detach()
    }

    pub fn seed(&self) -> Result<u64> {
        let digits = self.seed.to_vec1::<f32>()?;
        Ok(digits.iter().rev().fold(0, |seed, digit| seed << 16 | *digit as u64))
    }

    /// Draws other directions; variables are changed in place, so that a `VarMap` saves them.
    pub fn redraw(&mut self, seed: u64) -> Result<()> {
        let (directions, width) = self.omega.dims2()?;
        let numbers = random_features(self.kind, directions, width, seed)?;
        let digits = (0..4).map(|digit| (seed >> (16 * digit) & 0xffff) as f32).collect();
        assign(&mut self.omega, Tensor::from_vec(numbers, (directions, width), &Device::Cpu)?)?;
        assign(&mut self.seed, Tensor::from_vec(digits, 4, &Device::Cpu)?)
    }
}
