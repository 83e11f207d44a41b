use candle_core::{D, DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::siblings::ensure_absent;
use crate::candle::engine::accumulator;
use crate::candle::own_gradient::with_gradient;
use crate::problem::ensure_value;

/// Mean squares below this, and ε above its inverse, are far from the ends of f32.
const LARGEST: f64 = 1e30;

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
    /// Whether the weights are stored less 1, as in Gemma and Qwen3-Next: y = … ⊙ (1 + weight). Default: no.
    pub unit_offset: bool,
}

impl Default for NormConfig {
    fn default() -> Self {
        Self { kind: NormKind::Rms, epsilon: 1e-6, unit_offset: false }
    }
}

/// RMS norm or layer norm of rows `[…, width]`, computed in f32 (f64 for f64). Weights: `weight`, and `bias` for layer
/// norm. Gradients: weights and input (the fused forms of candle-nn give none). Rows of any size that is finite are
/// normalised: their squares may be beyond the dtype.
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
    unit_offset: bool,
}

impl Norm {
    /// For rows of `width`.
    ///
    /// # Errors
    /// An ε that is not a number above 0; weights that are missing or of another shape; a bias that an RMS norm would leave
    /// out.
    pub fn new(width: usize, config: &NormConfig, weights: VarBuilder) -> Result<Self> {
        let NormConfig { kind, epsilon, unit_offset } = *config;
        ensure_value(epsilon.is_finite() && epsilon > 0.0, "Norm::new", "epsilon", epsilon, "a finite number above 0")?;
        if kind == NormKind::Rms {
            ensure_absent(&weights, ["bias"], "an RMS norm has no bias, a layer norm has")?;
        }
        let weight = weights.get_with_hints(width, "weight", Init::Const(if unit_offset { 0.0 } else { 1.0 }))?;
        let bias = match kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(weights.get_with_hints(width, "bias", Init::Const(0.0))?),
        };
        Ok(Self { weight, bias, epsilon, unit_offset })
    }

    /// For rows `[…, heads, width]`, normalised head by head, with weights `[heads · width]`: a group norm.
    pub(super) fn by_head([heads, width]: [usize; 2], config: &NormConfig, weights: VarBuilder) -> Result<Self> {
        let norm = Self::new(heads * width, config, weights)?;
        let split = |numbers: &Tensor| numbers.reshape((heads, width));
        Ok(Self { weight: split(&norm.weight)?, bias: norm.bias.as_ref().map(split).transpose()?, ..norm })
    }
}

/// Rows x/r or (x − μ)/r, and 1/r.
struct Normalized {
    rows: Tensor,
    inverse: Tensor,
}

impl Module for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let sums = accumulator(x.dtype());
        let wide = x.to_dtype(sums)?;
        let Normalized { rows, inverse } = self.normalized(&wide.detach())?;
        let y = with_gradient("norm", &wide, rows.clone(), self.backward(rows, inverse))?;
        let weight = self.weight.to_dtype(sums)?;
        let y = y.broadcast_mul(&if self.unit_offset { (weight + 1.0)? } else { weight })?;
        match &self.bias {
            None => y,
            Some(bias) => y.broadcast_add(&bias.to_dtype(sums)?)?,
        }
        .to_dtype(x.dtype())
    }
}

impl Norm {
    /// Squares go beyond their dtype where x does not. So rows that may be too large are divided by their largest element
    /// m first, and ε by m²; the others, on the CPU where asking costs nothing, are taken as they are. That is each row's own.
    fn normalized(&self, x: &Tensor) -> Result<Normalized> {
        if !x.device().is_cpu() || self.epsilon <= 1.0 / LARGEST {
            return self.normalized_in_range(x);
        }
        let (centred, squares) = self.centred(x)?;
        let largest =
            if squares.elem_count() == 0 { 0.0 } else { squares.max_all()?.to_dtype(DType::F64)?.to_scalar()? };
        let inverse = (&squares + self.epsilon)?.sqrt()?.recip()?;
        let plain = Normalized { rows: centred.broadcast_mul(&inverse)?, inverse };
        if largest < LARGEST {
            return Ok(plain);
        }
        let is_plain = squares.lt(LARGEST)?;
        let scaled = self.normalized_in_range(x)?;
        Ok(Normalized {
            rows: is_plain.broadcast_as(x.shape())?.where_cond(&plain.rows, &scaled.rows)?,
            inverse: is_plain.where_cond(&plain.inverse, &scaled.inverse)?,
        })
    }

    /// The same by way of rows whose largest element is 1.
    fn normalized_in_range(&self, x: &Tensor) -> Result<Normalized> {
        // At least √ε, so that neither x/m nor √ε/m is above 1.
        let smallest = if x.dtype() == DType::F64 { f64::MIN_POSITIVE } else { f64::from(f32::MIN_POSITIVE) };
        let root = self.epsilon.sqrt().max(smallest);
        let unit = x.abs()?.max_keepdim(D::Minus1)?.maximum(root)?;
        let (centred, squares) = self.centred(&x.broadcast_div(&unit)?)?;
        let root = (unit.recip()? * root)?;
        let Some(_) = self.bias else {
            let inverse = (squares + root.sqr()?)?.sqrt()?.recip()?;
            return Ok(Normalized { rows: centred.broadcast_mul(&inverse)?, inverse: (inverse / unit)? });
        };
        // Without the mean rows may be small beside m, or 0 where one number is repeated: once more.
        let spread = centred.abs()?.max_keepdim(D::Minus1)?.maximum(&root)?.maximum(smallest)?;
        let centred = centred.broadcast_div(&spread)?;
        let squares = (centred.sqr()?.mean_keepdim(D::Minus1)? + (root / &spread)?.sqr()?)?;
        let inverse = squares.maximum(smallest)?.sqrt()?.recip()?;
        Ok(Normalized { rows: centred.broadcast_mul(&inverse)?, inverse: ((inverse / spread)? / unit)? })
    }

    /// x, for layer norm without its mean, and the mean of its squares.
    fn centred(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let centred = match self.bias {
            None => x.clone(),
            Some(_) => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let squares = centred.sqr()?.mean_keepdim(D::Minus1)?;
        Ok((centred, squares))
    }

    /// With y = (x − μ)/r: dx = (dy − mean(dy) − y mean(dy ⊙ y))/r, and μ = mean(dy) = 0 for RMS. In one step, which is
    /// several times as fast as candle's way back through the mean, the root and the quotient.
    fn backward(&self, y: Tensor, inverse: Tensor) -> impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static {
        let is_centred = self.bias.is_some();
        move |d_y| {
            let along = y.broadcast_mul(&(d_y * &y)?.mean_keepdim(D::Minus1)?)?;
            let across = (d_y - along)?;
            let across = match is_centred {
                false => across,
                true => across.broadcast_sub(&d_y.mean_keepdim(D::Minus1)?)?,
            };
            across.broadcast_mul(&inverse)
        }
    }
}
