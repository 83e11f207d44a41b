use std::collections::HashMap;

use attn_kernels::nn::{
    Attention, AttentionConfig, LanguageModel, LanguageModelConfig, Mechanism, foreign_weights, seeded_weights,
};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use super::{Scratch, WIDTH, assert_close, assert_refused, is_trained, layer, layers, random};

fn stored<'a>(file: &Scratch, dtype: DType) -> Result<VarBuilder<'a>> {
    VarBuilder::from_buffered_safetensors(std::fs::read(&file.0).unwrap(), dtype, &Device::Cpu)
}

#[test]
fn layers_are_stored_and_loaded() -> Result<()> {
    let x = random("x", &[2, 7, WIDTH])?;
    for (index, config) in layers().into_iter().enumerate() {
        let file = Scratch::new(&format!("layer-{index}"));
        let (variables, layer) = layer(&config)?;
        variables.save(&file.0)?;
        let expected = layer.forward(&x)?;
        // For inference, and into fresh variables for training.
        let loaded = Attention::new(&config, stored(&file, DType::F64)?)?;
        assert_close(&loaded.forward(&x)?, &expected, 0.0, &format!("{config:?}"))?;
        let mut fresh = VarMap::new();
        let trained = Attention::new(&config, seeded_weights(&fresh, 77, DType::F64, &Device::Cpu))?;
        assert!(super::distance(&trained.forward(&x)?, &expected)? > 1e-3);
        fresh.load(&file.0)?;
        assert_close(&trained.forward(&x)?, &expected, 0.0, &format!("{config:?}"))?;
        // In another dtype.
        let narrow = Attention::new(&config, stored(&file, DType::F32)?)?.forward(&x.to_dtype(DType::F32)?)?;
        assert_close(&narrow.to_dtype(DType::F64)?, &expected, 1e-3, &format!("{config:?} in f32"))?;
    }
    Ok(())
}

/// The layers that have the same names and shapes of weights as softmax.
#[test]
fn another_mechanism_is_refused() -> Result<()> {
    let configs: Vec<_> = ["softmax", "linear", "norm", "diag", "performer", "retention", "gau", "flash"]
        .map(|name| AttentionConfig::new(WIDTH, 1, Mechanism::named(name).unwrap()))
        .into();
    for config in &configs {
        let file = Scratch::new(&format!("mark-{}", config.mechanism.name()));
        let variables = VarMap::new();
        Attention::new(config, seeded_weights(&variables, 0, DType::F32, &Device::Cpu).pp("layers.3.self_attn"))?;
        variables.save(&file.0)?;
        for other in configs.iter().filter(|other| *other != config) {
            let (theirs, ours) = (config.mechanism.name(), other.mechanism.name());
            let result = Attention::new(other, stored(&file, DType::F32)?.pp("layers.3.self_attn"));
            assert_refused(
                result,
                &["layers.3.self_attn", &format!("of kind {theirs}"), &format!("is of kind {ours}")],
            );
            // The way of `VarMap::load`.
            let mut fresh = VarMap::new();
            Attention::new(other, seeded_weights(&fresh, 0, DType::F32, &Device::Cpu).pp("layers.3.self_attn"))?;
            let error = fresh.load(&file.0).unwrap_err().to_string();
            assert!(error.contains("layers.3.self_attn."), "{error}");
            // Two layers in one place.
            let weights = seeded_weights(&variables, 0, DType::F32, &Device::Cpu).pp("layers.3.self_attn");
            assert_refused(Attention::new(other, weights), &["layers.3.self_attn", theirs, ours]);
        }
    }
    Ok(())
}

#[test]
fn a_variable_map_refuses_by_the_mark() -> Result<()> {
    let file = Scratch::new("variable-map");
    let (variables, _) = layer(&AttentionConfig::new(WIDTH, 2, Mechanism::named("norm")?))?;
    variables.save(&file.0)?;
    let (mut linear, _) = layer(&AttentionConfig::new(WIDTH, 2, Mechanism::named("linear")?))?;
    assert_refused(linear.load(&file.0), &["mechanism.linear"]);
    Ok(())
}

#[test]
fn missing_and_misshaped_weights_are_named() -> Result<()> {
    for config in layers() {
        let (variables, _) = layer(&config)?;
        let tensors: HashMap<String, Tensor> = variables
            .data()
            .lock()
            .unwrap()
            .iter()
            .map(|(name, variable)| (format!("blocks.0.{name}"), variable.as_detached_tensor()))
            .collect();
        for name in tensors.keys() {
            let build = |tensors: HashMap<String, Tensor>| {
                Attention::new(&config, VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu).pp("blocks.0"))
            };
            let mut missing = tensors.clone();
            missing.remove(name);
            assert_refused(build(missing), &[name]);
            let mut misshaped = tensors.clone();
            misshaped.insert(name.clone(), Tensor::zeros((3, 17), DType::F64, &Device::Cpu)?);
            assert_refused(build(misshaped), &[name, "[3, 17]"]);
        }
        build_all(&config, tensors)?;
    }
    Ok(())
}

