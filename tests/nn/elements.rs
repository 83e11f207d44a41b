//! Activations, gates and the loss, against formulas in f64.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use attn_kernels::cpu::Isa;
use attn_kernels::nn::{Activation, cross_entropy};
use candle_core::{DType, Device, Module, Result, Tensor, Var};

use super::{assert_close, assert_refused, random};

const ALL: [Activation; 6] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Sigmoid,
    Activation::Softplus,
];

/// Alone, a part of a vector, whole ones, and more than a thread takes at once.
const COUNTS: [usize; 5] = [1, 7, 64, 16_384, 16_384 * 2 + 21];

/// 1/(1 + e⁻ˣ), also where that is small.
fn sigmoid(x: f64) -> f64 {
    if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) }
}

/// a(x) and a′(x).
fn value_and_slope(activation: Activation, x: f64) -> (f64, f64) {
    match activation {
        Activation::Silu => (x * sigmoid(x), sigmoid(x) * (1.0 + x * sigmoid(-x))),
        Activation::Gelu => {
            let distribution = libm::erfc(-x * FRAC_1_SQRT_2) / 2.0;
            (x * distribution, distribution + x * (-x * x / 2.0).exp() / (2.0 * PI).sqrt())
        }
        Activation::GeluTanh => {
            let (unit, cubic) = ((8.0 / PI).sqrt(), 0.044715 * x * x);
            let (up, down) = (sigmoid(unit * x * (1.0 + cubic)), sigmoid(-unit * x * (1.0 + cubic)));
            (x * up, up * (1.0 + x * down * unit * (1.0 + 3.0 * cubic)))
        }
        Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
        Activation::Sigmoid => (sigmoid(x), sigmoid(x) * sigmoid(-x)),
        Activation::Softplus => (x.max(0.0) + (-x.abs()).exp().ln_1p(), sigmoid(x)),
    }
}

/// Runs `f` on every instruction set of this processor.
fn on_every_isa(f: impl Fn(&str) -> Result<()>) -> Result<()> {
    Isa::ALL.into_iter().filter_map(|isa| isa.force(|| f(isa.name()))).collect()
}

