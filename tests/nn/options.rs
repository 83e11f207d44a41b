//! Choices of published decoders: what is refused, names of weights, rotation of features by any configuration.

use std::collections::HashMap;

use attn_kernels::candle::{
    rotary_linear_attention, rotary_linear_attention_with_state, rotary_norm_attention, rotary_performer_attention,
};
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::nn::{
    Attention, AttentionConfig, Mechanism, NormConfig, NormKind, QueryKeyNorm, Rotary, RotaryConfig, RotaryScaling,
    foreign_weights, seeded_weights,
};
use attn_kernels::performer::{FavorMap, PerformerOptions};
use attn_kernels::transnormer::{NormOptions, NormScope};
use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;

use super::positions::rotated_rows;
use super::{WIDTH, assert_close, assert_refused, layer, random, scalings};

fn heads(mechanism: &str) -> AttentionConfig {
    AttentionConfig::new(WIDTH, 2, Mechanism::named(mechanism).unwrap())
}

fn rms(joint: bool) -> Option<QueryKeyNorm> {
    Some(QueryKeyNorm { joint, ..Default::default() })
}

/// YaRN with these in the place of what is usual.
fn yarn(beta_fast: f64, attention_factor: Option<f64>, mscale: [Option<f64>; 2]) -> RotaryScaling {
    let [mscale, mscale_all_dim] = mscale;
    RotaryScaling::Yarn {
        factor: 4.0,
        original_length: 32,
        beta_fast,
        beta_slow: 1.0,
        attention_factor,
        mscale,
        mscale_all_dim,
        truncate: true,
    }
}

#[test]
fn what_a_layer_cannot_have_is_refused() {
    let refused = |config: AttentionConfig, words: &[&str]| {
        let words: Vec<_> = ["AttentionConfig"].into_iter().chain(words.iter().copied()).collect();
        assert_refused(config.check(), &words);
    };
    for name in Mechanism::NAMES.into_iter().filter(|name| *name != "softmax") {
        let heads = if heads(name).check().is_ok() { heads(name) } else { AttentionConfig { heads: 1, ..heads(name) } };
        heads.check().unwrap();
        refused(AttentionConfig { scale: Some(1.0), ..heads.clone() }, &["`scale`", &format!("none for {name}")]);
        refused(AttentionConfig { sinks: true, ..heads.clone() }, &["`sinks`", &format!("none for {name}")]);
        refused(
            AttentionConfig { output_gate: true, ..heads.clone() },
            &["`output_gate`", &format!("none for {name}")],
        );
        let config = AttentionConfig { query_key_norm: rms(false), ..heads };
        match name {
            "linear" | "performer" | "norm" | "diag" | "retention" => config.check().unwrap(),
            _ => refused(config, &["`query_key_norm`", &format!("none for {name}")]),
        }
    }
    for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(AttentionConfig { scale: Some(scale), ..heads("softmax") }, &[&format!("`scale` is {scale}")]);
    }
    let norm = NormConfig { epsilon: 0.0, ..Default::default() };
    let query_key_norm = Some(QueryKeyNorm { norm, joint: false });
    refused(AttentionConfig { query_key_norm, ..heads("softmax") }, &["`epsilon` is 0"]);
    // A factor of features would not be in the divisor.
    let with = |name: &str, scaling| {
        let rotary = Some(RotaryConfig { scaling: Some(scaling), ..100.0.into() });
        AttentionConfig { rotary, ..AttentionConfig { heads: if name == "gau" { 1 } else { 2 }, ..heads(name) } }
    };
    for name in ["linear", "performer", "norm", "retention", "gau"] {
        refused(with(name, yarn(32.0, None, [None; 2])), &["`attention_factor` is 1.138", &format!("1 for {name}")]);
        with(name, yarn(32.0, Some(1.0), [None; 2])).check().unwrap();
    }
    for name in ["softmax", "diag"] {
        with(name, yarn(32.0, None, [None; 2])).check().unwrap();
    }
}

