//! Activations as operations of the graph.

use std::f64::consts::{FRAC_2_SQRT_PI, SQRT_2};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Module, Result, Shape, Tensor};

use crate::activation::Activation;
use crate::candle::engine::accumulator;
use crate::candle::own_gradient::with_gradient;
use crate::candle::storage::{by_dtype, elements};
use crate::cpu::elementwise;

impl Module for Activation {
    /// a(x), of any shape. Gradients: x.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !x.device().is_cpu() {
            return self.by_operations(x);
        }
        in_sums(x, |x| x.contiguous()?.apply_op1(Alone(*self)))
    }
}

impl Activation {
    /// a(gate) ⊙ x, for gated linear units (Shazeer 2020): SwiGLU by SiLU, GEGLU by GELU, ReGLU by ReLU. Both of one
    /// shape. On the CPU one pass over the elements forward and one backward; halves are computed in f32. Gradients: both.
    ///
    /// # Errors
    /// Tensors of different shapes, dtypes or devices.
    ///
    /// # Example
    /// ```
    /// use attn_kernels::nn::Activation;
    /// use candle_core::{Device, Tensor};
    ///
    /// let gate = Tensor::new(&[[0f32, 50.0, -200.0]], &Device::Cpu)?;
    /// let x = Tensor::new(&[[1f32, 2.0, 3.0]], &Device::Cpu)?;
    /// assert_eq!(Activation::Silu.gate(&gate, &x)?.to_vec2::<f32>()?, [[0.0, 100.0, 0.0]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[doc(alias = "SwiGLU")]
    #[doc(alias = "GEGLU")]
    pub fn gate(self, gate: &Tensor, x: &Tensor) -> Result<Tensor> {
        if gate.dims() != x.dims() || gate.dtype() != x.dtype() || !gate.device().same_device(x.device()) {
            candle_core::bail!(
                "Activation::gate: the gate is {:?} {:?}, what it gates {:?} {:?}",
                gate.dims(),
                gate.dtype(),
                x.dims(),
                x.dtype()
            );
        }
        if !x.device().is_cpu() {
            return self.by_operations(gate)? * x;
        }
        in_sums(gate, |gate| {
            let x = x.to_dtype(gate.dtype())?.contiguous()?;
            gate.contiguous()?.apply_op2(&x, Gating(self))
        })
    }

    /// The same on any device.
    fn by_operations(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            // The gradients of candle's own forms are good to six digits only.
            Self::Gelu if x.track_op() => halves(x, &(x / SQRT_2)?.erf()?),
            Self::GeluTanh if x.track_op() => {
                let cubic = ((x.sqr()? * 0.044715)? + 1.0)?;
                halves(x, &((x * cubic)? * (FRAC_2_SQRT_PI / SQRT_2))?.tanh()?)
            }
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
            Self::Relu => x.relu(),
            Self::Sigmoid => candle_nn::ops::sigmoid(x),
            // ln(1 + e^{−|x|}) of candle has no form without cancellation: by 2 artanh, whose argument is at most 1/3.
            Self::Softplus => softplus(x),
        }
    }
}

/// max(x, 0) + ln(1 + e^{−|x|}), the logarithm by ln(1 + p) = 2 artanh(p/(2 + p)).
fn softplus(x: &Tensor) -> Result<Tensor> {
    const TERMS: u32 = 17;
    let constant = x.detach();
    let power = constant.abs()?.neg()?.exp()?;
    let ratio = (&power / (&power + 2.0)?)?;
    let square = ratio.sqr()?;
    let mut series = ratio.zeros_like()?;
    for term in (0..TERMS).rev() {
        series = ((series * &square)? + 1.0 / f64::from(2 * term + 1))?;
    }
    let value = (constant.relu()? + ((ratio * series)? * 2.0)?)?;
    with_gradient("softplus", x, value, move |d_y| d_y * candle_nn::ops::sigmoid(&constant)?)
}

/// x·(1 + g)/2
fn halves(x: &Tensor, g: &Tensor) -> Result<Tensor> {
    x * ((g + 1.0)? / 2.0)?
}

/// `f` of x in the dtype of sums, in the dtype of x.
fn in_sums(x: &Tensor, f: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Tensor> {
    if !matches!(x.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        candle_core::bail!("Activation: of {:?}", x.dtype());
    }
    f(x.to_dtype(accumulator(x.dtype()))?)?.to_dtype(x.dtype())
}

/// y = a(x) of contiguous tensors on the CPU.
struct Alone(Activation);

impl CustomOp1 for Alone {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = by_dtype!(x, T => elementwise::activate(elements::<T>(x, layout)?, None, self.0));
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d_y: &Tensor) -> Result<Option<Tensor>> {
        d_y.contiguous()?.apply_op2_no_bwd(&x.detach(), &AloneGradient(self.0)).map(Some)
    }
}

/// dx of dy and x.
struct AloneGradient(Activation);

impl CustomOp2 for AloneGradient {
    fn name(&self) -> &'static str {
        "activation gradient"
    }

    fn cpu_fwd(&self, d_y: &CpuStorage, l: &Layout, x: &CpuStorage, x_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let d_x = by_dtype!(x, T => {
            elementwise::activate_gradient(elements::<T>(d_y, l)?, elements::<T>(x, x_layout)?, self.0)
        });
        Ok((d_x, x_layout.shape().clone()))
    }
}

/// y = a(gate) ⊙ x of contiguous tensors of one shape on the CPU.
struct Gating(Activation);

impl CustomOp2 for Gating {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, l: &Layout, x: &CpuStorage, x_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = by_dtype!(x, T => {
            elementwise::activate(elements::<T>(gate, l)?, Some(elements::<T>(x, x_layout)?), self.0)
        });
        Ok((y, x_layout.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, x: &Tensor, _: &Tensor, d_y: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let both = d_y.contiguous()?.apply_op3_no_bwd(&gate.detach(), &x.detach(), &GatingGradient(self.0))?;
        let [d_gate, d_x] = [(0, gate), (1, x)].map(|(row, of)| both.get(row)?.reshape(of.shape()));
        Ok((Some(d_gate?), Some(d_x?)))
    }
}

/// d_gate and d_x, `[2, elements]`, of dy, gate and x.
struct GatingGradient(Activation);

impl CustomOp3 for GatingGradient {
    fn name(&self) -> &'static str {
        "gate gradient"
    }

    fn cpu_fwd(
        &self,
        d_y: &CpuStorage,
        d_y_layout: &Layout,
        gate: &CpuStorage,
        gate_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let both = by_dtype!(x, T => {
            let (d_y, gate) = (elements::<T>(d_y, d_y_layout)?, elements::<T>(gate, gate_layout)?);
            elementwise::gate_gradient(d_y, gate, elements::<T>(x, x_layout)?, self.0)
        });
        Ok((both, Shape::from((2, x_layout.shape().elem_count()))))
    }
}
