//! What configurations, layers and caches refuse, in which words.

use attn_kernels::linear::FeatureMap;
use attn_kernels::nn::{
    Attention, AttentionConfig, FeedForward, FeedForwardConfig, LanguageModel, LanguageModelConfig, Mechanism, Norm,
    NormConfig, Rotary, Sampler, SamplerConfig, generate, seeded_weights,
};
use attn_kernels::random_features::FeatureKind;
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use super::{Scratch, WIDTH, assert_refused, layer, layers, random};

fn fresh<'a>() -> VarBuilder<'a> {
    seeded_weights(&VarMap::new(), 0, DType::F64, &Device::Cpu)
}

#[test]
fn configurations() -> Result<()> {
    let base = || AttentionConfig::new(WIDTH, 2, Mechanism::default());
    let with = |mechanism| AttentionConfig { mechanism, ..base() };
    let unit = |name: &str| AttentionConfig::new(WIDTH, 1, Mechanism::named(name).unwrap());
    let performer = |features, directions| Mechanism::Performer {
        features,
        directions,
        seed: 0,
        map: Default::default(),
        epsilon: 1e-6,
    };
    let retention = |decay: &[f64]| Mechanism::Retention { log_decay: Some(decay.to_vec()), gate: true, epsilon: 1e-6 };
    let gau =
        |key_width, expansion| Mechanism::Gau { key_width, expansion, norm: Default::default(), bias_reach: None };
    let cases = [
        (AttentionConfig { width: 0, ..base() }, "`width` is 0"),
        (AttentionConfig { width: 1 << 40, ..base() }, "`width` is 1099511627776"),
        (AttentionConfig { heads: 0, ..base() }, "`heads` is 0"),
        (AttentionConfig { heads: 3, ..base() }, "`heads` is 3"),
        (AttentionConfig { key_heads: Some(0), ..base() }, "`key_heads` is 0"),
        (AttentionConfig { heads: 4, key_heads: Some(3), ..base() }, "`key_heads` is 3"),
        (AttentionConfig { head_width: Some(0), ..base() }, "`head_width` is 0"),
        (AttentionConfig { head_width: Some(3), rotary: Some(1e4.into()), ..base() }, "`head_width` is 3"),
        (AttentionConfig { rotary: Some(1.0.into()), ..base() }, "`rotary.base` is 1"),
        (AttentionConfig { rotary: Some(f64::NAN.into()), ..base() }, "`rotary.base` is NaN"),
        (with(Mechanism::Softmax { window: Some(0), soft_cap: None }), "`window` is 0"),
        (with(Mechanism::Softmax { window: None, soft_cap: Some(-1.0) }), "`soft_cap` is -1"),
        (with(performer(0, FeatureKind::Iid)), "`features` is 0"),
        (with(performer(5, FeatureKind::HyperbolicPairs)), "`features` is 5"),
        (with(Mechanism::Norm { map: FeatureMap::Relu, epsilon: 0.0, scope: Default::default() }), "`epsilon` is 0"),
        (with(Mechanism::Diag { block: 0, weight: attn_kernels::DiagWeight::Softmax }), "`block` is 0"),
        (with(retention(&[-1.0])), "`log_decay` is 1 numbers"),
        (with(retention(&[-1.0, 0.5])), "`log_decay` is 0.5"),
        (with(retention(&[-1.0, f64::NAN])), "`log_decay` is NaN"),
        (AttentionConfig { causal: false, ..with(retention(&[-1.0, 0.0])) }, "`causal` is false"),
        (AttentionConfig { heads: 2, ..unit("gau") }, "`heads` is 2"),
        (AttentionConfig { head_width: Some(4), ..unit("flash") }, "`head_width` is 4"),
        (AttentionConfig { mechanism: gau(0, 2), ..unit("gau") }, "`key_width` is 0"),
        (AttentionConfig { mechanism: gau(3, 2), rotary: Some(1e4.into()), ..unit("gau") }, "`key_width` is 3"),
        (AttentionConfig { mechanism: gau(4, 0), ..unit("gau") }, "`expansion` is 0"),
    ];
    for (config, words) in cases {
        assert_refused(Attention::new(&config, fresh()), &["AttentionConfig", words]);
    }
    assert_refused(Mechanism::named("sigmoid"), &["`sigmoid`", "softmax, linear, performer"]);
    assert_refused(LanguageModelConfig::named("sigmoid", 256, 8, 1, 1), &["`sigmoid`"]);
    let config = LanguageModelConfig::named("softmax", 256, WIDTH, 0, 2)?;
    assert_refused(LanguageModel::new(&config, fresh()), &["LanguageModelConfig", "`layers` is 0"]);
    let config = LanguageModelConfig::named("softmax", 0, WIDTH, 1, 2)?;
    assert_refused(LanguageModel::new(&config, fresh()), &["LanguageModelConfig", "`vocabulary` is 0"]);
    assert_refused(Norm::new(WIDTH, &NormConfig { epsilon: 0.0, ..Default::default() }, fresh()), &["`epsilon` is 0"]);
    let config = FeedForwardConfig { hidden: 0, gated: false, activation: Default::default(), bias: false };
    assert_refused(FeedForward::new(WIDTH, &config, fresh()), &["FeedForward::new", "`hidden` is 0"]);
    assert_refused(Rotary::new(7, 1e4), &["Rotary::new", "`width` is 7"]);
    assert_refused(Rotary::new(8, 0.5), &["Rotary::new", "`rotary.base` is 0.5"]);
    Ok(())
}