#[test]
fn rotations_that_are_none_are_refused() -> Result<()> {
    let refused = |config: RotaryConfig, words: &str| {
        assert_refused(Rotary::new(WIDTH, config), &["Rotary::new", words]);
        let config = AttentionConfig { head_width: Some(WIDTH), rotary: Some(config), ..heads("softmax") };
        assert_refused(
            Attention::new(&config, VarBuilder::zeros(DType::F32, &Device::Cpu)),
            &["AttentionConfig", words],
        );
    };
    for width in [0, 3, WIDTH + 2] {
        refused(RotaryConfig { width: Some(width), ..100.0.into() }, &format!("`rotary.width` is {width}"));
    }
    let scaled = |scaling| RotaryConfig { scaling: Some(scaling), ..100.0.into() };
    for factor in [0.0, -2.0, f64::NAN, f64::INFINITY] {
        refused(scaled(RotaryScaling::Linear { factor }), &format!("`factor` is {factor}"));
    }
    let llama3 = |low_frequency_factor, high_frequency_factor, original_length| {
        scaled(RotaryScaling::Llama3 { factor: 8.0, low_frequency_factor, high_frequency_factor, original_length })
    };
    refused(llama3(0.0, 4.0, 8192), "`low_frequency_factor` is 0");
    refused(llama3(4.0, 4.0, 8192), "`high_frequency_factor` is 4");
    refused(llama3(1.0, 4.0, 0), "`original_length` is 0");
    refused(scaled(yarn(1.0, None, [None; 2])), "`beta_fast` is 1");
    refused(scaled(yarn(f64::NAN, None, [None; 2])), "`beta_fast` is NaN");
    refused(scaled(yarn(32.0, Some(0.0), [None; 2])), "`attention_factor` is 0");
    refused(scaled(yarn(32.0, None, [Some(1.0), None])), "`mscale` is Some(1.0)");
    refused(scaled(yarn(32.0, None, [None, Some(1.0)])), "`mscale` is None");
    refused(scaled(yarn(32.0, Some(1.0), [Some(1.0); 2])), "`mscale` is Some(1.0)");
    refused(scaled(yarn(32.0, None, [Some(1.0), Some(0.0)])), "`mscale_all_dim` is 0");
    // An odd width of which an even part is rotated.
    Rotary::new(WIDTH + 1, RotaryConfig { width: Some(4), ..100.0.into() }).map(|_| ())
}

/// The names and shapes of published models.
#[test]
fn weights_have_their_published_names() -> Result<()> {
    let names = |config: AttentionConfig| -> Result<Vec<String>> {
        let (variables, _) = layer(&config)?;
        let data = variables.data().lock().unwrap();
        let weights = data.iter().filter(|(name, _)| !name.contains("mechanism.") && !name.ends_with("_proj.weight"));
        let mut names: Vec<_> = weights.map(|(name, weight)| format!("{name} {:?}", weight.dims())).collect();
        let q = &data["q_proj.weight"];
        names.push(format!("q_proj.weight {:?}", q.dims()));
        names.sort();
        Ok(names)
    };
    let grouped = AttentionConfig {
        key_heads: Some(2),
        head_width: Some(6),
        ..AttentionConfig::new(WIDTH, 4, Mechanism::default())
    };
    let qwen3 = AttentionConfig { query_key_norm: rms(false), ..grouped.clone() };
    assert_eq!(names(qwen3)?, ["k_norm.weight [6]", "q_norm.weight [6]", "q_proj.weight [24, 8]"]);
    let olmo2 = AttentionConfig { query_key_norm: rms(true), ..grouped.clone() };
    assert_eq!(names(olmo2)?, ["k_norm.weight [12]", "q_norm.weight [24]", "q_proj.weight [24, 8]"]);
    let qwen3_next = AttentionConfig { query_key_norm: rms(false), output_gate: true, ..grouped.clone() };
    assert_eq!(names(qwen3_next)?, ["k_norm.weight [6]", "q_norm.weight [6]", "q_proj.weight [48, 8]"]);
    let gpt_oss = AttentionConfig { sinks: true, ..grouped.clone() };
    assert_eq!(names(gpt_oss)?, ["q_proj.weight [24, 8]", "sinks [4]"]);
    let norm = NormConfig { kind: NormKind::Layer, ..Default::default() };
    let layer_norms = AttentionConfig { query_key_norm: Some(QueryKeyNorm { norm, joint: true }), ..grouped };
    let expected =
        ["k_norm.bias [12]", "k_norm.weight [12]", "q_norm.bias [24]", "q_norm.weight [24]", "q_proj.weight [24, 8]"];
    assert_eq!(names(layer_norms)?, expected);
    Ok(())
}

