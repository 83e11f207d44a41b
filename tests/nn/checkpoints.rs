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
    let configs = Mechanism::NAMES.map(|name| AttentionConfig::new(WIDTH, 1, Mechanism::named(name).unwrap()));
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
    let ends = ["o_proj", "out_proj", "output_linear.0", "out2"].map(|name| format!(".{name}.weight"));
    let out = missing.keys().find(|name| ends.iter().any(|end| name.ends_with(end)));
    let out = out.unwrap().clone();
    missing.remove(&out);
    assert_refused(Attention::new(config, foreign(missing)), &[&out]);
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

/// Weights of a checkpoint, without those for which `keep` says no.
fn tensors_of(variables: &VarMap) -> HashMap<String, Tensor> {
    let data = variables.data().lock().unwrap();
    data.iter().map(|(name, variable)| (name.clone(), variable.as_detached_tensor())).collect()
}

/// What other libraries keep beside the weights of the same names: a layer that leaves it out is another.
#[test]
fn siblings_that_would_not_be_used_are_named() -> Result<()> {
    let number = Tensor::zeros(WIDTH, DType::F64, &Device::Cpu)?;
    let build = |config: &AttentionConfig, extra: &[&str], foreign: bool| {
        let mut tensors = tensors_of(&layer(config)?.0);
        tensors.extend(extra.iter().map(|name| (name.to_string(), number.clone())));
        let weights = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
        Attention::new(config, if foreign { foreign_weights(weights) } else { weights }).map(|_| ())
    };
    let heads = AttentionConfig::new(WIDTH, 2, Mechanism::default());
    let gau = AttentionConfig::new(WIDTH, 1, Mechanism::named("gau")?);
    let [delta, gated, mamba] = ["deltanet", "gated_deltanet", "mamba2"]
        .map(|name| AttentionConfig::new(WIDTH, 2, Mechanism::named(name).unwrap()));
    for foreign in [false, true] {
        for (config, extra) in [
            (&heads, &["q_proj.bias"][..]),
            (&heads, &["q_proj.bias", "k_proj.bias", "v_proj.bias"]),
            (&heads, &["o_proj.bias"]),
            (&heads, &["q_norm.weight", "k_norm.weight"]),
            (&heads, &["g_proj.weight"]),
            (&heads, &["sinks"]),
            (&gau, &["z_proj.bias"]),
            (&gau, &["q_proj.weight"]),
            (&heads, &["A_log"]),
            (&heads, &["in_proj_qkv.weight"]),
            (&delta, &["g_proj.weight"]),
            (&delta, &["A_log", "dt_bias"]),
            (&delta, &["q_conv1d.bias"]),
            (&mamba, &["q_proj.weight"]),
            (&gated, &["in_proj_qkvz.weight"]),
            (&gated, &["conv1d.bias"]),
        ] {
            let names: Vec<_> = extra.iter().map(|name| format!("`{name}`")).collect();
            let words: Vec<_> = names.iter().map(String::as_str).chain(["would not be used"]).collect();
            assert_refused(build(config, extra, foreign), &words);
        }
        // What is derived or of no known meaning passes.
        build(&heads, &["rotary_emb.inv_freq", "some.thing"], foreign)?;
    }
    // Sources that have every tensor that is asked for.
    Attention::new(&heads, VarBuilder::zeros(DType::F64, &Device::Cpu))?;
    Ok(())
}

/// Biases of queries, keys and values without one of the output, as in Qwen2.
#[test]
fn biases_by_projection() -> Result<()> {
    let x = random("x", &[1, 7, WIDTH])?;
    for (mechanism, heads, unbiased) in
        [("softmax", 2, "o_proj"), ("retention", 2, "g_proj"), ("linear", 2, "k_proj"), ("flash", 1, "u_proj")]
    {
        let all = AttentionConfig { bias: true, ..AttentionConfig::new(WIDTH, heads, Mechanism::named(mechanism)?) };
        let config = AttentionConfig { unbiased: vec![unbiased.into()], ..all.clone() };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<AttentionConfig>(&json).unwrap(), config);
        let (variables, with_all) = layer(&all)?;
        let name = format!("{unbiased}.bias");
        assert_refused(
            Attention::new(&config, VarBuilder::from_tensors(tensors_of(&variables), DType::F64, &Device::Cpu)),
            &[&name, "`unbiased`"],
        );
        let mut tensors = tensors_of(&variables);
        tensors.remove(&name);
        let some = Attention::new(&config, VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu))?.forward(&x)?;
        assert!(super::distance(&some, &with_all.forward(&x)?)? > 1e-3, "{mechanism}: {name} does not matter");
        // The same as a bias of zeros.
        let bias = variables.data().lock().unwrap()[&name].clone();
        bias.set(&bias.zeros_like()?)?;
        assert_close(&some, &with_all.forward(&x)?, 1e-13, mechanism)?;
    }
    let bad = |bias, names: &[&str]| {
        let unbiased = names.iter().map(|name| name.to_string()).collect();
        AttentionConfig { bias, unbiased, ..AttentionConfig::new(WIDTH, 2, Mechanism::default()) }.check()
    };
    assert_refused(bad(false, &["o_proj"]), &["`unbiased` is `o_proj`", "`bias`"]);
    assert_refused(bad(true, &["o_proj", "g_proj"]), &["`unbiased` is `g_proj`", "q_proj, k_proj, v_proj, o_proj"]);
    Ok(())
}

#[test]
fn parts_of_models_that_would_not_be_used_are_named() -> Result<()> {
    let build = |config: &LanguageModelConfig, extra: &[(&str, &[usize])]| {
        let variables = VarMap::new();
        LanguageModel::new(config, seeded_weights(&variables, 1, DType::F32, &Device::Cpu))?;
        let mut tensors = tensors_of(&variables);
        for (name, dims) in extra {
            tensors.insert(name.to_string(), Tensor::ones(*dims, DType::F32, &Device::Cpu)?);
        }
        LanguageModel::new(config, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).map(|_| ())
    };
    let config = LanguageModelConfig::named("softmax", 7, WIDTH, 2, 2)?;
    for name in [
        "layers.2.input_layernorm.weight",
        "layers.1.post_feedforward_layernorm.weight",
        "layers.0.mlp.up_proj.bias",
        "layers.0.input_layernorm.bias",
        "norm.bias",
        "lm_head.bias",
        "layers.0.self_attn.q_norm.weight",
    ] {
        assert_refused(build(&config, &[(name, &[WIDTH])]), &[&format!("`{name}`"), "would not be used"]);
    }
    let gau = LanguageModelConfig::named("gau", 7, WIDTH, 2, 1)?;
    assert_refused(build(&gau, &[("layers.0.mlp.up_proj.weight", &[8, 8])]), &["`layers.0.mlp.up_proj.weight`"]);
    // A head of its own beside `tied`; the embedding twice is as good as once.
    let tied = LanguageModelConfig { tied: true, ..config };
    build(&tied, &[])?;
    build(&tied, &[("lm_head.weight", &[7, WIDTH]), ("embed_tokens.weight", &[7, WIDTH])])?;
    assert_refused(build(&tied, &[("lm_head.weight", &[7, WIDTH])]), &["`lm_head.weight`", "`tied`"]);
    Ok(())
}
