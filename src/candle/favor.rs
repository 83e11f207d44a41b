//! FAVOR+ features as tensors, relative to stabilisers that travel in the state.

use candle_core::{D, Result, Tensor};

use super::LinearState;
use super::features::features;
use super::own_gradient::with_gradient;
use crate::linear::FeatureMap;
use crate::performer::{FavorMap, PerformerOptions};

/// φ(q)e^{−a} `[B, Hq, N, D']` and φ(k)e^{−c} `[B, Hs, M, D']`, a and c without a gradient.
pub struct FavorFeatures {
    pub q: Tensor,
    pub k: Tensor,
    /// c_{t−1} − c_t `[B, Hs, M]`, by which sums over the keys before t shrink; causal, exponential maps only.
    pub log_decay: Option<Tensor>,
    /// c after the last key `[B, Hs]`; exponential maps only.
    pub stabilizer: Option<Tensor>,
}

impl FavorFeatures {
    /// Of q `[B, Hq, N, D]`, k `[B, Hs, M, D]` and ω `[m, D]`, all in the dtype of sums, after `state`.
    pub fn new(
        q: &Tensor,
        k: &Tensor,
        omega: &Tensor,
        options: &PerformerOptions<Tensor>,
        state: Option<&LinearState>,
    ) -> Result<Self> {
        if options.map == FavorMap::Relu {
            let [q, k] = [q, k].map(|x| {
                let amplitude = (omega.dim(0)? as f64).powf(-0.5);
                features(&projected(x, omega)?, FeatureMap::Relu)?.affine(amplitude, FavorMap::RELU_OFFSET)
            });
            return Ok(Self { q: q?, k: k?, log_decay: None, stabilizer: None });
        }
        let [q, k] = [q, k].map(|x| Exponents::new(x, omega, options.map));
        let (q, k) = (q?, k?);
        let keys = Stabilizers::new(&k.largest()?.squeeze(3)?, options, state.and_then(LinearState::stabilizer))?;
        Ok(Self {
            q: q.features(&q.largest()?)?,
            k: k.features(&keys.shifts.unsqueeze(3)?)?,
            log_decay: keys.log_decay,
            stabilizer: Some(keys.last),
        })
    }
}

/// ωx̃ of rows `[B, H, N, D]`, x̃ = x/D^{1/4}: `[B, H, N, m]`. Gradients: x, not ω.
fn projected(x: &Tensor, omega: &Tensor) -> Result<Tensor> {
    let (batch, heads, rows, width) = x.dims4()?;
    let directions = omega.dim(0)?;
    let omega = (omega.detach() * (width as f64).powf(-0.25))?;
    let flat = x.reshape((batch * heads * rows, width))?;
    let result = flat.detach().matmul(&omega.t()?)?;
    let projection = with_gradient("projection", &flat, result, move |gradient| gradient.contiguous()?.matmul(&omega))?;
    projection.reshape((batch, heads, rows, directions))
}

/// The exponents ±ωx̃ − ‖x̃‖²/2 of rows, in two parts.
struct Exponents {
    /// ±ωx̃ `[B, H, N, D']`
    projected: Tensor,
    /// ‖x̃‖²/2 `[B, H, N, 1]`
    half: Tensor,
}

impl Exponents {
    fn new(x: &Tensor, omega: &Tensor, map: FavorMap) -> Result<Self> {
        let projected = projected(x, omega)?;
        let projected = match map {
            FavorMap::Hyperbolic => Tensor::cat(&[&projected, &projected.neg()?], D::Minus1)?,
            _ => projected,
        };
        let half = (x.sqr()?.sum_keepdim(D::Minus1)? * (0.5 / (x.dim(D::Minus1)? as f64).sqrt()))?;
        Ok(Self { projected, half })
    }

    /// Of every row `[B, H, N, 1]`, without a gradient.
    fn largest(&self) -> Result<Tensor> {
        self.projected.detach().max_keepdim(D::Minus1)? - self.half.detach()
    }

    /// e^{exponents − shift}/√D'
    fn features(&self, shift: &Tensor) -> Result<Tensor> {
        let amplitude = (self.projected.dim(D::Minus1)? as f64).ln() / 2.0;
        features(&self.projected.broadcast_sub(&((&self.half + shift)? + amplitude)?)?, FeatureMap::Exp)
    }
}

/// What the exponents of keys are taken relative to.
struct Stabilizers {
    /// `[B, Hs, M]`, finite: c_t for visible keys; for others, which nothing reads, their own largest exponent.
    shifts: Tensor,
    log_decay: Option<Tensor>,
    last: Tensor,
}

impl Stabilizers {
    /// From the largest exponent of every key `[B, Hs, M]` and c before the first `[B, Hs]`.
    fn new(own: &Tensor, options: &PerformerOptions<Tensor>, before: Option<&Tensor>) -> Result<Self> {
        let (batch, heads, keys) = own.dims3()?;
        let nothing = Tensor::full(f64::NEG_INFINITY, (batch, heads, 1), own.device())?.to_dtype(own.dtype())?;
        let before = before.map_or(Ok(nothing.clone()), |before| before.unsqueeze(2))?;
        let visible = match &options.key_mask {
            None => own.clone(),
            Some(mask) => {
                let mask = mask.unsqueeze(1)?.broadcast_as(own.shape())?;
                mask.where_cond(own, &nothing.broadcast_as(own.shape())?)?
            }
        };
        // c before the first key and after every one.
        let all = Tensor::cat(&[&before, &visible], 2)?;
        let running = if options.causal {
            running_maximum(all)?
        } else {
            all.max_keepdim(2)?.broadcast_as((batch, heads, keys + 1))?.contiguous()?
        };
        let (first, then) = (running.narrow(2, 0, keys)?, running.narrow(2, 1, keys)?);
        let is_nothing = |c: &Tensor| c.eq(&nothing.broadcast_as(c.shape())?);
        let log_decay = match options.causal {
            // Before the first visible key there is nothing to shrink.
            true => Some(is_nothing(&first)?.where_cond(&first.zeros_like()?, &(&first - &then)?)?),
            false => None,
        };
        let shifts = is_nothing(&visible)?.where_cond(own, &then)?;
        Ok(Self { shifts, log_decay, last: running.narrow(2, keys, 1)?.squeeze(2)?.contiguous()? })
    }
}

/// max_{s ≤ t} of x `[B, H, M]`, in log₂ M steps.
fn running_maximum(mut x: Tensor) -> Result<Tensor> {
    let (count, mut step) = (x.dim(2)?, 1);
    while step < count {
        let later = x.narrow(2, step, count - step)?.maximum(&x.narrow(2, 0, count - step)?)?;
        x = Tensor::cat(&[&x.narrow(2, 0, step)?, &later], 2)?;
        step *= 2;
    }
    Ok(x)
}

/// k `[B, Hk, M, D]` with a head for every head of the state.
pub fn by_state_heads(k: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, key_heads, keys, width) = k.dims4()?;
    if key_heads == heads {
        return Ok(k.clone());
    }
    let group = (batch, key_heads, heads / key_heads, keys, width);
    k.unsqueeze(2)?.broadcast_as(group)?.reshape((batch, heads, keys, width))
}

/// x with 0 in the rows of keys `[B, H, M, D]` that the mask removes, whatever they hold.
pub fn without_removed(x: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
    match key_mask {
        None => Ok(x.clone()),
        Some(mask) => {
            let mask = mask.unsqueeze(1)?.unsqueeze(3)?.broadcast_as(x.shape())?;
            mask.where_cond(x, &x.zeros_like()?)
        }
    }
}