/// What a configuration uses passes, what it leaves out is still refused.
#[test]
fn siblings_of_used_weights() -> Result<()> {
    let build = |config: &AttentionConfig, extra: &[&str]| {
        let (variables, _) = layer(config)?;
        let data = variables.data().lock().unwrap();
        let tensors = data.iter().map(|(name, variable)| (name.clone(), variable.as_detached_tensor()));
        let number = Tensor::zeros(WIDTH, DType::F64, &Device::Cpu)?;
        let extra = extra.iter().map(|name| (name.to_string(), number.clone()));
        let tensors: HashMap<String, Tensor> = tensors.chain(extra).collect();
        Attention::new(config, foreign_weights(VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu)))
    };
    let normed = AttentionConfig { query_key_norm: rms(false), ..heads("softmax") };
    let with_sinks = AttentionConfig { sinks: true, ..heads("softmax") };
    for config in [&normed, &with_sinks, &AttentionConfig { sinks: true, ..normed.clone() }] {
        build(config, &[])?;
        build(config, &["rotary_emb.inv_freq"])?;
    }
    assert_refused(build(&normed, &["sinks"]), &["`sinks`", "would not be used"]);
    assert_refused(build(&normed, &["k_norm.bias"]), &["`k_norm.bias`", "would not be used", "RMS"]);
    assert_refused(build(&with_sinks, &["q_norm.weight"]), &["`q_norm.weight`", "would not be used"]);
    assert_refused(build(&heads("softmax"), &["q_norm.bias"]), &["`q_norm.bias`", "would not be used"]);
    // Norms of one head for a layer that normalises all together.
    let (variables, _) = layer(&normed)?;
    let joint = AttentionConfig { query_key_norm: rms(true), ..heads("softmax") };
    assert_refused(Attention::new(&joint, seeded_weights(&variables, 0, DType::F64, &Device::Cpu)), &["q_norm.weight"]);
    Ok(())
}

/// The ways to rotate features of width 4 or more that have no factor.
fn rotations() -> Vec<RotaryConfig> {
    let [linear, llama3, _] = scalings();
    vec![
        RotaryConfig { interleaved: true, ..100.0.into() },
        RotaryConfig { width: Some(2), ..100.0.into() },
        RotaryConfig { width: Some(4), interleaved: true, scaling: Some(llama3), ..100.0.into() },
        RotaryConfig { scaling: Some(linear), ..100.0.into() },
        RotaryConfig { scaling: Some(yarn(2.0, Some(1.0), [None; 2])), ..100.0.into() },
    ]
}

/// Σ_j ⟨R_i φ_i, R_j φ_j⟩ v_j over j ≤ i, and the sums of ⟨φ_i, φ_j⟩.
fn sums(q: &Tensor, k: &Tensor, v: &Tensor, rotary: &RotaryConfig) -> Result<(Tensor, Tensor)> {
    let rows = q.dim(2)?;
    let seen = Tensor::tril2(rows, DType::F64, &Device::Cpu)?;
    let products = |q: &Tensor, k: &Tensor| q.contiguous()?.matmul(&k.t()?.contiguous()?)?.broadcast_mul(&seen);
    // Rotations are linear: R_j of the columns of the identity, so that gradients reach q and k.
    let unit = Tensor::eye(q.dim(3)?, DType::F64, &Device::Cpu)?;
    let turned = |x: &Tensor| -> Result<Tensor> {
        let turn = |at: usize| -> Result<Tensor> {
            let columns = unit.unsqueeze(1)?;
            let turn = rotated_rows(&columns, rotary, at as f64, 1.0)?.squeeze(1)?;
            x.narrow(2, at, 1)?.broadcast_matmul(&turn)
        };
        Tensor::cat(&(0..rows).map(turn).collect::<Result<Vec<_>>>()?, 2)
    };
    Ok((products(&turned(q)?, &turned(k)?)?.matmul(v)?, products(q, k)?.sum_keepdim(D::Minus1)?))
}

