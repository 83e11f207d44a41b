//! φ of tensors as an operation of its own, for what stands between φ and the engine.

use candle_core::{D, Result, Tensor};

use super::own_gradient::with_gradient;
use crate::linear::FeatureMap;

/// φ(x) `[…, D]` for maps that keep the width, in the dtype of x. Gradients: x.
pub fn features(x: &Tensor, map: FeatureMap) -> Result<Tensor> {
    let detached = x.detach();
    let x_detached = &detached;
    let zero = || x_detached.zeros_like();
    let (phi, slope) = match map {
        FeatureMap::Identity => return Ok(x.clone()),
        FeatureMap::EluPlusOne => {
            // max(x, 0) + e^{min(x, 0)}: nothing cancels.
            let slope = detached.minimum(0.0)?.exp()?;
            ((detached.relu()? + &slope)?, slope)
        }
        FeatureMap::Relu => (detached.relu()?, detached.gt(&zero()?)?.to_dtype(x.dtype())?),
        FeatureMap::ReluSquared => {
            let positive = detached.relu()?;
            (positive.sqr()?, (positive * 2.0)?)
        }
        FeatureMap::Silu => {
            let sigmoid = candle_nn::ops::sigmoid(&detached)?;
            let phi = (&detached * &sigmoid)?;
            // σ(1 + x(1 − σ)) = σ + φ(1 − σ)
            let slope = (&sigmoid + (&phi * sigmoid.affine(-1.0, 1.0)?)?)?;
            (phi, slope)
        }
        FeatureMap::Exp => {
            let phi = detached.exp()?;
            (phi.clone(), phi)
        }
        FeatureMap::Softmax => return softmax(x),
        FeatureMap::Taylor | FeatureMap::Cosine => candle_core::bail!("{map:?} changes the width"),
    };
    with_gradient("features", x, phi, move |d_phi| d_phi * &slope)
}

/// dx = φ ⊙ (dφ − ⟨dφ, φ⟩)
fn softmax(x: &Tensor) -> Result<Tensor> {
    let detached = x.detach();
    let phi = detached.broadcast_sub(&detached.max_keepdim(D::Minus1)?)?.exp()?;
    let phi = phi.broadcast_div(&phi.sum_keepdim(D::Minus1)?)?;
    let saved = phi.clone();
    with_gradient("features", x, phi, move |d_phi| {
        let mean = (d_phi * &saved)?.sum_keepdim(D::Minus1)?;
        d_phi.broadcast_sub(&mean)? * &saved
    })
}
