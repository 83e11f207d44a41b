use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::rotary_emb::rope;

use super::own_gradient::with_gradient;
use crate::candle::engine::accumulator;
use crate::problem::ensure_value;

/// Rotary position embedding (Su et al. 2021, RoFormer) of rows of width D: with angles θ_i(p) = p·base^{−2i/D},
///
/// ```text
/// y_i         = x_i cos θ_i − x_{i+D/2} sin θ_i        i < D/2
/// y_{i+D/2}   = x_{i+D/2} cos θ_i + x_i sin θ_i
/// ```
///
/// so that ⟨y(p), y'(p')⟩ depends on p − p' alone. The halves of a row are rotated against each other, as in GPT-NeoX and
/// LLaMA checkpoints of the transformers library (not neighbours, as in GPT-J). Angles are computed in f64, the rotation in
/// f32 (f64 for f64). Gradients: x.
///
/// # Example
/// ```
/// use attn_kernels::nn::Rotary;
/// use candle_core::{Device, Tensor};
///
/// let rotary = Rotary::new(8, 10000.0)?;
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 5, 8), &Device::Cpu)?;
/// // Rows 3 and 4 of a sequence, as they come in decoding.
/// let tail = rotary.apply(&x.narrow(2, 3, 2)?, 3)?;
/// let error = (rotary.apply(&x, 0)?.narrow(2, 3, 2)? - tail)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert_eq!(error, 0.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Rotary {
    width: usize,
    base: f64,
    /// cos and sin `[positions, D/2]`, as far as asked for yet.
    table: Arc<Mutex<Option<(Tensor, Tensor)>>>,
}

impl Rotary {
    /// For rows of an even width; `base` is 10000 in most models.
    ///
    /// # Errors
    /// An odd width, a base that is not a number above 1.
    pub fn new(width: usize, base: f64) -> Result<Self> {
        let is_even = width > 0 && width.is_multiple_of(2);
        ensure_value(is_even, "Rotary::new", "width", width, "an even number above 0")?;
        ensure_value(base.is_finite() && base > 1.0, "Rotary::new", "base", base, "a finite number above 1")?;
        Ok(Self { width, base, table: Arc::default() })
    }

    /// Rotates x `[B, H, N, D]`, whose first row is at `position`.
    ///
    /// # Errors
    /// Another rank or width.
    pub fn apply(&self, x: &Tensor, position: usize) -> Result<Tensor> {
        let (_, _, rows, width) = x.dims4()?;
        ensure_value(
            width == self.width,
            "Rotary::apply",
            "x",
            format!("{width} wide"),
            &format!("width {}", self.width),
        )?;
        let sums = accumulator(x.dtype());
        let (cos, sin) = self.angles(position + rows, sums, x.device())?;
        let (cos, sin) = (cos.narrow(0, position, rows)?, sin.narrow(0, position, rows)?);
        let wide = x.to_dtype(sums)?.contiguous()?;
        let rotated = rope(&wide.detach(), &cos, &sin)?;
        // The rotation of candle-nn has no gradient: it is the rotation back.
        let back = move |gradient: &Tensor| rope(&gradient.contiguous()?, &cos, &sin.neg()?);
        with_gradient("rotary", &wide, rotated, back)?.to_dtype(x.dtype())
    }

    /// A table of at least `positions` rows.
    fn angles(&self, positions: usize, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((cos, sin)) = table.as_ref()
            && cos.dim(0)? >= positions
            && cos.dtype() == dtype
            && cos.device().same_device(device)
        {
            return Ok((cos.clone(), sin.clone()));
        }
        let (rows, half) = (positions.next_power_of_two(), self.width / 2);
        let exponent = -(self.base.ln()) * 2.0 / self.width as f64;
        let frequencies: Vec<f64> = (0..half).map(|i| (exponent * i as f64).exp()).collect();
        let angles = (0..rows).flat_map(|p| frequencies.iter().map(move |frequency| p as f64 * frequency));
        let angles = Tensor::from_vec(angles.collect::<Vec<f64>>(), (rows, half), &Device::Cpu)?;
        let convert = |x: Tensor| x.to_dtype(dtype)?.to_device(device);
        let pair = (convert(angles.cos()?)?, convert(angles.sin()?)?);
        *table = Some(pair.clone());
        Ok(pair)
    }
}
