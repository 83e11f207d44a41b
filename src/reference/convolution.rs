//! Causal convolution of every channel on its own, from its equation.

use std::ops::Range;

use super::Array;
use crate::convolution::ConvolutionOptions;

/// x `[1, B, N, C]`, weight `[1, 1, C, W]`, bias `[1, 1, 1, C]` and the rows before the first `[1, S, W − 1, C]`, S the number
/// of sequences.
#[derive(Debug, Clone)]
pub struct ConvolutionInputs {
    /// The rows.
    pub x: Array,
    /// The last tap is that of the current row.
    pub weight: Array,
    /// Added to every sum.
    pub bias: Option<Array>,
    /// 0 without.
    pub state: Option<Array>,
}

/// The gradients of all that there is.
pub type ConvolutionGradients = ConvolutionInputs;

/// Places of the rows `[entry, token]` of every sequence.
fn sequences(x: &Array, options: &ConvolutionOptions<Array>) -> Vec<Vec<[usize; 2]>> {
    let [_, batch, tokens, _] = x.shape;
    let is_kept =
        |&[entry, token]: &[usize; 2]| options.key_mask.as_ref().is_none_or(|mask| mask.row(0, 0, entry)[token] != 0.0);
    let places = |entry: usize, tokens: Range<usize>| {
        tokens.map(move |token| [entry, token]).filter(is_kept).collect::<Vec<_>>()
    };
    match &options.sequences {
        None => (0..batch).map(|entry| places(entry, 0..tokens)).collect(),
        Some(sequences) => sequences.ranges().map(|[tokens, _]| places(0, tokens)).collect(),
    }
}

/// Calls `visit` with sequence, rank of the row in it, channel, and z = b + Σ_j w_j x_j for every row that is kept.
fn sums(
    inputs: &ConvolutionInputs,
    options: &ConvolutionOptions<Array>,
    mut visit: impl FnMut(usize, &[[usize; 2]], usize, usize, f64),
) {
    let ConvolutionInputs { x, weight, bias, state } = inputs;
    let taps = weight.shape[3];
    for (index, places) in sequences(x, options).iter().enumerate() {
        for rank in 0..places.len() {
            for channel in 0..x.shape[3] {
                let input = |tap: usize| match (rank + tap + 1).checked_sub(taps) {
                    Some(rank) => x.row(0, places[rank][0], places[rank][1])[channel],
                    None => state.as_ref().map_or(0.0, |state| state.row(0, index, rank + tap)[channel]),
                };
                let sum: f64 = (0..taps).map(|tap| weight.row(0, 0, channel)[tap] * input(tap)).sum();
                let sum = sum + bias.as_ref().map_or(0.0, |bias| bias.data[channel]);
                visit(index, places, rank, channel, sum);
            }
        }
    }
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// y `[1, B, N, C]`, 0 in rows that the key mask removes.
pub fn causal_convolution(inputs: &ConvolutionInputs, options: &ConvolutionOptions<Array>) -> Array {
    let mut y = Array::zeros(inputs.x.shape);
    sums(inputs, options, |_, places, rank, channel, z| {
        let [entry, token] = places[rank];
        y.row_mut(0, entry, token)[channel] = if options.silu { z * sigmoid(z) } else { z };
    });
    y
}

/// The rows before those that follow: of every sequence the last W − 1.
pub fn causal_convolution_state(inputs: &ConvolutionInputs, options: &ConvolutionOptions<Array>) -> Array {
    let (sequences, kept) = (sequences(&inputs.x, options), inputs.weight.shape[3] - 1);
    Array::from_fn([1, sequences.len(), kept, inputs.x.shape[3]], |[_, index, row, channel]| {
        let places = &sequences[index];
        match (places.len() + row).checked_sub(kept) {
            Some(rank) => inputs.x.row(0, places[rank][0], places[rank][1])[channel],
            None => inputs.state.as_ref().map_or(0.0, |state| state.row(0, index, row + places.len())[channel]),
        }
    })
}

/// The gradients from that of y and that of the state that follows.
pub fn causal_convolution_backward(
    inputs: &ConvolutionInputs,
    options: &ConvolutionOptions<Array>,
    d_y: &Array,
    d_state: Option<&Array>,
) -> ConvolutionGradients {
    let zeros = |array: &Option<Array>| array.as_ref().map(|array| Array::zeros(array.shape));
    let taps = inputs.weight.shape[3];
    let mut gradients = ConvolutionGradients {
        x: Array::zeros(inputs.x.shape),
        weight: Array::zeros(inputs.weight.shape),
        bias: zeros(&inputs.bias),
        state: zeros(&inputs.state),
    };
    sums(inputs, options, |index, places, rank, channel, z| {
        let [entry, token] = places[rank];
        let slope = if options.silu { sigmoid(z) * (1.0 + z * (1.0 - sigmoid(z))) } else { 1.0 };
        let d_z = d_y.row(0, entry, token)[channel] * slope;
        for tap in 0..taps {
            let weight = inputs.weight.row(0, 0, channel)[tap];
            let input = match (rank + tap + 1).checked_sub(taps) {
                Some(rank) => {
                    let [entry, token] = places[rank];
                    gradients.x.row_mut(0, entry, token)[channel] += weight * d_z;
                    inputs.x.row(0, entry, token)[channel]
                }
                None => {
                    if let Some(state) = &mut gradients.state {
                        state.row_mut(0, index, rank + tap)[channel] += weight * d_z;
                    }
                    inputs.state.as_ref().map_or(0.0, |state| state.row(0, index, rank + tap)[channel])
                }
            };
            gradients.weight.row_mut(0, 0, channel)[tap] += input * d_z;
        }
        if let Some(bias) = &mut gradients.bias {
            bias.data[channel] += d_z;
        }
    });
    let Some(d_state) = d_state else { return gradients };
    for (index, places) in sequences(&inputs.x, options).iter().enumerate() {
        for row in 0..taps - 1 {
            for channel in 0..inputs.x.shape[3] {
                let d = d_state.row(0, index, row)[channel];
                match (places.len() + row + 1).checked_sub(taps) {
                    Some(rank) => gradients.x.row_mut(0, places[rank][0], places[rank][1])[channel] += d,
                    None => {
                        if let Some(state) = &mut gradients.state {
                            state.row_mut(0, index, row + places.len())[channel] += d;
                        }
                    }
                }
            }
        }
    }
    gradients
}
