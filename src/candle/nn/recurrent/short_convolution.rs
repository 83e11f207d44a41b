use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::Sequences;
use crate::candle::nn::cache::Recurrence;
use crate::candle::{causal_convolution, causal_convolution_with_state};
use crate::convolution::ConvolutionOptions;

/// A convolution with SiLU behind a projection, weights `weight` `[channels, 1, taps]` and maybe `bias`, as of `Conv1d`.
#[derive(Debug, Clone)]
pub(super) struct ShortConvolution {
    /// [channels, taps]
    weight: Tensor,
    bias: Option<Tensor>,
}

/// Where rows stand.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// All of their sequences.
    Whole(Option<&'a Sequences>),
    After(Option<&'a Recurrence>),
}

impl ShortConvolution {
    pub fn new([channels, taps]: [usize; 2], bias: bool, weights: VarBuilder) -> Result<Self> {
        let bound = 1.0 / (taps as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = weights.get_with_hints((channels, 1, taps), "weight", init)?.squeeze(1)?;
        let bias = if bias { Some(weights.get_with_hints(channels, "bias", Init::Const(0.0))?) } else { None };
        Ok(Self { weight, bias })
    }

    /// Of some of the channels.
    pub fn part(&self, first: usize, count: usize) -> Result<Self> {
        let of = |tensor: &Tensor| tensor.narrow(0, first, count);
        Ok(Self { weight: of(&self.weight)?, bias: self.bias.as_ref().map(of).transpose()? })
    }

    /// Rows `[B, N, channels]`, and the last of them where they go on from a state, the `index`th of its inputs.
    pub fn forward(&self, rows: &Tensor, place: Place<'_>, index: usize) -> Result<(Tensor, Option<Tensor>)> {
        let mut options = ConvolutionOptions { silu: true, ..Default::default() };
        let bias = self.bias.as_ref();
        match place {
            Place::Whole(sequences) => {
                options.sequences = sequences.cloned();
                Ok((causal_convolution(rows, &self.weight, bias, &options)?, None))
            }
            Place::After(before) => {
                let state = before.and_then(|before| before.inputs.get(index));
                let (rows, next) = causal_convolution_with_state(rows, &self.weight, bias, &options, state)?;
                Ok((rows, Some(next)))
            }
        }
    }
}
