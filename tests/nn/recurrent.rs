//! Recurrent layers: what is theirs alone.

use attn_kernels::nn::{
    Attention, AttentionConfig, LanguageModel, LanguageModelConfig, Mechanism, Sampler, SamplerConfig, Slopes,
    seeded_weights,
};
use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::VarMap;

use super::{WIDTH, assert_close, assert_refused, distance, enlarge, layer, layers, random};

/// The chain of parts that [`Mechanism`] says, and Mamba.
const CHAINS: [&str; 7] = ["gla", "deltanet", "gated_deltanet", "kda", "mamba2", "mamba", "lightning"];

/// 256 tokens one by one are those of one pass over all of them.
#[test]
fn many_greedy_steps_equal_one_pass() -> Result<()> {
    for name in CHAINS.into_iter().chain(["rwkv7", "s4d", "lru", "hybrid"]) {
        let config = LanguageModelConfig::named(name, 50, 32, 4, 2)?;
        let variables = VarMap::new();
        let model = LanguageModel::new(&config, seeded_weights(&variables, 7, DType::F32, &Device::Cpu))?;
        let prompt = [7u32, 3, 21];
        let mut cache = model.cache()?;
        let greedy = Sampler::new(SamplerConfig::default())?;
        let written: Vec<u32> = model.generate(&prompt, greedy, &mut cache)?.take(256).collect::<Result<_>>()?;
        let all: Vec<u32> = prompt.into_iter().chain(written.iter().copied()).collect();
        let logits = model.forward(&Tensor::new(&all[..], &Device::Cpu)?.unsqueeze(0)?)?.squeeze(0)?;
        let chosen = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
        let differing = chosen[2..258].iter().zip(&written).filter(|(a, b)| a != b).count();
        assert_eq!(differing, 0, "{name}: {differing} of 256 tokens");
        assert_eq!(cache.len(), 258);
    }
    Ok(())
}

/// Short convolutions look back: a token reaches those behind it in the same layer even where the state is cut off.
#[test]
fn caches_keep_the_last_inputs_of_convolutions() -> Result<()> {
    for name in ["deltanet", "gated_deltanet", "kda", "mamba2", "mamba"] {
        let heads = if name == "mamba" { 1 } else { 2 };
        let (_, layer) = layer(&AttentionConfig::new(WIDTH, heads, Mechanism::named(name)?))?;
        let x = random("x", &[1, 9, WIDTH])?;
        let other = Tensor::cat(&[x.narrow(1, 0, 4)?, random("other", &[1, 1, WIDTH])?, x.narrow(1, 5, 4)?], 1)?;
        let after = |x: &Tensor| -> Result<Tensor> {
            let mut cache = layer.cache()?;
            // Shorter than the taps.
            for start in 0..6 {
                layer.forward_cached(&x.narrow(1, start, 1)?, &mut cache)?;
            }
            layer.forward_cached(&x.narrow(1, 6, 3)?, &mut cache)
        };
        assert!(distance(&after(&x)?, &after(&other)?)? > 1e-4, "{name}");
        assert_close(&after(&x)?, &layer.forward(&x)?.narrow(1, 6, 3)?, 1e-11, name)?;
    }
    Ok(())
}

/// Deeper layers of lightning attention forget more slowly, by either list of slopes.
#[test]
fn lightning_layers_know_their_place() -> Result<()> {
    for slopes in [Slopes::Geometric, Slopes::Linear] {
        let mut config = LanguageModelConfig::named("lightning", 11, 16, 3, 2)?;
        config.attention.mechanism = Mechanism::Lightning { slopes, place: None, epsilon: 1e-6 };
        let places: Vec<_> = (0..3)
            .map(|layer| match config.attention(layer).mechanism {
                Mechanism::Lightning { place, .. } => place,
                _ => None,
            })
            .collect();
        assert_eq!(places, [Some([0, 3]), Some([1, 3]), Some([2, 3])]);
        let x = random("x", &[1, 9, 16])?;
        let out = |layer: usize| {
            let weights = seeded_weights(&VarMap::new(), 0, DType::F64, &Device::Cpu);
            Attention::new(&config.attention(layer), weights)?.forward(&x)
        };
        assert!(distance(&out(0)?, &out(1)?)? > 1e-4, "{slopes:?}");
    }
    let given = Mechanism::Lightning { slopes: Slopes::Linear, place: Some([5, 8]), epsilon: 1e-6 };
    let config = LanguageModelConfig::named("lightning", 11, 16, 3, 2)?;
    let config =
        LanguageModelConfig { attention: AttentionConfig { mechanism: given.clone(), ..config.attention }, ..config };
    assert_eq!(config.attention(2).mechanism, given);
    Ok(())
}

