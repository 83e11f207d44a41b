use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::projection::{Products, Projection};
use super::siblings::ensure_absent;
use crate::activation::Activation;
use crate::problem::ensure_value;

/// The choices of a [`FeedForward`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedForwardConfig {
    /// Width of the inner rows.
    pub hidden: usize,
    /// Whether it is a gated linear unit. Default: no.
    #[serde(default)]
    pub gated: bool,
    /// The non-linearity a. Default: SiLU.
    #[serde(default)]
    pub activation: Activation,
    /// Whether the projections have a bias. Default: no.
    #[serde(default)]
    pub bias: bool,
}

/// The feed-forward part of a block, on rows `[…, width]`:
///
/// ```text
/// y = a(x W_up) W_down                       plain
/// y = (a(x W_gate) ⊙ (x W_up)) W_down        gated (Shazeer 2020): SwiGLU with SiLU
/// ```
///
/// Weights: `up_proj`, `down_proj` and, when gated, `gate_proj`, each with `weight` `[out, in]` and maybe `bias`.
/// Gradients: weights and input.
///
/// # Example
/// ```
/// use attn_kernels::nn::{Activation, FeedForward, FeedForwardConfig};
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let variables = VarMap::new();
/// let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let config = FeedForwardConfig { hidden: 16, gated: true, activation: Activation::Silu, bias: false };
/// let layer = FeedForward::new(8, &config, weights)?;
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.dims(), [2, 5, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct FeedForward {
    gate: Option<Projection>,
    up: Projection,
    down: Projection,
    activation: Activation,
}

impl FeedForward {
    /// For rows of `width`.
    ///
    /// # Errors
    /// A width of 0; weights that are missing or of another shape; a gate or biases that the configuration leaves out.
    pub fn new(width: usize, config: &FeedForwardConfig, weights: VarBuilder) -> Result<Self> {
        let FeedForwardConfig { hidden, gated, activation, bias } = *config;
        ensure_value(width > 0, "FeedForward::new", "width", width, "at least 1")?;
        ensure_value(hidden > 0, "FeedForward::new", "hidden", hidden, "at least 1")?;
        let why = "the configuration says `gated` or `bias` otherwise";
        let unused = [("gate_proj.weight", !gated), ("gate_proj.bias", !gated || !bias)];
        let unused = unused.into_iter().chain(["up_proj.bias", "down_proj.bias"].map(|name| (name, !bias)));
        ensure_absent(&weights, unused.filter_map(|(name, is_unused)| is_unused.then_some(name)), why)?;
        let inward = |name: &str| Projection::new(width, hidden, bias, weights.pp(name));
        Ok(Self {
            gate: if gated { Some(inward("gate_proj")?) } else { None },
            up: inward("up_proj")?,
            down: Projection::new(hidden, width, bias, weights.pp("down_proj"))?,
            activation,
        })
    }

    pub(super) fn forward_by(&self, x: &Tensor, products: Products) -> Result<Tensor> {
        let up = self.up.forward(x, products)?;
        let inner = match &self.gate {
            None => self.activation.forward(&up)?,
            Some(gate) => self.activation.gate(&gate.forward(x, products)?, &up)?,
        };
        self.down.forward(&inner, products)
    }
}

impl Module for FeedForward {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_by(x, Products::Joint)
    }
}
