//! φ of tensors as an operation of its own, for what stands between φ and the engine.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, D, Layout, Result, Shape, Tensor};

use super::own_gradient::with_gradient;
use super::storage::{by_dtype, elements};
use crate::cpu::elementwise;
use crate::linear::FeatureMap;

/// φ(x) `[…, D]` for maps that keep the width, in the dtype of x, f32 or f64. Gradients: x.
pub fn features(x: &Tensor, map: FeatureMap) -> Result<Tensor> {
    match map {
        FeatureMap::Identity => Ok(x.clone()),
        FeatureMap::Softmax => softmax(x),
        FeatureMap::Taylor | FeatureMap::Cosine => candle_core::bail!("{map:?} changes the width"),
        _ if x.device().is_cpu() => {
            // As the engine does it: several times as fast as candle's operations one by one.
            let rows = x.detach().contiguous()?;
            let phi = rows.apply_op1_no_bwd(&Forward(map))?;
            let saved = phi.clone();
            let backward = move |d_phi: &Tensor| d_phi.contiguous()?.apply_op3_no_bwd(&rows, &saved, &Backward(map));
            with_gradient("features", x, phi, backward)
        }
        _ => {
            let (phi, slope) = by_operations(&x.detach(), map)?;
            with_gradient("features", x, phi, move |d_phi| d_phi * &slope)
        }
    }
}

/// φ(x) and φ′(x) of maps of elements on their own, on any device.
fn by_operations(x: &Tensor, map: FeatureMap) -> Result<(Tensor, Tensor)> {
    Ok(match map {
        FeatureMap::EluPlusOne => {
            // max(x, 0) + e^{min(x, 0)}: nothing cancels.
            let slope = x.minimum(0.0)?.exp()?;
            ((x.relu()? + &slope)?, slope)
        }
        FeatureMap::Relu => (x.relu()?, x.gt(&x.zeros_like()?)?.to_dtype(x.dtype())?),
        FeatureMap::ReluSquared => {
            let positive = x.relu()?;
            (positive.sqr()?, (positive * 2.0)?)
        }
        FeatureMap::Silu => {
            let sigmoid = candle_nn::ops::sigmoid(x)?;
            let phi = (x * &sigmoid)?;
            // σ(1 + x(1 − σ)) = σ + φ(1 − σ)
            let slope = (&sigmoid + (&phi * sigmoid.affine(-1.0, 1.0)?)?)?;
            (phi, slope)
        }
        FeatureMap::Exp => {
            let phi = x.exp()?;
            (phi.clone(), phi)
        }
        other => candle_core::bail!("{other:?} is no map of elements"),
    })
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

/// φ on the CPU.
struct Forward(FeatureMap);

impl CustomOp1 for Forward {
    fn name(&self) -> &'static str {
        "features"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let phi = by_dtype!(x, T => elementwise::map(elements::<T>(x, layout)?, self.0));
        Ok((phi, layout.shape().clone()))
    }
}

/// dx of dφ, x and φ on the CPU.
struct Backward(FeatureMap);

impl CustomOp3 for Backward {
    fn name(&self) -> &'static str {
        "features"
    }

    fn cpu_fwd(
        &self,
        d_phi: &CpuStorage,
        d_phi_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        phi: &CpuStorage,
        phi_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let d_x = by_dtype!(x, T => {
            let (d_phi, phi) = (elements::<T>(d_phi, d_phi_layout)?, elements::<T>(phi, phi_layout)?);
            elementwise::map_gradient(d_phi, elements(x, x_layout)?, phi, self.0)
        });
        Ok((d_x, x_layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    /// Both ways agree, of any number of elements.
    #[test]
    fn operations_are_the_engine() -> Result<()> {
        for map in
            [FeatureMap::EluPlusOne, FeatureMap::Relu, FeatureMap::ReluSquared, FeatureMap::Silu, FeatureMap::Exp]
        {
            for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 4e-7)] {
                for count in [1, 7, 64, 16_384, 16_384 * 2 + 21] {
                    let x = ((Tensor::arange(0f64, count as f64, &Device::Cpu)? * 0.37)?.sin()? * 4.0)?;
                    let x = Var::from_tensor(&x.to_dtype(dtype)?)?;
                    let ours = features(&x, map)?;
                    let d_x = ours.sqr()?.sum_all()?.backward()?.remove(&x).unwrap();
                    let (phi, slope) = by_operations(&x.detach(), map)?;
                    for (a, b) in [(ours.detach(), phi.clone()), (d_x, (phi * slope)?.affine(2.0, 0.0)?)] {
                        let error = ((a - &b)? / (b.abs()? + 1.0)?)?.abs()?.max_all()?.to_dtype(DType::F64)?;
                        let error = error.to_scalar::<f64>()?;
                        assert!(error < tolerance, "{map:?} {dtype:?} of {count}: {error:e}");
                    }
                }
            }
        }
        Ok(())
    }
}
