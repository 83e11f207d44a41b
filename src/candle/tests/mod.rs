//! What belongs to this layer: views of tensors, the plumbing of gradients against candle's own autograd of the plain
//! formulas, refusals, states.

mod delta;
mod formulas;
mod gradients;
mod locks;
mod packed;
mod refusals;
mod softmax;
mod states;
mod through_states;
mod views;

use candle_core::{DType, Device, Result, Tensor, Var};

/// Numbers in [−1, 1), the same for the same shape and seed.
fn random(dims: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let numbers: Vec<f64> = (0..dims.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect();
    Tensor::from_vec(numbers, dims, &Device::Cpu)
}

fn variable(dims: &[usize], seed: u64) -> Result<Var> {
    Var::from_tensor(&random(dims, seed)?)
}

/// Largest |a − b|, infinite for NaN.
fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
    let [a, b] = [a, b].map(|x| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>());
    Ok(a?
        .iter()
        .zip(&b?)
        .map(|(a, b)| (a - b).abs())
        .map(|d| if d.is_nan() { f64::INFINITY } else { d })
        .fold(0.0, f64::max))
}

#[track_caller]
fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
    let distance = distance(a, b)?;
    assert!(distance <= tolerance, "{distance} > {tolerance}");
    Ok(())
}

/// ⟨x, weights⟩ with fixed random weights: a loss whose gradient differs everywhere.
fn loss(x: &Tensor) -> Result<Tensor> {
    (x * random(x.dims(), 77)?.to_dtype(x.dtype())?)?.sum_all()
}

/// Compares two losses and their gradients by `variables`.
#[track_caller]
fn assert_same_gradients(ours: &Tensor, theirs: &Tensor, variables: &[&Var]) -> Result<()> {
    assert_close(ours, theirs, 1e-10)?;
    let (ours, theirs) = (ours.backward()?, theirs.backward()?);
    for (index, variable) in variables.iter().enumerate() {
        let (Some(ours), Some(theirs)) = (ours.get(variable), theirs.get(variable)) else {
            panic!("variable {index} has no gradient");
        };
        let distance = distance(ours, theirs)?;
        assert!(distance <= 1e-10, "variable {index}: {distance}");
    }
    Ok(())
}