fn wide(x: &Tensor) -> Result<Vec<f64>> {
    x.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// Numbers between ±12, most of them near 0, in the dtype.
fn spread(count: usize, dtype: DType) -> Result<Var> {
    let x = (0..count).map(|i| 12.0 * (0.37 * i as f64 + 0.1).sin().powi(3)).collect();
    Var::from_tensor(&Tensor::from_vec(x, count, &Device::Cpu)?.to_dtype(dtype)?)
}

#[test]
fn activations_are_their_formulas() -> Result<()> {
    on_every_isa(|isa| {
        for activation in ALL {
            for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 4e-6), (DType::BF16, 4e-3), (DType::F16, 5e-4)]
            {
                for count in COUNTS {
                    let x = spread(count, dtype)?;
                    let y = activation.forward(&x)?;
                    let gradients = y.sum_all()?.backward()?;
                    let (y, d_x) = (wide(&y)?, wide(gradients.get(&x).unwrap())?);
                    for ((x, y), d_x) in wide(&x)?.into_iter().zip(y).zip(d_x) {
                        let (value, slope) = value_and_slope(activation, x);
                        let what = format!("{activation:?} {dtype:?} {isa} at {x}");
                        // Small values are as exact as large ones, but for the rounding of their exponent, down to where
                        // the dtype has no more digits.
                        let least = if dtype == DType::F16 { 1e-4 } else { 1e-30 };
                        let size = value.abs().max(least);
                        let tolerance = tolerance * (1.0 - size.ln().min(0.0) / 16.0);
                        assert!((y - value).abs() < tolerance * size, "{what}: {y}, not {value}");
                        assert!((d_x - slope).abs() < tolerance, "{what}: slope {d_x}, not {slope}");
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn activations_have_no_holes() -> Result<()> {
    on_every_isa(|isa| {
        for activation in ALL {
            for x in [1e30f32, 3e38, -1e30, -3e38, 0.0, -0.0, 1e-40, 88.0, -88.0] {
                let x = Var::new(&[x], &Device::Cpu)?;
                let y = activation.forward(&x)?;
                let d_x = wide(y.sum_all()?.backward()?.get(&x).unwrap())?[0];
                let (x, y) = (wide(&x)?[0], wide(&y)?[0]);
                // At both ends the activation is x or 0, and around 0 it is near 0; the sigmoid is flat at both.
                let is_flat = activation == Activation::Sigmoid;
                let (value, slope) = match x {
                    _ if x > 50.0 => (if is_flat { 1.0 } else { x }, Some(if is_flat { 0.0 } else { 1.0 })),
                    _ if x < -50.0 => (0.0, Some(0.0)),
                    _ => (value_and_slope(activation, 0.0).0, None),
                };
                let error = (y - value).abs();
                assert!(error <= 1e-6 * value.abs() + 1e-35, "{activation:?} {isa}: {y} at {x}, not {value}");
                let is_right = slope.map_or(d_x.is_finite(), |slope| (d_x - slope).abs() < 1e-6);
                assert!(is_right, "{activation:?} {isa}: slope {d_x} at {x}");
            }
            let nan = activation.forward(&Tensor::new(&[f32::NAN, 1.0], &Device::Cpu)?)?;
            let nan = wide(&nan)?;
            assert!(nan[0].is_nan() && nan[1].is_finite(), "{activation:?} {isa}: {nan:?}");
        }
        Ok(())
    })
}

#[test]
fn gates_are_products() -> Result<()> {
    on_every_isa(|isa| {
        for activation in ALL {
            for count in COUNTS {
                let (gate, x) = (spread(count, DType::F64)?, Var::from_tensor(&random("x", &[count])?)?);
                let weights = random("weights", &[count])?;
                let what = format!("{activation:?} {isa} of {count}");
                let gated = activation.gate(&gate, &x)?;
                let product = (activation.forward(&gate)? * x.as_tensor())?;
                assert_close(&gated, &product, 1e-14, &what)?;
                let [ours, theirs] = [gated, product].map(|y| (y * &weights)?.sum_all()?.backward());
                let (ours, theirs) = (ours?, theirs?);
                for input in [&gate, &x] {
                    assert_close(ours.get(input).unwrap(), theirs.get(input).unwrap(), 1e-14, &what)?;
                }
            }
        }
        Ok(())
    })
}

/// Views of any strides, gradients that are broadcast, inputs without a gradient, halves.
#[test]
fn gates_of_any_layout() -> Result<()> {
    let (gate, x) = (Var::from_tensor(&random("gate", &[3, 4, 5])?)?, Var::from_tensor(&random("x", &[3, 5, 4])?)?);
    let view = gate.transpose(1, 2)?;
    let loss = Activation::Silu.gate(&view, &x)?.sum_all()?;
    let plain = (Activation::Silu.forward(&view.contiguous()?)? * x.as_tensor())?.sum_all()?;
    let (ours, theirs) = (loss.backward()?, plain.backward()?);
    for input in [&gate, &x] {
        assert_close(ours.get(input).unwrap(), theirs.get(input).unwrap(), 1e-14, "views")?;
    }
    let constant = Activation::Gelu.gate(&view.detach(), &x)?.sum_all()?.backward()?;
    assert!(constant.get(&gate).is_none() && constant.get(&x).is_some());
    let halves = [view.detach(), x.as_detached_tensor()].map(|x| x.to_dtype(DType::BF16));
    let [gate, x] = halves;
    let (gate, x) = (gate?, x?);
    let wide = Activation::Gelu.gate(&gate.to_dtype(DType::F32)?, &x.to_dtype(DType::F32)?)?.to_dtype(DType::BF16)?;
    assert_close(&Activation::Gelu.gate(&gate, &x)?, &wide, 0.0, "one rounding")?;
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?;
    assert_eq!(Activation::Gelu.gate(&empty, &empty)?.dims(), [0, 4]);
    assert_eq!(Activation::Gelu.forward(&empty)?.dims(), [0, 4]);
    assert_refused(Activation::Gelu.gate(&gate, &gate.t()?), &["Activation::gate", "[3, 5, 4]", "[3, 4, 5]"]);
    assert_refused(Activation::Gelu.gate(&gate, &x.to_dtype(DType::F32)?), &["Activation::gate", "BF16", "F32"]);
    assert_refused(Activation::Gelu.forward(&x.to_dtype(DType::U32)?), &["Activation", "U32"]);
    Ok(())
}

/// The loss and its gradient of logits and classes, row by row; a class below 0 does not count.
fn plain_cross_entropy(logits: &[f64], width: usize, targets: &[i64]) -> (f64, Vec<f64>) {
    let count = targets.iter().filter(|&&target| target >= 0).count() as f64;
    let (mut loss, mut gradient) = (0.0, Vec::new());
    for (row, &target) in logits.chunks(width).zip(targets) {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - largest).exp()).sum();
        let counts = if target >= 0 { 1.0 / count } else { 0.0 };
        let target = usize::try_from(target).unwrap_or(0);
        loss += counts * (largest + sum.ln() - row[target]);
        let hits = |column| if column == target { 1.0 } else { 0.0 };
        gradient.extend(row.iter().enumerate().map(|(c, x)| counts * ((x - largest).exp() / sum - hits(c))));
    }
    (loss, gradient)
}

#[test]
fn cross_entropy_is_its_formula() -> Result<()> {
    on_every_isa(|isa| {
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 2e-6), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
            for (rows, width) in [(1, 1), (3, 2), (5, 9), (40, 64), (7, 2055), (300, 17)] {
                for (scale, shift) in [(1.0, 0.0), (5.0, 100.0), (1.0, -1e4)] {
                    let what = format!("{dtype:?} {isa} {rows}×{width}, {scale}x + {shift}");
                    let logits = (random("logits", &[rows, width])?.affine(scale, shift))?.to_dtype(dtype)?;
                    let targets: Vec<i64> =
                        (0..rows as i64).map(|row| if row % 4 == 3 { -100 } else { row * 7 % width as i64 }).collect();
                    let (loss, gradient) = plain_cross_entropy(&wide(&logits)?, width, &targets);
                    let logits = Var::from_tensor(&logits)?;
                    let ours = cross_entropy(&logits, &Tensor::new(targets, &Device::Cpu)?)?;
                    assert_eq!(ours.dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
                    // What is lost where logits are large is lost in their own last place.
                    let error = (wide(&ours)?[0] - loss).abs() / (1.0 + f64::abs(shift));
                    assert!(error < f64::min(tolerance, 2e-6), "{what}: {ours}, not {loss}");
                    let gradients = (ours * 3.0)?.backward()?;
                    let gradient: Vec<f64> = gradient.into_iter().map(|d| 3.0 * d).collect();
                    let gradient = Tensor::from_vec(gradient, (rows, width), &Device::Cpu)?;
                    let ours = gradients.get(&logits).unwrap().to_dtype(DType::F64)?;
                    let tolerance = tolerance * (1.0 + shift.abs() / 10.0);
                    assert_close(&ours, &gradient, tolerance, &what)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn cross_entropy_of_any_shape() -> Result<()> {
    let logits = Var::from_tensor(&random("logits", &[2, 3, 5])?)?;
    let targets = Tensor::new(&[[0u32, 4, 2], [1, 1, 3]], &Device::Cpu)?;
    let loss = cross_entropy(&logits, &targets)?;
    let flat = cross_entropy(&logits.flatten_to(1)?, &targets.flatten_all()?)?;
    assert_close(&loss, &flat, 0.0, "flattened")?;
    assert_eq!(loss.backward()?.get(&logits).unwrap().dims(), [2, 3, 5]);
    let none = cross_entropy(&logits, &Tensor::full(-1i64, (2, 3), &Device::Cpu)?)?;
    assert_eq!(none.to_scalar::<f64>()?, 0.0);
    let masked = Tensor::new(&[[0f32, f32::NEG_INFINITY, 0.0]], &Device::Cpu)?;
    let masked = cross_entropy(&masked, &Tensor::new(&[2u8], &Device::Cpu)?)?.to_scalar::<f32>()?;
    assert!((masked - 2f32.ln()).abs() < 1e-6, "{masked}");
    assert_refused(cross_entropy(&logits, &targets.narrow(0, 0, 1)?), &["cross_entropy", "[1, 3]", "[2, 3, 5]"]);
    assert_refused(cross_entropy(&logits, &(&targets + 2.0)?), &["cross_entropy", "6", "row 1", "5 classes"]);
    assert_refused(cross_entropy(&logits, &targets.to_dtype(DType::F32)?), &["cross_entropy", "F32"]);
    assert_refused(cross_entropy(&targets, &targets), &["cross_entropy", "targets [2, 3] for logits [2, 3]"]);
    Ok(())
}