#[test]
fn inputs() -> Result<()> {
    for config in layers() {
        let (_, layer) = layer(&config)?;
        let mut cache = layer.cache()?;
        assert_refused(
            layer.forward(&random("x", &[2, WIDTH])?),
            &["Attention::forward", "`x`", "[2, 8]", "[batch, rows, 8]"],
        );
        assert_refused(layer.forward(&random("x", &[2, 3, 7])?), &["`x`", "[2, 3, 7]"]);
        let narrow = random("x", &[2, 3, WIDTH])?.to_dtype(DType::F32)?;
        assert_refused(layer.forward(&narrow), &["`x`", "f32", "f64"]);
        let x = random("x", &[2, 3, WIDTH])?;
        for mask in [Tensor::ones((2, 4), DType::U8, &Device::Cpu)?, Tensor::ones((2, 3), DType::F32, &Device::Cpu)?] {
            assert_refused(layer.forward_masked(&x, Some(&mask)), &["key_mask"]);
        }
        layer.forward_cached(&x, &mut cache)?;
        let one = random("x", &[1, 3, WIDTH])?;
        assert_refused(layer.forward_cached(&one, &mut cache), &["forward_cached", "batch of 1", "2, as in the cache"]);
        // Nothing has changed.
        assert_eq!(cache.len(), 3);
        assert_eq!(layer.forward_cached(&x, &mut cache)?.dims(), x.dims());
    }
    Ok(())
}

#[test]
fn caches_of_other_layers() -> Result<()> {
    let x = random("x", &[1, 2, WIDTH])?;
    for (index, config) in layers().into_iter().enumerate() {
        let (_, layer) = layer(&config)?;
        let file = Scratch::new(&format!("other-{index}"));
        let mut cache = layer.cache()?;
        layer.forward_cached(&x, &mut cache)?;
        cache.save(&file.0)?;
        for other in layers().into_iter().filter(|other| *other != config) {
            let (_, other) = super::layer(&other)?;
            let kind = config.mechanism.name();
            assert_refused(other.forward_cached(&x, &mut cache.clone()), &["`cache`", kind, "one of this layer"]);
            let mut theirs = other.cache()?;
            assert_refused(theirs.load(&file.0), &["other-", "another configuration", kind]);
            assert!(theirs.is_empty());
        }
        let narrow = Attention::new(&config, seeded_weights(&VarMap::new(), 0, DType::F32, &Device::Cpu))?;
        assert_refused(narrow.cache()?.load(&file.0), &["another configuration", "f32", "f64"]);
        let full = AttentionConfig { causal: false, ..config };
        if full.check().is_ok() {
            assert_refused(super::layer(&full)?.1.cache(), &["Attention::cache", "`causal` is false"]);
        }
    }
    Ok(())
}