#[test]
fn configurations() -> Result<()> {
    let with = |json: &str| -> Result<()> {
        let json = format!(r#"{{"width":8,"heads":2,{json}}}"#);
        let config: AttentionConfig = serde_json::from_str(&json).map_err(candle_core::Error::wrap)?;
        Attention::new(&config, seeded_weights(&VarMap::new(), 0, DType::F32, &Device::Cpu)).map(|_| ())
    };
    for name in CHAINS.into_iter().filter(|name| *name != "mamba") {
        let kind = format!(r#""mechanism":{{"kind":"{name}"}}"#);
        with(&kind)?;
        assert_refused(with(&format!(r#"{kind},"causal":false"#)), &["`causal` is false", name]);
        assert_refused(with(&format!(r#"{kind},"rotary":10000.0"#)), &["`rotary` is 10000", "no positions"]);
        let epsilon = format!(r#""mechanism":{{"kind":"{name}","epsilon":0.0}}"#);
        assert_refused(with(&epsilon), &["`epsilon` is 0"]);
        assert_refused(with(&format!(r#""mechanism":{{"kind":"{name}","window":3}}"#)), &["window"]);
        let grouped = with(&format!(r#"{kind},"key_heads":1"#));
        match name {
            "deltanet" | "kda" | "lightning" => assert_refused(grouped, &["`key_heads` is 1", "2, as `heads`", name]),
            _ => grouped?,
        }
        if !matches!(name, "kda" | "lightning") {
            let narrow = format!(r#""mechanism":{{"kind":"{name}","key_width":0}}"#);
            assert_refused(with(&narrow), &["`key_width` is 0"]);
        }
        if name != "lightning" {
            let narrow = format!(r#""mechanism":{{"kind":"{name}","convolution":0}}"#);
            assert_refused(with(&narrow), &["`convolution` is 0"]);
        }
    }
    let mamba = |json: &str| -> Result<()> {
        let json = format!(r#"{{"width":8,"heads":1,"mechanism":{{"kind":"mamba"{json}"#);
        let config: AttentionConfig = serde_json::from_str(&json).map_err(candle_core::Error::wrap)?;
        Attention::new(&config, seeded_weights(&VarMap::new(), 0, DType::F32, &Device::Cpu)).map(|_| ())
    };
    mamba("}}")?;
    assert_refused(with(r#""mechanism":{"kind":"mamba"}"#), &["`heads` is 2", "1 for mamba"]);
    assert_refused(mamba(r#"},"causal":false}"#), &["`causal` is false", "mamba"]);
    assert_refused(mamba(r#"},"rotary":10000.0}"#), &["`rotary` is 10000", "no positions"]);
    for part in ["states", "rank", "convolution"] {
        assert_refused(mamba(&format!(r#","{part}":0}}}}"#)), &[&format!("`{part}` is 0")]);
    }
    assert_refused(mamba(r#","window":3}}"#), &["window"]);
    assert_refused(with(r#""mechanism":{"kind":"gla","low_rank":0}"#), &["`low_rank` is 0"]);
    assert_refused(with(r#""mechanism":{"kind":"gla","gate_divisor":-1.0}"#), &["`gate_divisor` is -1"]);
    assert_refused(with(r#""mechanism":{"kind":"lightning","place":[3,3]}"#), &["`place` is Some([3, 3])"]);
    assert_refused(with(r#""mechanism":{"kind":"lightning","slopes":"steep"}"#), &["steep"]);
    Ok(())
}

/// The names and shapes that published checkpoints have.
#[test]
fn weights_have_their_published_names() -> Result<()> {
    let names = |name: &str, key_heads: usize| -> Result<Vec<String>> {
        let heads = if name == "mamba" { 1 } else { 4 };
        let config =
            AttentionConfig { key_heads: Some(key_heads), ..AttentionConfig::new(16, heads, Mechanism::named(name)?) };
        let variables = VarMap::new();
        Attention::new(&config, seeded_weights(&variables, 0, DType::F32, &Device::Cpu))?;
        let data = variables.data().lock().unwrap();
        let weights = data.iter().filter(|(name, _)| !name.contains("mechanism."));
        let mut names: Vec<_> = weights.map(|(name, weight)| format!("{name} {:?}", weight.dims())).collect();
        names.sort();
        Ok(names)
    };
    let gated_deltanet = [
        "A_log [4]",
        "conv1d.weight [32, 1, 4]",
        "dt_bias [4]",
        "in_proj_a.weight [4, 16]",
        "in_proj_b.weight [4, 16]",
        "in_proj_qkv.weight [32, 16]",
        "in_proj_z.weight [16, 16]",
        "norm.weight [4]",
        "out_proj.weight [16, 16]",
    ];
    assert_eq!(names("gated_deltanet", 2)?, gated_deltanet);
    let kda = [
        "A_log [1, 1, 4, 1]",
        "b_proj.weight [4, 16]",
        "dt_bias [16]",
        "f_a_proj.weight [4, 16]",
        "f_b_proj.weight [16, 4]",
        "g_a_proj.weight [4, 16]",
        "g_b_proj.weight [16, 4]",
        "k_conv1d.weight [16, 1, 4]",
        "k_proj.weight [16, 16]",
        "o_norm.weight [4]",
        "o_proj.weight [16, 16]",
        "q_conv1d.weight [16, 1, 4]",
        "q_proj.weight [16, 16]",
        "v_conv1d.weight [16, 1, 4]",
        "v_proj.weight [16, 16]",
    ];
    assert_eq!(names("kda", 4)?, kda);
    let mamba2 = [
        "A_log [4]",
        "D [4]",
        "conv1d.bias [544]",
        "conv1d.weight [544, 1, 4]",
        "dt_bias [4]",
        "in_proj.weight [580, 16]",
        "norm.weight [32]",
        "out_proj.weight [16, 32]",
    ];
    assert_eq!(names("mamba2", 2)?, mamba2);
    let mamba = [
        "A_log [32, 16]",
        "D [32]",
        "conv1d.bias [32]",
        "conv1d.weight [32, 1, 4]",
        "dt_proj.bias [32]",
        "dt_proj.weight [32, 1]",
        "in_proj.weight [64, 16]",
        "out_proj.weight [16, 32]",
        "x_proj.weight [33, 32]",
    ];
    assert_eq!(names("mamba", 1)?, mamba);
    let lightning =
        ["norm.weight [16]", "out_proj.weight [16, 16]", "output_gate.weight [16, 16]", "qkv_proj.weight [48, 16]"];
    assert_eq!(names("lightning", 4)?, lightning);
    let gla = [
        "g_norm_swish_gate.weight [4]",
        "g_proj.weight [16, 16]",
        "gk_proj.0.weight [16, 16]",
        "gk_proj.1.bias [4]",
        "gk_proj.1.weight [4, 16]",
        "k_proj.weight [4, 16]",
        "o_proj.weight [16, 16]",
        "q_proj.weight [8, 16]",
        "v_proj.weight [8, 16]",
    ];
    assert_eq!(names("gla", 2)?, gla);
    Ok(())
}

/// Weights that are read as parts of a joined one follow it when it is set anew.
#[test]
fn parts_of_joined_weights_are_trained() -> Result<()> {
    let x = random("x", &[1, 5, WIDTH])?;
    for config in layers().into_iter().filter(|config| config.mechanism.is_recurrent()) {
        let (variables, layer) = layer(&config)?;
        let before = layer.forward(&x)?;
        for (name, variable) in variables.data().lock().unwrap().iter().filter(|(name, _)| super::is_trained(name)) {
            let value = variable.as_tensor().copy()?;
            variable.set(&(value.affine(1.5, 0.25))?)?;
            assert!(distance(&layer.forward(&x)?, &before)? > 1e-6, "{config:?}: {name} is not followed");
            variable.set(&value)?;
        }
        assert_eq!(distance(&layer.forward(&x)?, &before)?, 0.0);
    }
    Ok(())
}

/// In half precision rates, steps and skips keep the dtype of sums.
#[test]
fn rates_are_in_the_dtype_of_sums() -> Result<()> {
    for name in ["gated_deltanet", "kda", "mamba2", "mamba"] {
        let variables = VarMap::new();
        let heads = if name == "mamba" { 1 } else { 2 };
        let config = AttentionConfig::new(16, heads, Mechanism::named(name)?);
        let layer = Attention::new(&config, seeded_weights(&variables, 0, DType::BF16, &Device::Cpu))?;
        enlarge(&variables)?;
        for (name, variable) in variables.data().lock().unwrap().iter().filter(|(name, _)| super::is_trained(name)) {
            let expected = if ["A_log", "dt_bias", "D"].contains(&&name[..]) { DType::F32 } else { DType::BF16 };
            assert_eq!(variable.dtype(), expected, "{name}");
        }
        let out = layer.forward(&random("x", &[1, 5, 16])?.to_dtype(DType::BF16)?)?;
        assert_eq!(out.dtype(), DType::BF16);
    }
    Ok(())
}
