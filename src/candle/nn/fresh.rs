//! Fresh weights whose numbers no distribution of candle-nn gives.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder};

/// A weight; the numbers of a fresh one are made of drawn ones. Variables are changed in place, so that a `VarMap` has them.
pub(super) fn begun<S: Into<Shape>>(
    weights: &VarBuilder,
    name: &str,
    shape: S,
    (init, dtype): (Init, DType),
    numbers: impl FnOnce(Vec<f64>) -> Result<Vec<f64>>,
) -> Result<Tensor> {
    let is_fresh = !weights.contains_tensor(name);
    let mut weight = weights.get_with_hints_dtype(shape, name, init, dtype)?;
    if is_fresh {
        let drawn = weight.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        let numbers = Tensor::from_vec(numbers(drawn)?, weight.shape(), &Device::Cpu)?;
        assign(&mut weight, numbers)?;
    }
    Ok(weight)
}

/// Gives a tensor other numbers, a variable in place.
pub(super) fn assign(tensor: &mut Tensor, numbers: Tensor) -> Result<()> {
    let numbers = numbers.to_dtype(tensor.dtype())?.to_device(tensor.device())?;
    if tensor.is_variable() {
        return Var::from_tensor(tensor)?.set(&numbers);
    }
    *tensor = numbers;
    Ok(())
}
