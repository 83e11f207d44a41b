use std::ops::Range;

use candle_core::{Result, Tensor};

use super::engine::{Computation, accumulator, compute};
use super::packing::Packing;
use crate::Error;
use crate::convolution::{ConvolutionOptions, ConvolutionShapes};
use crate::cpu::convolution::{Choices, Convolution, Gradients, Operands};
use crate::cpu::elementwise::Element;

/// Causal convolution of every channel on its own with a few taps (the short convolution of DeltaNet, Mamba and others):
///
/// ```text
/// y_t = a(b + Σ_{j<W} w_j ⊙ x_{t−W+1+j})     x before the first token is 0, a is SiLU or nothing
/// ```
///
/// x `[B, N, C]`, weight `[C, W]` (`Conv1d`'s of other programs without its middle dimension), bias `[C]` → y `[B, N, C]` in
/// their dtype, f32, f64, f16 or bf16, with sums in f32 (f64). On the CPU one pass over x forward and one backward, over
/// threads; a row of y has the same bits whatever other rows there are. Activation, key mask and packed sequences are in
/// [`ConvolutionOptions`]. Gradients: x, weight and bias.
///
/// # Errors
/// Shapes, dtypes or devices that do not fit together; no channels or taps; sequences that do not cut x, or with a key mask.
///
/// # Example
/// ```
/// use attn_kernels::{ConvolutionOptions, causal_convolution};
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[[1f32], [10.0], [100.0]]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[3f32, 2.0]], &Device::Cpu)?;
/// let y = causal_convolution(&x, &weight, None, &ConvolutionOptions::default())?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [2.0, 23.0, 230.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[doc(alias = "conv1d")]
#[doc(alias = "ShortConvolution")]
pub fn causal_convolution(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: &ConvolutionOptions<Tensor>,
) -> Result<Tensor> {
    match Call::new("causal_convolution", [x, weight], [bias, None], options)? {
        Some(call) => call.output(),
        None => {
            with_packing("causal_convolution", x, options, |x, options| causal_convolution(x, weight, bias, options))
        }
    }
}

/// [`causal_convolution`] over the next piece of a sequence: x before its first token is in `state` `[B, W − 1, C]`, in the
/// dtype of x (0 for `None`; of packed sequences one each). Returns the state that follows, the last W − 1 rows. Cutting a
/// sequence anywhere, into pieces shorter than the taps as well, and handing the state on gives the output of the whole, to the
/// bit on the CPU, and its gradients: states have them, both ways.
///
/// # Errors
/// As [`causal_convolution`]; a state of another shape or dtype.
///
/// # Example
/// ```
/// use attn_kernels::{ConvolutionOptions, causal_convolution, causal_convolution_with_state};
/// use candle_core::{Device, Tensor};
///
/// let options = ConvolutionOptions { silu: true, ..Default::default() };
/// let x = Tensor::randn(0f32, 1.0, (2, 10, 8), &Device::Cpu)?;
/// let weight = Tensor::randn(0f32, 1.0, (8, 4), &Device::Cpu)?;
/// let (_, state) = causal_convolution_with_state(&x.narrow(1, 0, 9)?, &weight, None, &options, None)?;
/// let (last, _) = causal_convolution_with_state(&x.narrow(1, 9, 1)?, &weight, None, &options, Some(&state))?;
/// let whole = causal_convolution(&x, &weight, None, &options)?.narrow(1, 9, 1)?;
/// assert_eq!(last.to_vec3::<f32>()?, whole.to_vec3::<f32>()?);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn causal_convolution_with_state(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: &ConvolutionOptions<Tensor>,
    state: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let function = "causal_convolution_with_state";
    match Call::new(function, [x, weight], [bias, state], options)? {
        Some(call) => Ok((call.output()?, call.next_state()?)),
        None => {
            let mut next = None;
            let y = with_packing(function, x, options, |x, options| {
                let (y, state) = causal_convolution_with_state(x, weight, bias, options, state)?;
                next = Some(state);
                Ok(y)
            })?;
            next.map(|next| (y, next)).ok_or_else(|| candle_core::Error::msg("no state"))
        }
    }
}

/// `convolve` of the rows that the key mask leaves, packed.
fn with_packing(
    function: &'static str,
    x: &Tensor,
    options: &ConvolutionOptions<Tensor>,
    convolve: impl FnOnce(&Tensor, &ConvolutionOptions<Tensor>) -> Result<Tensor>,
) -> Result<Tensor> {
    let Some(key_mask) = &options.key_mask else { candle_core::bail!("{function}: no key mask") };
    let packing = Packing::new(function, x, key_mask)?;
    let sequences = Some(packing.sequences.clone());
    let y = convolve(&packing.packed(x)?, &ConvolutionOptions { silu: options.silu, key_mask: None, sequences })?;
    packing.unpacked(&y)
}

/// A call without key mask.
struct Call {
    shapes: ConvolutionShapes,
    silu: bool,
    x: Tensor,
    /// `[C, W]`, with a bias `[C, W + 1]`.
    weights: Tensor,
    has_bias: bool,
    /// `[sequences, W − 1, C]`
    state: Tensor,
}

