//! The diagonal state-space layer S4D. Names of the weights are those of the paper's program.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::kinds::Reader;
use super::scanned::{GatedOutput, by_sequence, check_key_mask};
use super::sizes;
use crate::candle::engine::accumulator;
use crate::candle::nn::batch::Batch;
use crate::candle::nn::cache::{Cache, Recurrence};
use crate::candle::nn::config::AttentionConfig;
use crate::candle::nn::fresh::begun;
use crate::candle::nn::mechanism::Mechanism;
use crate::candle::nn::pieces::{Piece, side_by_side};
use crate::candle::nn::projection::Products;
use crate::candle::{causal_convolution, complex_diagonal_scan_with_state};
use crate::convolution::ConvolutionOptions;
use crate::scan::{ScanOptions, s4d_lin};

/// Steps that a kernel is made for; between the chunks there are states.
const CHUNK: usize = 32;

#[derive(Debug, Clone)]
pub(in crate::candle::nn) struct S4d {
    /// ln Δ `[width]`
    log_dt: Tensor,
    /// A = −e^re + i im, `[width, states]`
    log_a_real: Tensor,
    a_imag: Tensor,
    /// C `[width, states, 2]`, real and imaginary part.
    c: Tensor,
    /// D `[width]`
    skip: Tensor,
    output: GatedOutput,
}

/// What a state is and does in up to T steps, by channel.
struct Powers {
    /// Ā^l for l = 0 … T, real parts before imaginary ones, `[width, 2 · states, T + 1]`
    a: Tensor,
    /// What a state reads l steps later: real parts of 2 C B̄ Ā^l, and imaginary ones negated; of the same shape.
    read: Tensor,
}

impl S4d {
    pub fn new(config: &AttentionConfig, weights: &VarBuilder) -> Result<Self> {
        let Mechanism::S4d { states } = config.mechanism else {
            candle_core::bail!("{} is not s4d", config.mechanism.name())
        };
        let width = config.width;
        let read = Reader { config, weights, sizes: sizes(config) };
        let joined = read.projection("output_linear.0", 2 * width)?;
        let output = GatedOutput { value: joined.part(0, width)?, gate: joined.part(width, width)? };
        let skip = read.numbers("D", width, Init::Randn { mean: 0.0, stdev: 1.0 })?;
        let weights = &weights.pp("kernel");
        let read = Reader { weights, ..read };
        let beginning = s4d_lin(states);
        let sums = accumulator(weights.dtype());
        let lin = |name: &str, number: &dyn Fn([f64; 2]) -> f64| {
            let numbers = |drawn: Vec<f64>| Ok((0..drawn.len()).map(|at| number(beginning[at % states])).collect());
            begun(weights, name, (width, states), (Init::Const(0.0), sums), numbers)
        };
        Ok(Self {
            log_dt: read.numbers("log_dt", width, Init::Uniform { lo: 0.001f64.ln(), up: 0.1f64.ln() })?,
            log_a_real: lin("log_A_real", &|[re, _]| (-re).ln())?,
            a_imag: lin("A_imag", &|[_, im]| im)?,
            c: read.numbers("C", (width, states, 2), Init::Randn { mean: 0.0, stdev: 0.5f64.sqrt() })?,
            skip,
            output,
        })
    }

    pub fn forward(&self, x: &Tensor, batch: Batch<'_>) -> Result<Tensor> {
        check_key_mask(x, batch)?;
        let y = by_sequence(x, batch, |tokens| {
            self.advance(&x.narrow(1, tokens.start, tokens.len())?, CHUNK, None).map(|(y, _)| y)
        })?;
        self.output.forward(&y, Products::Joint)
    }

    /// The rows after those of the caches, which take them in.
    pub fn forward_cached(&self, x: &Tensor, pieces: &mut [Piece<&mut Cache>]) -> Result<Tensor> {
        let y = side_by_side(&[&x.unsqueeze(1)?], pieces, |rows, cache| {
            let before = cache.recurrence()?;
            let (y, s) = self.advance(&rows[0].squeeze(1)?, CHUNK, before.as_ref().map(|before| &before.s))?;
            *before = Some(Recurrence { s: s.detach(), inputs: Vec::new() });
            y.unsqueeze(1)
        })?;
        self.output.forward(&y.squeeze(1)?, Products::Alone)
    }

    /// What the recurrence gives for rows `[B, N, width]` after a state `[B, width, 2 · states]`, and the state that follows. It is
    /// taken in steps of `chunk` tokens: with 1 as it is written, with N as the convolution with its kernel.
    fn advance(&self, x: &Tensor, chunk: usize, state: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let (batch, count, width) = x.dims3()?;
        let u = x.to_dtype(self.skip.dtype())?;
        let zeros = || Tensor::zeros((batch, width, 2 * self.a_imag.dim(1)?), u.dtype(), u.device());
        let mut state = state.cloned().map_or_else(zeros, Ok)?;
        let mut outs = Vec::new();
        let whole = count / chunk * chunk;
        for (first, tokens, chunk) in [(0, whole, chunk), (whole, count - whole, count - whole)] {
            if tokens > 0 {
                let (y, next) = self.chunks(&u.narrow(1, first, tokens)?, chunk, &state)?;
                outs.push(y);
                state = next;
            }
        }
        let y = if outs.is_empty() { u.zeros_like()? } else { Tensor::cat(&outs, 1)? };
        Ok(((y + u.broadcast_mul(&self.skip)?)?.to_dtype(x.dtype())?, state))
    }