/// Outputs and gradients of features that are rotated by any configuration are those of the formula.
#[test]
fn features_rotate_in_every_way() -> Result<()> {
    let [q, k, v] = ["q", "k", "v"].map(|name| Var::from_tensor(&random(name, &[2, 2, 7, 6]).unwrap()).unwrap());
    let omega = random("omega", &[4, 6])?;
    let elu = |x: &Tensor| -> Result<Tensor> { x.elu(1.0)? + 1.0 };
    let positive = |x: &Tensor| -> Result<Tensor> {
        let exponents = (x.broadcast_matmul(&omega.t()?)? / 6f64.powf(0.25))?;
        exponents.broadcast_sub(&(x.sqr()?.sum_keepdim(D::Minus1)? / (2.0 * 6f64.sqrt()))?)?.exp()
    };
    let d_out = random("d_out", &[2, 2, 7, 6])?;
    let same = |ours: Tensor, theirs: Tensor, what: &str| -> Result<()> {
        assert_close(&ours, &theirs, 1e-11, what)?;
        let [ours, theirs] = [ours, theirs].map(|out| (out * &d_out)?.sum_all()?.backward());
        let (ours, theirs) = (ours?, theirs?);
        for x in [&q, &k, &v] {
            assert_close(ours.get(x).unwrap(), theirs.get(x).unwrap(), 1e-10, &format!("{what}: gradient"))?;
        }
        Ok(())
    };
    for rotation in rotations() {
        let rotary = Rotary::new(6, rotation)?;
        let (numerators, divisors) = sums(&elu(&q)?, &elu(&k)?, &v, &rotation)?;
        let map = FeatureMap::EluPlusOne;
        let options = LinearOptions { map, causal: true, normalizer: Some(0.1), ..Default::default() };
        let out = rotary_linear_attention(&q, &k, &v, &rotary, &options)?;
        same(out, numerators.broadcast_div(&(divisors + 0.1)?)?, &format!("linear, {rotation:?}"))?;
        let options = NormOptions {
            map,
            causal: true,
            epsilon: 0.1,
            norm: NormScope::Head,
            log_decay: None,
            key_mask: None,
            sequences: None,
        };
        let root = (numerators.sqr()?.mean_keepdim(D::Minus1)? + 0.1)?.sqrt()?;
        let out = rotary_norm_attention(&q, &k, &v, &rotary, &options)?;
        same(out, numerators.broadcast_div(&root)?, &format!("norm, {rotation:?}"))?;
        // The stabiliser and 1/√m are in numerator and divisor.
        let rotary = Rotary::new(4, rotation)?;
        let (numerators, divisors) = sums(&positive(&q)?, &positive(&k)?, &v, &rotation)?;
        let options =
            PerformerOptions { map: FavorMap::Positive, causal: true, epsilon: 0.0, key_mask: None, sequences: None };
        let out = rotary_performer_attention(&q, &k, &v, &omega, &rotary, &options)?;
        same(out, numerators.broadcast_div(&divisors)?, &format!("performer, {rotation:?}"))?;
    }
    Ok(())
}

/// The factor of YaRN is refused behind φ, and scales products where φ is a function of them.
#[test]
fn factors_of_features() -> Result<()> {
    let [q, k, v] = ["q", "k", "v"].map(|name| random(name, &[1, 2, 7, 6]).unwrap());
    let config = RotaryConfig { scaling: Some(yarn(2.0, Some(1.5), [None; 2])), ..100.0.into() };
    let rotary = Rotary::new(6, config)?;
    let options = |map| LinearOptions { map, causal: true, normalizer: Some(0.1), ..Default::default() };
    let words = ["rotary_linear_attention", "`rotary`", "factor of 1.5", "behind a feature map"];
    let elu = options(FeatureMap::EluPlusOne);
    assert_refused(rotary_linear_attention(&q, &k, &v, &rotary, &elu), &words);
    assert_refused(rotary_linear_attention_with_state(&q, &k, &v, &rotary, &elu, None), &words);
    let out = rotary_linear_attention(&q, &k, &v, &rotary, &options(FeatureMap::Taylor))?;
    let [q, k] = [q, k].map(|x| rotated_rows(&x, &config, 0.0, 1.0));
    let plain = attn_kernels::linear_attention(&q?, &k?, &v, &options(FeatureMap::Taylor))?;
    assert_close(&out, &plain, 1e-12, "Taylor")
}