impl Call {
    /// None where there is a key mask.
    fn new(
        function: &'static str,
        [x, weight]: [&Tensor; 2],
        [bias, state]: [Option<&Tensor>; 2],
        options: &ConvolutionOptions<Tensor>,
    ) -> Result<Option<Self>> {
        let shapes = options.shapes(function, [x, weight], [bias, state])?;
        let others = [("weight", Some(weight)), ("bias", bias), ("state", state)];
        for (argument, tensor) in others.into_iter().chain([("key_mask", options.key_mask.as_ref())]) {
            if let Some(tensor) = tensor.filter(|tensor| !tensor.device().same_device(x.device())) {
                let [got, needs] = [tensor, x].map(|tensor| format!("{:?}", tensor.device().location()));
                return Err(Error::Device { function, argument, got, needs: format!("{needs}, that of x") }.into());
            }
        }
        if options.key_mask.is_some() {
            return Ok(None);
        }
        let before = (shapes.sequences.len(), shapes.taps - 1, shapes.channels);
        Ok(Some(Self {
            silu: options.silu,
            x: x.clone(),
            weights: match bias {
                Some(bias) => Tensor::cat(&[weight, &bias.unsqueeze(1)?], 1)?,
                None => weight.clone(),
            },
            has_bias: bias.is_some(),
            state: state.map_or_else(|| Tensor::zeros(before, x.dtype(), x.device()), |state| Ok(state.clone()))?,
            shapes,
        }))
    }

    fn output(&self) -> Result<Tensor> {
        if self.x.elem_count() == 0 {
            return Ok(self.x.clone());
        }
        if !self.x.device().is_cpu() {
            return self.by_operations();
        }
        let sums = accumulator(self.x.dtype());
        let [x, weights, state] = [&self.x, &self.weights, &self.state].map(|x| x.to_dtype(sums)?.contiguous());
        let computation = Convolve {
            operands: [x?, weights?, state?],
            channels: self.shapes.channels,
            taps: self.shapes.taps,
            has_bias: self.has_bias,
            silu: self.silu,
            sequences: self.shapes.sequences.clone(),
        };
        compute(computation, self.x.dims())?.to_dtype(self.x.dtype())
    }

    /// The last W − 1 rows of every sequence, in memory of their own.
    fn next_state(&self) -> Result<Tensor> {
        let (kept, channels) = (self.shapes.taps - 1, self.shapes.channels);
        let rows = self.x.reshape(((), channels))?;
        let last = |(index, tokens): (usize, &Range<usize>)| -> Result<Tensor> {
            let new = tokens.len().min(kept);
            let rows = rows.narrow(0, tokens.end - new, new)?;
            let old = self.state.get(index)?.narrow(0, new, kept - new)?;
            if new == kept { Ok(rows) } else { Tensor::cat(&[&old, &rows], 0) }
        };
        let all = self.shapes.sequences.iter().enumerate().map(last).collect::<Result<Vec<_>>>()?;
        match &all[..] {
            [] => Ok(self.state.clone()),
            // One tensor would be a view, which keeps all of x alive.
            [one] => one.force_contiguous()?.unsqueeze(0),
            all => Tensor::stack(all, 0),
        }
    }

    /// The same on any device.
    fn by_operations(&self) -> Result<Tensor> {
        let ConvolutionShapes { channels, taps, sequences } = &self.shapes;
        let rows = self.x.reshape(((), *channels))?;
        let column = |column: usize| self.weights.narrow(1, column, 1)?.squeeze(1);
        let convolve = |(index, tokens): (usize, &Range<usize>)| -> Result<Tensor> {
            let new = rows.narrow(0, tokens.start, tokens.len())?;
            let all = Tensor::cat(&[&self.state.get(index)?, &new], 0)?;
            let tap = |tap: usize| all.narrow(0, tap, tokens.len())?.broadcast_mul(&column(tap)?);
            let sum = (1..*taps).try_fold(tap(0)?, |sum, index| sum + tap(index)?)?;
            let sum = if self.has_bias { sum.broadcast_add(&column(*taps)?)? } else { sum };
            if self.silu { sum.silu() } else { Ok(sum) }
        };
        let all = sequences.iter().enumerate().map(convolve).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&all, 0)?.reshape(self.x.shape())
    }
}

/// Of x, weights and state, on the CPU.
struct Convolve {
    operands: [Tensor; 3],
    channels: usize,
    taps: usize,
    has_bias: bool,
    silu: bool,
    sequences: Vec<Range<usize>>,
}

impl Convolve {
    fn of<'a, T: Element>(&'a self, operands: &[&'a [T]]) -> Convolution<'a, T> {
        let Self { channels, taps, has_bias, silu, ref sequences, .. } = *self;
        let operands = Operands { x: operands[0], weights: operands[1], state: operands[2] };
        Convolution::new(operands, Choices { channels, taps, has_bias, silu, sequences })
    }
}

impl Computation for Convolve {
    fn name(&self) -> &'static str {
        "causal_convolution"
    }

    fn operands(&self) -> Vec<&Tensor> {
        self.operands.iter().collect()
    }

    fn forward<T: Element>(&self, operands: &[&[T]], result: &mut [T]) {
        self.of(operands).forward(result);
    }

    fn backward<T: Element>(&self, operands: &[&[T]], _: &[T], d_result: &[T], gradients: Vec<&mut [T]>) {
        let mut gradients = gradients.into_iter();
        let mut next = || gradients.next().unwrap_or_default();
        let rooms = Gradients { x: next(), weights: next(), state: next() };
        self.of(operands).backward(d_result, rooms);
    }
}
