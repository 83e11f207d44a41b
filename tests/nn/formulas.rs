use attn_kernels::nn::{
    Activation, FeedForward, FeedForwardConfig, Norm, NormConfig, NormKind, Rotary, seeded_weights,
};
use attn_kernels::reference::Array;
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarMap;

use super::by_hand::{ByHand, array};
use super::{WIDTH, enlarge, layer, layers_both_ways, random};

#[track_caller]
fn assert_same(ours: &[f64], theirs: &[f64], what: &str) {
    assert_eq!(ours.len(), theirs.len());
    let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / (1.0 + b.abs()));
    let worst = worst.fold(0.0, |worst, d| if d.is_nan() { f64::INFINITY } else { f64::max(worst, d) });
    assert!(worst < 1e-11, "{what}: {worst:e}");
}

#[test]
fn attention_layers() -> Result<()> {
    let x = random("x", &[2, 13, WIDTH])?;
    let mut mask = vec![1u8; 26];
    [3, 12, 14, 20, 25].into_iter().for_each(|key| mask[key] = 0);
    let some = Tensor::from_vec(mask, (2, 13), &Device::Cpu)?;
    for config in layers_both_ways() {
        let (variables, layer) = layer(&config)?;
        let by_hand = ByHand { config: &config, variables: &variables };
        let expected = by_hand.forward(&array(&x)?, Array::filled([1, 1, 2, 13], 1.0));
        assert_same(&array(&layer.forward(&x)?)?.data, &expected.data, &format!("{config:?}"));
        let expected = by_hand.forward(&array(&x)?, array(&some.to_dtype(DType::F64)?)?);
        let ours = layer.forward_masked(&x, Some(&some))?;
        assert_same(&array(&ours)?.data, &expected.data, &format!("{config:?}, masked"));
    }
    Ok(())
}

#[test]
fn norms() -> Result<()> {
    let choices = [NormKind::Rms, NormKind::Layer].map(|kind| [false, true].map(|unit_offset| (kind, unit_offset)));
    for (kind, unit_offset) in choices.into_iter().flatten() {
        let variables = VarMap::new();
        let weights = seeded_weights(&variables, 0, DType::F64, &Device::Cpu);
        let norm = Norm::new(3, &NormConfig { kind, epsilon: 0.5, unit_offset }, weights.pp("norm"))?;
        enlarge(&variables)?;
        let weight = |name: &str| array(&variables.data().lock().unwrap()[name]).map(|array| array.data);
        let (x, gain) = ([1.0, -2.0, 4.0], weight("norm.weight")?);
        let (mean, shift) = match kind {
            NormKind::Rms => (0.0, vec![0.0; 3]),
            NormKind::Layer => (1.0, weight("norm.bias")?),
        };
        let variance = x.map(|x: f64| (x - mean).powi(2)).iter().sum::<f64>() / 3.0;
        let offset = f64::from(unit_offset);
        let expected = [0, 1, 2].map(|i| (x[i] - mean) / (variance + 0.5).sqrt() * (offset + gain[i]) + shift[i]);
        let ours = norm.forward(&Tensor::new(&[x], &Device::Cpu)?)?;
        assert_same(&array(&ours)?.data, &expected, &format!("{kind:?} {unit_offset}"));
    }
    Ok(())
}

#[test]
fn feed_forward() -> Result<()> {
    let x = [0.5, -1.5];
    let normal = |x: f64| 0.5 * (1.0 + libm_erf(x / 2f64.sqrt()));
    let gelu_tanh =
        |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
    let activations: [(Activation, &dyn Fn(f64) -> f64); 4] = [
        (Activation::Silu, &|x| x / (1.0 + (-x).exp())),
        (Activation::Gelu, &|x| x * normal(x)),
        (Activation::GeluTanh, &gelu_tanh),
        (Activation::Relu, &|x| x.max(0.0)),
    ];
    for (activation, apply) in activations {
        for gated in [false, true] {
            let variables = VarMap::new();
            let config = FeedForwardConfig { hidden: 3, gated, activation, bias: true };
            let layer = FeedForward::new(2, &config, seeded_weights(&variables, 0, DType::F64, &Device::Cpu))?;
            enlarge(&variables)?;
            let project = |name: &str, x: &[f64]| -> Result<Vec<f64>> {
                let data = variables.data().lock().unwrap();
                let weight = data[&format!("{name}.weight")].to_vec2::<f64>()?;
                let bias = data[&format!("{name}.bias")].to_vec1::<f64>()?;
                let row = |(row, bias): (&Vec<f64>, &f64)| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias;
                Ok(weight.iter().zip(&bias).map(row).collect())
            };
            let up = project("up_proj", &x)?;
            let inner: Vec<f64> = match gated {
                false => up.into_iter().map(apply).collect(),
                true => project("gate_proj", &x)?.into_iter().zip(up).map(|(gate, up)| apply(gate) * up).collect(),
            };
            let ours = layer.forward(&Tensor::new(&[x], &Device::Cpu)?)?;
            assert_same(&array(&ours)?.data, &project("down_proj", &inner)?, &format!("{activation:?} {gated}"));
        }
    }
    Ok(())
}

/// erf by its series.
fn libm_erf(x: f64) -> f64 {
    let term = |n: i32| {
        let factorial: f64 = (1..=n).map(f64::from).product();
        (-1f64).powi(n) * x.powi(2 * n + 1) / (factorial * f64::from(2 * n + 1))
    };
    2.0 / std::f64::consts::PI.sqrt() * (0..60).map(term).sum::<f64>()
}

/// What rotary embedding is for: products depend on the distance alone. Far positions are as exact as near ones.
#[test]
fn rotary_products_depend_on_the_distance() -> Result<()> {
    let rotary = Rotary::new(16, 10000.0)?;
    for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-5), (DType::BF16, 0.1)] {
        let [q, k] = ["q", "k"].map(|name| random(name, &[1, 1, 1, 16])?.to_dtype(dtype));
        let (q, k) = (q?, k?);
        let product = |at: usize| -> Result<f64> {
            let (q, k) = (rotary.apply(&q, at + 7)?, rotary.apply(&k, at)?);
            (q.to_dtype(DType::F64)? * k.to_dtype(DType::F64)?)?.sum_all()?.to_scalar()
        };
        let near = product(0)?;
        for at in [1, 100, 70_000] {
            assert!((product(at)? - near).abs() < tolerance, "{dtype:?} at {at}: {} is not {near}", product(at)?);
        }
        assert!(
            (rotary.apply(&q, 0)?.to_dtype(DType::F64)? - q.to_dtype(DType::F64)?)?
                .abs()?
                .max_all()?
                .to_scalar::<f64>()?
                == 0.0
        );
    }
    Ok(())
}
