use candle_core::{DType, Result, Tensor};

use super::diagonal_scan;
use crate::scan::ScanOptions;

/// Discounted returns of actor-critic methods, by one reversed scan:
///
/// ```text
/// R_t = r_t + γ_t R_{t+1},   γ_t = γ, or 0 where an episode ends
/// ```
///
/// rewards `[B, N]` → R of the same dtype and sizes; `ends` `[B, N]` of any dtype: other than 0 at the last step of an episode,
/// behind which nothing is seen (a log-decay of −∞). Gradients: the rewards.
///
/// # Errors
/// As [`diagonal_scan`]; ends of another shape.
///
/// # Example
/// ```
/// use attn_kernels::discounted_returns;
/// use candle_core::{Device, Tensor};
///
/// let rewards = Tensor::new(&[[1f32, 1.0, 1.0, 1.0]], &Device::Cpu)?;
/// let ends = Tensor::new(&[[0u8, 1, 0, 0]], &Device::Cpu)?;
/// assert_eq!(discounted_returns(&rewards, 0.5, &ends)?.to_vec2::<f32>()?, [[1.5, 1.0, 1.5, 1.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn discounted_returns(rewards: &Tensor, discount: f64, ends: &Tensor) -> Result<Tensor> {
    diagonal_scan(&(going_on(ends, rewards)? * discount)?, rewards, &ScanOptions { reversed: true })
}

/// Generalised advantages (Schulman et al. 2016), by one reversed scan:
///
/// ```text
/// δ_t = r_t + γ_t V_{t+1} − V_t,   A_t = δ_t + λ γ_t A_{t+1},   γ_t = γ, or 0 where an episode ends
/// ```
///
/// rewards and ends as in [`discounted_returns`], values `[B, N + 1]`: V of each state, that behind the last step included.
/// Gradients: rewards and values.
///
/// # Errors
/// As [`discounted_returns`]; values of another shape.
///
/// # Example
/// ```
/// use attn_kernels::generalized_advantages;
/// use candle_core::{Device, Tensor};
///
/// let rewards = Tensor::new(&[[1f32, 1.0]], &Device::Cpu)?;
/// let values = Tensor::new(&[[1f32, 2.0, 4.0]], &Device::Cpu)?;
/// let advantages = generalized_advantages(&rewards, &values, 0.5, 1.0, &Tensor::zeros_like(&rewards)?)?;
/// assert_eq!(advantages.to_vec2::<f32>()?, [[1.5, 1.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn generalized_advantages(
    rewards: &Tensor,
    values: &Tensor,
    discount: f64,
    lambda: f64,
    ends: &Tensor,
) -> Result<Tensor> {
    let (batch, steps) = rewards.dims2()?;
    if values.dims() != [batch, steps + 1] {
        let got = format!("shape {:?}", values.dims());
        let needs = format!("[batch, steps of the rewards + 1] = [{batch}, {}]", steps + 1);
        return Err(crate::Error::Shape { function: "generalized_advantages", argument: "values", got, needs }.into());
    }
    let discounts = (going_on(ends, rewards)? * discount)?;
    let differences = ((rewards + (&discounts * values.narrow(1, 1, steps)?)?)? - values.narrow(1, 0, steps)?)?;
    diagonal_scan(&(discounts * lambda)?, &differences, &ScanOptions { reversed: true })
}

/// 1 where an episode goes on, 0 where it ends.
fn going_on(ends: &Tensor, rewards: &Tensor) -> Result<Tensor> {
    ends.to_dtype(DType::F32)?.eq(0.0)?.to_dtype(rewards.dtype())
}
