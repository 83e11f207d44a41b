use attn_kernels::nn::{
    Activation, FeedForward, FeedForwardConfig, LanguageModel, LanguageModelConfig, Mechanism, Norm, NormConfig,
    NormKind, Rotary, seeded_weights,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::VarMap;

use super::{WIDTH, enlarge, is_trained, layer, layers_both_ways, random};

/// ⟨y, fixed random numbers⟩
fn loss(y: &Tensor) -> Result<Tensor> {
    (y * random("loss", y.dims())?.to_dtype(y.dtype())?)?.sum_all()
}

/// Compares the gradients of a loss with central differences, at up to 9 entries of every variable.
fn check(what: &str, variables: &[(String, Var)], forward: &dyn Fn() -> Result<Tensor>) -> Result<()> {
    const STEP: f64 = 1e-5;
    let gradients = loss(&forward()?)?.backward()?;
    for (name, variable) in variables {
        let Some(gradient) = gradients.get(variable) else { panic!("{what}: no gradient for {name}") };
        let gradient = gradient.flatten_all()?.to_vec1::<f64>()?;
        let values = variable.flatten_all()?.to_vec1::<f64>()?;
        let at = |index: usize, step: f64| -> Result<f64> {
            let mut moved = values.clone();
            moved[index] += step;
            variable.set(&Tensor::from_vec(moved, variable.dims(), &Device::Cpu)?)?;
            loss(&forward()?)?.to_scalar::<f64>()
        };
        let largest = gradient.iter().fold(0.0, |largest: f64, g| largest.max(g.abs()));
        assert!(largest > 1e-4, "{what}: {name} does not matter, {largest:e}");
        for index in (0..values.len()).step_by(values.len().div_ceil(9)) {
            let difference = (at(index, STEP)? - at(index, -STEP)?) / (2.0 * STEP);
            let error = (gradient[index] - difference).abs();
            assert!(error < 1e-7 * (1.0 + largest), "{what}: {name}[{index}]: {} is not {difference}", gradient[index]);
        }
        variable.set(&Tensor::from_vec(values, variable.dims(), &Device::Cpu)?)?;
    }
    Ok(())
}

fn trained(variables: &VarMap) -> Vec<(String, Var)> {
    let data = variables.data().lock().unwrap();
    data.iter().filter(|(name, _)| is_trained(name)).map(|(name, variable)| (name.clone(), variable.clone())).collect()
}

#[test]
fn attention_layers() -> Result<()> {
    for config in layers_both_ways() {
        let (variables, layer) = layer(&config)?;
        let x = Var::from_tensor(&random("x", &[2, 7, WIDTH])?)?;
        let mut all = trained(&variables);
        all.push(("x".into(), x.clone()));
        let mask = Tensor::new(&[[1u8, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0]], &Device::Cpu)?;
        check(&format!("{config:?}"), &all, &|| layer.forward_masked(&x, Some(&mask)))?;
    }
    Ok(())
}

#[test]
fn parts() -> Result<()> {
    let x = Var::from_tensor(&random("x", &[2, 3, WIDTH])?)?;
    for (kind, unit_offset) in [(NormKind::Rms, false), (NormKind::Layer, false), (NormKind::Rms, true)] {
        let variables = VarMap::new();
        let weights = seeded_weights(&variables, 0, DType::F64, &Device::Cpu);
        let norm = Norm::new(WIDTH, &NormConfig { kind, epsilon: 0.1, unit_offset }, weights.pp("norm"))?;
        enlarge(&variables)?;
        let all = [trained(&variables), vec![("x".into(), x.clone())]].concat();
        check(&format!("{kind:?} {unit_offset}"), &all, &|| norm.forward(&x))?;
    }
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        for gated in [false, true] {
            let variables = VarMap::new();
            let weights = seeded_weights(&variables, 0, DType::F64, &Device::Cpu);
            let config = FeedForwardConfig { hidden: 11, gated, activation, bias: gated };
            let layer = FeedForward::new(WIDTH, &config, weights)?;
            enlarge(&variables)?;
            let all = [trained(&variables), vec![("x".into(), x.clone())]].concat();
            check(&format!("{config:?}"), &all, &|| layer.forward(&x))?;
        }
    }
    let rotary = Rotary::new(WIDTH, 100.0)?;
    check("rotary", &[("x".into(), x.clone())], &|| rotary.apply(&x.unsqueeze(1)?, 5))
}

#[test]
fn language_models() -> Result<()> {
    for name in LanguageModelConfig::NAMES {
        let mut config = LanguageModelConfig::named(name, 7, WIDTH, 2, 2)?;
        config.tied = name == "softmax";
        if let Mechanism::Performer { epsilon, .. } = &mut config.attention.mechanism {
            *epsilon = 0.0;
        }
        let variables = VarMap::new();
        let model = LanguageModel::new(&config, seeded_weights(&variables, 1, DType::F64, &Device::Cpu))?;
        enlarge(&variables)?;
        for (name, variable) in trained(&variables) {
            if name.starts_with("embed") || name.starts_with("lm_head") {
                variable.set(&random(&name, variable.dims())?)?;
            }
        }
        let tokens = Tensor::new(&[[1u32, 5, 2, 6, 3], [4, 0, 0, 2, 1]], &Device::Cpu)?;
        check(name, &trained(&variables), &|| model.forward(&tokens))?;
    }
    Ok(())
}