    /// Without the skip, of whole chunks of T tokens: the convolution inside each, and what the state before it reads.
    fn chunks(&self, u: &Tensor, chunk: usize, state: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, count, width) = u.dims3()?;
        let (chunks, states) = (count / chunk, self.a_imag.dim(1)?);
        let Powers { a, read } = self.powers(chunk)?;
        // From the last step to the first.
        let backward = |x: &Tensor, dim| {
            let steps: Vec<u32> = (0..chunk as u32).rev().collect();
            x.contiguous()?.index_select(&Tensor::new(steps, x.device())?, dim)
        };
        let kernel = backward(&read.narrow(1, 0, states)?.sum(1)?, 1)?;
        let inside = causal_convolution(
            &u.reshape((batch * chunks, chunk, width))?,
            &kernel,
            None,
            &ConvolutionOptions::default(),
        )?;
        // [B · chunks, T, width] → [width, B · chunks, T], and what a chunk leaves behind, Σ_s Ā^{T−1−s} u_s
        let by_channel = u.reshape((batch * chunks, chunk, width))?.permute((2, 0, 1))?.contiguous()?;
        let left = by_channel.matmul(&backward(&a, 2)?.transpose(1, 2)?.contiguous()?)?;
        let left = left.permute((1, 0, 2))?.reshape((batch, chunks, width, 2 * states))?;
        let half = |x: &Tensor, part: usize| x.narrow(x.rank() - 1, part * states, states);
        let turn = a.narrow(2, chunk, 1)?.reshape((1, 1, width, 2 * states))?;
        let (after, last) = complex_diagonal_scan_with_state(
            [&half(&turn, 0)?, &half(&turn, 1)?],
            [&half(&left, 0)?, &half(&left, 1)?],
            &ScanOptions::default(),
            Some([&half(state, 0)?, &half(state, 1)?]),
        )?;
        let after = Tensor::cat(&after, 3)?;
        let before = Tensor::cat(&[&state.unsqueeze(1)?, &after.narrow(1, 0, chunks - 1)?], 1)?;
        let before = before.reshape((batch * chunks, width, 2 * states))?.transpose(0, 1)?.contiguous()?;
        let across = before.matmul(&read.narrow(2, 1, chunk)?.contiguous()?)?.permute((1, 2, 0))?;
        Ok(((inside + across)?.reshape((batch, count, width))?, Tensor::cat(&last, 2)?))
    }

    fn powers(&self, chunk: usize) -> Result<Powers> {
        let (width, states) = self.a_imag.dims2()?;
        let (step, device) = (self.log_dt.exp()?.unsqueeze(1)?, self.a_imag.device());
        let a = [self.log_a_real.exp()?.neg()?, self.a_imag.clone()];
        let [re, im] = [a[0].broadcast_mul(&step)?, a[1].broadcast_mul(&step)?];
        let steps = Tensor::arange(0u32, chunk as u32 + 1, device)?.to_dtype(DType::F64)?.to_dtype(re.dtype())?;
        let times = |x: &Tensor| x.unsqueeze(2)?.broadcast_mul(&steps);
        let (radius, angle) = (times(&re)?.exp()?, times(&im)?);
        let power = [(&radius * angle.cos()?)?, (&radius * angle.sin()?)?];
        // e^z − 1, without the difference of numbers that are nearly equal.
        let tanh = (&re / 2.0)?.tanh()?;
        let grown = ((&tanh * 2.0)? / tanh.affine(-1.0, 1.0)?)?;
        let grown = [((&grown * im.cos()?)? - ((&im / 2.0)?.sin()?.sqr()? * 2.0)?)?, (re.exp()? * im.sin()?)?];
        let inverse = (a[0].sqr()? + a[1].sqr()?)?.recip()?;
        let b = times_complex(&grown, &[(&a[0] * &inverse)?, (&a[1] * &inverse)?.neg()?])?;
        let c = [self.c.narrow(2, 0, 1)?.squeeze(2)?, self.c.narrow(2, 1, 1)?.squeeze(2)?];
        let both =
            times_complex(&c, &b)?.map(|part| (part * 2.0)?.unsqueeze(2)?.broadcast_as((width, states, chunk + 1)));
        let [both_re, both_im] = both;
        let [read_re, read_im] = times_complex(&[both_re?, both_im?], &power)?;
        Ok(Powers { a: Tensor::cat(&power, 1)?, read: Tensor::cat(&[read_re, read_im.neg()?], 1)? })
    }
}

fn times_complex(x: &[Tensor; 2], y: &[Tensor; 2]) -> Result<[Tensor; 2]> {
    let re = ((&x[0] * &y[0])? - (&x[1] * &y[1])?)?;
    Ok([re, ((&x[0] * &y[1])? + (&x[1] * &y[0])?)?])
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::VarMap;

    use super::*;
    use crate::nn::seeded_weights;

    /// Token by token, in chunks, and as one convolution with the kernel.
    #[test]
    fn recurrence_and_kernel_agree() -> Result<()> {
        let config = AttentionConfig::new(6, 1, Mechanism::S4d { states: 5 });
        let layer = S4d::new(&config, &seeded_weights(&VarMap::new(), 0, DType::F64, &Device::Cpu))?;
        let wave = |count: usize| (Tensor::arange(0f64, count as f64, &Device::Cpu)? * 0.7)?.sin();
        let x = wave(2 * 150 * 6)?.reshape((2, 150, 6))?;
        let state = wave(2 * 6 * 10)?.reshape((2, 6, 10))?;
        for state in [None, Some(&state)] {
            let (y, last) = layer.advance(&x, 1, state)?;
            for chunk in [7, CHUNK, 150] {
                let (other, other_last) = layer.advance(&x, chunk, state)?;
                for (a, b) in [(&y, other), (&last, other_last)] {
                    let error = (a - b)?.abs()?.max_all()?.to_scalar::<f64>()?;
                    assert!(error < 1e-11, "chunks of {chunk}: {error:e}");
                }
            }
        }
        Ok(())
    }
}