/// Without marks, weights load by an explicit choice, and only what is ours may be missing.
fn build_all(config: &AttentionConfig, tensors: HashMap<String, Tensor>) -> Result<()> {
    let theirs: HashMap<_, _> = tensors.into_iter().filter(|(name, _)| is_trained(name)).collect();
    let foreign = |tensors| foreign_weights(VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu)).pp("blocks.0");
    let plain = VarBuilder::from_tensors(theirs.clone(), DType::F64, &Device::Cpu).pp("blocks.0");
    assert_refused(Attention::new(config, plain), &["blocks.0.mechanism", "foreign_weights"]);
    let (x, loaded) = (random("x", &[1, 7, WIDTH])?, Attention::new(config, foreign(theirs.clone()))?);
    // The same weights and, for Performer, the features of the seed.
    let (_, original) = layer(config)?;
    assert_close(&loaded.forward(&x)?, &original.forward(&x)?, 0.0, &format!("{config:?}"))?;
    let mut missing = theirs;
    missing.remove("blocks.0.o_proj.weight");
    assert_refused(Attention::new(config, foreign(missing)), &["blocks.0.o_proj.weight"]);
    Ok(())
}

#[test]
fn random_features_are_part_of_the_checkpoint() -> Result<()> {
    let x = random("x", &[1, 7, WIDTH])?;
    let config = |seed| {
        let Ok(Mechanism::Performer { features, directions, map, epsilon, .. }) = Mechanism::named("performer") else {
            panic!("not a performer");
        };
        AttentionConfig::new(WIDTH, 2, Mechanism::Performer { features, directions, seed, map, epsilon })
    };
    let file = Scratch::new("features");
    let (variables, mut layer) = layer(&config(5))?;
    let before = layer.forward(&x)?;
    let mut cache = layer.cache()?;
    layer.forward_cached(&x, &mut cache)?;
    layer.redraw(u64::MAX - 6)?;
    assert_eq!(layer.seed()?, Some(u64::MAX - 6));
    let expected = layer.forward(&x)?;
    assert!(super::distance(&expected, &before)? > 1e-6);
    assert_refused(layer.forward_cached(&x, &mut cache), &["`cache`", "drawn anew"]);
    variables.save(&file.0)?;

    // The seed of the configuration does not matter for weights that exist.
    for seed in [5, 6] {
        let mut loaded = Attention::new(&config(seed), stored(&file, DType::F64)?)?;
        assert_eq!(loaded.seed()?, Some(u64::MAX - 6));
        assert_close(&loaded.forward(&x)?, &expected, 0.0, "loaded")?;
        loaded.redraw(5)?;
        assert_close(&loaded.forward(&x)?, &before, 0.0, "drawn as at first")?;
        let mut fresh = VarMap::new();
        let trained = Attention::new(&config(seed), seeded_weights(&fresh, 1, DType::F64, &Device::Cpu))?;
        assert_eq!(trained.seed()?, Some(seed));
        fresh.load(&file.0)?;
        assert_eq!(trained.seed()?, Some(u64::MAX - 6));
        assert_close(&trained.forward(&x)?, &expected, 0.0, "loaded for training")?;
    }
    // States of other features are refused, whatever the configuration says.
    let state = Scratch::new("features-state");
    let other = super::layer(&config(7))?.1;
    other.cache()?.save(&state.0)?;
    assert_refused(layer.cache()?.load(&state.0), &["another configuration", "\"seed\":7"]);
    assert_refused(super::layer(&layers()[0])?.1.redraw(1), &["Attention::redraw", "softmax"]);
    Ok(())
}

#[test]
fn models_are_stored_and_loaded() -> Result<()> {
    let tokens = Tensor::new(&[[1u32, 5, 2, 6, 3, 3]], &Device::Cpu)?;
    let mut models = Vec::new();
    for name in LanguageModelConfig::NAMES {
        let config = LanguageModelConfig::named(name, 7, WIDTH, 2, 1)?;
        let variables = VarMap::new();
        let model = LanguageModel::new(&config, seeded_weights(&variables, 1, DType::F32, &Device::Cpu))?;
        let file = Scratch::new(&format!("model-{name}"));
        variables.save(&file.0)?;
        let loaded = LanguageModel::new(&config, stored(&file, DType::F32)?)?;
        assert_close(&loaded.forward(&tokens)?, &model.forward(&tokens)?, 0.0, name)?;
        models.push((config, file));
    }
    for (config, file) in &models {
        for (other, _) in models.iter().filter(|(other, _)| other != config) {
            let result = LanguageModel::new(other, stored(file, DType::F32)?);
            assert_refused(result, &["layers.", "self_attn", config.mechanism(0).name()]);
        }
    }
    Ok(())
}
