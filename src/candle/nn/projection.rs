use candle_core::Result;
use candle_nn::{Init, Linear, VarBuilder};

/// A linear layer with the weights `weight` `[output, input]` and maybe `bias`. Fresh ones keep the variance of rows:
/// N(0, 1/input), and 0.
pub(super) fn projection(input: usize, output: usize, bias: bool, weights: VarBuilder) -> Result<Linear> {
    let init = Init::Randn { mean: 0.0, stdev: 1.0 / (input as f64).sqrt() };
    let weight = weights.get_with_hints((output, input), "weight", init)?;
    let bias = if bias { Some(weights.get_with_hints(output, "bias", Init::Const(0.0))?) } else { None };
    Ok(Linear::new(weight, bias))
}
