//! Language models whose layers take turns.

use attn_kernels::nn::{
    AttentionConfig, LanguageModel, LanguageModelConfig, Mechanism, Request, RunningBatch, Sampler, SamplerConfig,
    seeded_weights,
};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use super::{Scratch, assert_close, assert_refused, enlarge};

/// Three Gated DeltaNet layers with more heads of values than of keys, to one of softmax with grouped keys, twice.
fn config() -> Result<LanguageModelConfig> {
    let delta = AttentionConfig {
        key_heads: Some(2),
        head_width: Some(4),
        ..AttentionConfig::new(16, 4, Mechanism::named("gated_deltanet")?)
    };
    let softmax = AttentionConfig {
        key_heads: Some(1),
        rotary: Some(10000.0.into()),
        ..AttentionConfig::new(16, 2, Mechanism::Softmax { window: None, soft_cap: None })
    };
    let pattern = vec![delta.clone(), delta.clone(), softmax];
    Ok(LanguageModelConfig { attention: delta, pattern, ..LanguageModelConfig::named("softmax", 11, 16, 8, 2)? })
}

fn model() -> Result<(VarMap, LanguageModel)> {
    let variables = VarMap::new();
    let model = LanguageModel::new(&config()?, seeded_weights(&variables, 1, DType::F64, &Device::Cpu))?;
    enlarge(&variables)?;
    Ok((variables, model))
}

fn tokens(count: usize) -> Result<Tensor> {
    Tensor::from_vec((0..count as u32).map(|i| i * i % 11).collect(), (1, count), &Device::Cpu)
}

#[test]
fn layers_take_turns() -> Result<()> {
    let config = config()?;
    let kinds: Vec<_> = (0..8).map(|layer| config.mechanism(layer).name()).collect();
    let delta = "gated_deltanet";
    assert_eq!(kinds, [delta, delta, delta, "softmax", delta, delta, delta, "softmax"]);
    assert_eq!((config.attention(2).heads, config.attention(3).heads), (4, 2));
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<LanguageModelConfig>(&json).unwrap(), config);
    assert!(json.contains("pattern"));
    let plain = serde_json::to_string(&LanguageModelConfig::named("softmax", 11, 16, 8, 2)?).unwrap();
    assert!(!plain.contains("pattern"));
    for layers in 1..10 {
        let named = LanguageModelConfig::named("hybrid", 11, 16, layers, 2)?;
        named.check()?;
        for layer in 0..layers {
            let expected = if layer % 4 == 3 || layer + 1 == layers { "softmax" } else { delta };
            assert_eq!(named.mechanism(layer).name(), expected, "{layer} of {layers}");
        }
        assert!(named.pattern.len() < 4 || layers % 4 != 0);
    }
    Ok(())
}

#[test]
fn every_layer_has_its_cache() -> Result<()> {
    let (_, model) = model()?;
    let (tokens, mut cache) = (tokens(21)?, model.cache()?);
    let whole = model.forward(&tokens)?;
    let first = model.forward_cached(&tokens.narrow(1, 0, 13)?, &mut cache)?;
    assert_close(&first, &whole.narrow(1, 0, 13)?, 1e-11, "prompt")?;
    let bytes: Vec<_> = cache.layers().iter().map(|layer| layer.bytes()).collect();
    for step in 13..17 {
        let out = model.forward_cached(&tokens.narrow(1, step, 1)?, &mut cache)?;
        assert_close(&out, &whole.narrow(1, step, 1)?, 1e-11, "step")?;
    }
    // States of a fixed size in the delta layers, as in the others however long the sequence is.
    for (layer, bytes) in bytes.into_iter().enumerate() {
        let state = 8 * (4 * 4 * 4 + 3 * (2 * 2 * 4 + 4 * 4));
        let expected = if layer % 4 == 3 { cache.layers()[layer].bytes() } else { state };
        assert_eq!(cache.layers()[layer].bytes(), expected, "{layer}");
        assert!(layer % 4 == 3 || bytes == expected);
    }
    // Stored, and taken up by another.
    let file = Scratch::new("hybrid-cache");
    cache.save(&file.0)?;
    let mut loaded = model.cache()?;
    loaded.load(&file.0)?;
    assert_refused(loaded.truncate(16), &["Cache::truncate", "gated_deltanet", "keep a clone"]);
    assert_eq!(loaded.len(), 17);
    loaded.reorder(&[0, 0])?;
    let next = tokens.narrow(1, 17, 4)?;
    let both = model.forward_cached(&Tensor::cat(&[&next, &next], 0)?, &mut loaded)?;
    for row in 0..2 {
        assert_close(&both.narrow(0, row, 1)?, &whole.narrow(1, 17, 4)?, 1e-11, "loaded")?;
    }
    Ok(())
}

#[test]
fn weights_are_stored_and_loaded() -> Result<()> {
    let (variables, model) = model()?;
    let file = Scratch::new("hybrid");
    variables.save(&file.0)?;
    let stored = || VarBuilder::from_buffered_safetensors(std::fs::read(&file.0).unwrap(), DType::F64, &Device::Cpu);
    let loaded = LanguageModel::new(&config()?, stored()?)?;
    assert_close(&loaded.forward(&tokens(9)?)?, &model.forward(&tokens(9)?)?, 0.0, "loaded")?;
    let mut other = config()?;
    other.pattern.swap(1, 2);
    assert_refused(LanguageModel::new(&other, stored()?), &["layers.2.self_attn", "gated_deltanet", "softmax"]);
    Ok(())
}

#[test]
fn sequences_run_side_by_side() -> Result<()> {
    let (_, model) = model()?;
    let prompts = [&[1u32, 2, 3, 4, 5][..], &[6], &[7, 8]];
    let request = |prompt: &&[u32]| -> Result<Request> {
        Ok(Request { limit: Some(20), ..Request::new(prompt, Sampler::new(SamplerConfig::default())?) })
    };
    let mut batch = RunningBatch::new(&model);
    for prompt in &prompts {
        batch.add(request(prompt)?)?;
    }
    let mut written = vec![Vec::new(); 3];
    for next in batch {
        let (sequence, token) = next?;
        written[sequence].push(token);
    }
    for (prompt, written) in prompts.iter().zip(written) {
        let mut cache = model.cache()?;
        let alone = model.generate(prompt, Sampler::new(SamplerConfig::default())?, &mut cache)?;
        assert_eq!(alone.take(20).collect::<Result<Vec<_>>>()?, written);
    }
    Ok(())
}

#[test]
fn patterns_that_no_model_has() -> Result<()> {
    let check = |change: &dyn Fn(&mut LanguageModelConfig)| {
        let mut config = config()?;
        change(&mut config);
        config.check()
    };
    check(&|_| {})?;
    assert_refused(check(&|config| config.pattern[1].width = 8), &["`pattern`", "width 8", "width 16"]);
    assert_refused(check(&|config| config.layers = 3), &["`pattern`", "4 layers", "at most 3"]);
    assert_refused(check(&|config| config.second_half = Some(Mechanism::default())), &["`second_half`", "`pattern`"]);
    assert_refused(check(&|config| config.pattern[2].heads = 3), &["`heads` is 3"]);
    // A rotary embedding in a layer that has no positions is not left out in silence.
    let mut second = LanguageModelConfig::named("softmax", 11, 16, 4, 2)?;
    second.second_half = Some(Mechanism::named("kda")?);
    assert_refused(second.check(), &["`rotary`", "kda"]);
    Ok(())
}