#[test]
fn files_that_are_no_states() -> Result<()> {
    let (_, layer) = layer(&layers()[0])?;
    let mut cache = layer.cache()?;
    let file = Scratch::new("no-state");
    let name = file.0.display().to_string();
    assert_refused(cache.load(&file.0), &[&name, "No such file"]);
    std::fs::write(&file.0, "text").unwrap();
    assert_refused(cache.load(&file.0), &[&name]);
    random("x", &[2])?.save_safetensors("x", &file.0)?;
    assert_refused(cache.load(&file.0), &[&name, "not a file of the format"]);
    layer.forward_cached(&random("x", &[1, 9, WIDTH])?, &mut cache)?;
    cache.save(&file.0)?;
    let bytes = std::fs::read(&file.0).unwrap();
    std::fs::write(&file.0, &bytes[..bytes.len() - 9]).unwrap();
    assert_refused(cache.load(&file.0), &[&name]);
    // A header that says fewer tokens than there are keys, though the kind of layer keeps all.
    let at = bytes.windows(15).position(|window| window == br#"positions":"[9]"#).unwrap() + 13;
    let mut changed = bytes.clone();
    changed[at] = b'8';
    std::fs::write(&file.0, &changed).unwrap();
    assert_refused(cache.load(&file.0), &[&name, "9 rows", "8 tokens"]);
    assert_eq!(cache.len(), 9);
    Ok(())
}

#[test]
fn norms_that_depend_on_the_length() -> Result<()> {
    use attn_kernels::gau::{GauNorm, GlobalNorm};
    let x = random("x", &[1, 2, WIDTH])?;
    let flash = Mechanism::Flash { chunk: 4, key_width: 4, expansion: 1, global_norm: GlobalNorm::Length };
    let gau = |norm| Mechanism::Gau { key_width: 4, expansion: 1, norm, bias_reach: None };
    for (mechanism, word) in [
        (gau(GauNorm::Length), "`norm` is Length"),
        (gau(GauNorm::LengthWidth), "`norm` is LengthWidth"),
        (flash, "`global_norm` is Length"),
    ] {
        let (_, layer) = layer(&AttentionConfig::new(WIDTH, 1, mechanism))?;
        layer.forward(&x)?;
        assert_refused(layer.forward_cached(&x, &mut layer.cache()?), &["Attention::forward_cached", word]);
    }
    Ok(())
}

#[test]
fn models_and_samplers() -> Result<()> {
    let model = LanguageModel::new(&LanguageModelConfig::named("linear", 9, WIDTH, 2, 2)?, fresh())?;
    let tokens = Tensor::new(&[[1u32, 9]], &Device::Cpu)?;
    assert_refused(model.forward(&tokens), &["LanguageModel::forward", "`tokens`", "9", "below the vocabulary of 9"]);
    assert_refused(model.forward(&tokens.squeeze(0)?), &["`tokens`", "shape [2]", "[batch, tokens]"]);
    assert_refused(model.forward(&tokens.to_dtype(DType::I64)?), &["`tokens`", "i64", "u32"]);
    let other = LanguageModel::new(&LanguageModelConfig::named("linear", 9, WIDTH, 3, 2)?, fresh())?;
    assert_refused(other.forward_cached(&tokens, &mut model.cache()?), &["`cache`", "of 2 layers", "of 3 layers"]);
    let none = Tensor::zeros((1, 0), DType::U32, &Device::Cpu)?;
    assert_refused(model.next_logits(&none, &mut model.cache()?), &["`tokens`", "empty"]);
    let greedy = Sampler::new(SamplerConfig::default())?;
    assert_refused(model.generate(&[], greedy.clone(), &mut model.cache()?).map(|_| ()), &["`prompt`", "empty"]);
    let mut failing = generate(|_| candle_core::bail!("no power"), &[1], greedy.clone())?;
    assert_refused(failing.next().unwrap(), &["no power"]);
    assert!(failing.next().is_none());

    let with = |change: fn(&mut SamplerConfig)| {
        let mut config = SamplerConfig::default();
        change(&mut config);
        Sampler::new(config)
    };
    assert_refused(with(|config| config.temperature = -1.0), &["Sampler::new", "`temperature` is -1"]);
    assert_refused(with(|config| config.temperature = f64::INFINITY), &["`temperature` is inf"]);
    assert_refused(with(|config| config.top_k = Some(0)), &["`top_k` is 0"]);
    assert_refused(with(|config| config.top_p = Some(0.0)), &["`top_p` is 0"]);
    assert_refused(with(|config| config.top_p = Some(1.5)), &["`top_p` is 1.5"]);
    assert_refused(with(|config| config.min_p = Some(0.0)), &["`min_p` is 0"]);
    assert_refused(with(|config| config.min_p = Some(f64::NAN)), &["`min_p` is NaN"]);
    assert_refused(with(|config| config.repetition_penalty = 0.0), &["`repetition_penalty` is 0"]);
    assert_refused(with(|config| config.repetition_penalty = f64::INFINITY), &["`repetition_penalty` is inf"]);
    let logits = Tensor::new(&[f32::NAN, f32::NAN], &Device::Cpu)?;
    assert_refused(greedy.clone().sample(&logits), &["Sampler::sample", "`logits`", "number"]);
    assert_refused(greedy.clone().sample(&Tensor::zeros(0, DType::F32, &Device::Cpu)?), &["`logits`"]);
    Ok(())
}
