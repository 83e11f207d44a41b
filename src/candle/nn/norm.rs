use candle_core::{D, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::own_gradient::with_gradient;
use crate::candle::engine::accumulator;
use crate::problem::ensure_value;

/// What a [`Norm`] takes out of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Its root mean square (Zhang & Sennrich 2019): y = x/√(mean x² + ε) ⊙ weight.
    #[default]
    Rms,
    /// Its mean and standard deviation (Ba et al. 2016): y = (x − μ)/√(mean (x − μ)² + ε) ⊙ weight + bias.
    Layer,
}

/// The choices of a [`Norm`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NormConfig {
    /// RMS or layer norm. Default: RMS.
    pub kind: NormKind,
    /// ε > 0 under the root. Default 1e-6.
    pub epsilon: f64,
}

impl Default for NormConfig {
    fn default() -> Self {
        Self { kind: NormKind::Rms, epsilon: 1e-6 }
    }
}

/// RMS norm or layer norm of rows `[…, width]`, computed in f32 (f64 for f64). Weights: `weight`, and `bias` for layer
/// norm. Gradients: weights and input (the fused forms of candle-nn give none).
///
/// # Example
/// ```
/// use attn_kernels::nn::{Norm, NormConfig};
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let variables = VarMap::new();
/// let norm = Norm::new(4, &NormConfig::default(), VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
/// let y = norm.forward(&Tensor::new(&[[3f32, -3.0, 3.0, 3.0]], &Device::Cpu)?)?;
/// assert!((y.to_vec2::<f32>()?[0][1] + 1.0).abs() < 1e-6);
/// assert_eq!(variables.all_vars().len(), 1);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    epsilon: f64,
}

impl Norm {
    /// For rows of `width`.
    ///
    /// # Errors
    /// An ε that is not a number above 0; weights that are missing or of another shape.
    pub fn new(width: usize, config: &NormConfig, weights: VarBuilder) -> Result<Self> {
        let NormConfig { kind, epsilon } = *config;
        ensure_value(epsilon.is_finite() && epsilon > 0.0, "Norm::new", "epsilon", epsilon, "a finite number above 0")?;
        let weight = weights.get_with_hints(width, "weight", Init::Const(1.0))?;
        let bias = match kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(weights.get_with_hints(width, "bias", Init::Const(0.0))?),
        };
        Ok(Self { weight, bias, epsilon })
    }
}

impl Module for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let sums = accumulator(x.dtype());
        let wide = x.to_dtype(sums)?;
        let centred = match self.bias {
            None => wide.detach(),
            Some(_) => wide.detach().broadcast_sub(&wide.detach().mean_keepdim(D::Minus1)?)?,
        };
        let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.epsilon)?.sqrt()?;
        let rows = centred.broadcast_div(&scale)?;
        let y = with_gradient("norm", &wide, rows.clone(), self.backward(rows, scale))?;
        let y = y.broadcast_mul(&self.weight.to_dtype(sums)?)?;
        match &self.bias {
            None => y,
            Some(bias) => y.broadcast_add(&bias.to_dtype(sums)?)?,
        }
        .to_dtype(x.dtype())
    }
}

impl Norm {
    /// With y = (x − μ)/r: dx = (dy − mean(dy) − y mean(dy ⊙ y))/r, and μ = mean(dy) = 0 for RMS. In one step, which is
    /// several times as fast as candle's way back through the mean, the root and the quotient.
    fn backward(&self, y: Tensor, r: Tensor) -> impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static {
        let is_centred = self.bias.is_some();
        move |d_y| {
            let along = y.broadcast_mul(&(d_y * &y)?.mean_keepdim(D::Minus1)?)?;
            let across = (d_y - along)?;
            let across = match is_centred {
                false => across,
                true => across.broadcast_sub(&d_y.mean_keepdim(D::Minus1)?)?,
            };
            across.broadcast_div(&r)
        }
    }
}
