use attn_kernels::nn::{
    Activation, AttentionConfig, FeedForwardConfig, LanguageModelConfig, Mechanism, NormConfig, NormKind, QueryKeyNorm,
    RotaryConfig, SamplerConfig,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{layers, scalings};

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
    let json = serde_json::to_string(value).unwrap();
    assert_eq!(&serde_json::from_str::<T>(&json).unwrap(), value, "{json}");
    // One field too many, at the top.
    let wrong = json.replacen('{', r#"{"colour":"red","#, 1);
    let error = serde_json::from_str::<T>(&wrong).unwrap_err().to_string();
    assert!(error.contains("colour"), "{error}");
}

#[test]
fn round_trips() {
    for config in layers() {
        round_trip(&config);
        round_trip(&config.mechanism);
    }
    for name in LanguageModelConfig::NAMES {
        round_trip(&LanguageModelConfig::named(name, 256, 48, 4, 4).unwrap());
    }
    round_trip(&FeedForwardConfig { hidden: 3, gated: true, activation: Activation::GeluTanh, bias: true });
    round_trip(&NormConfig { kind: NormKind::Layer, epsilon: 1e-5, unit_offset: true });
    round_trip(&QueryKeyNorm { norm: NormConfig::default(), joint: true });
    for scaling in scalings() {
        round_trip(&scaling);
        round_trip(&RotaryConfig { width: Some(4), interleaved: true, scaling: Some(scaling), ..10000.0.into() });
    }
    round_trip(&SamplerConfig {
        temperature: 0.7,
        top_k: Some(5),
        top_p: Some(0.9),
        min_p: Some(0.05),
        repetition_penalty: 1.1,
        seed: u64::MAX,
    });
}

#[test]
fn every_name_has_defaults() {
    for name in Mechanism::NAMES {
        let mechanism = Mechanism::named(name).unwrap();
        assert_eq!(mechanism.name(), name);
        // What JSON leaves out is the same as what `named` gives.
        let json = format!(r#"{{"width":64,"heads":1,"mechanism":{{"kind":"{name}"}}}}"#);
        assert_eq!(serde_json::from_str::<AttentionConfig>(&json).unwrap(), AttentionConfig::new(64, 1, mechanism));
    }
    let json = r#"{"width":64,"heads":2}"#;
    let config = AttentionConfig::new(64, 2, Mechanism::default());
    assert_eq!(serde_json::from_str::<AttentionConfig>(json).unwrap(), config);
    assert_eq!(serde_json::from_str::<SamplerConfig>("{}").unwrap(), SamplerConfig::default());
}

#[test]
fn unknown_fields_are_named() {
    let cases = [
        (r#"{"width":64,"heads":2,"windows":3}"#, "windows"),
        (r#"{"width":64,"heads":2,"mechanism":{"kind":"softmax","windo":3}}"#, "windo"),
        (r#"{"width":64,"heads":2,"mechanism":{"kind":"linear","window":3}}"#, "window"),
        (r#"{"width":64,"heads":2,"mechanism":{"kind":"sigmoid"}}"#, "sigmoid"),
        (r#"{"width":64,"heads":2,"mechanism":{"kind":"linear","map":"cube"}}"#, "cube"),
        (r#"{"width":64,"heads":2,"mechanism":{"kind":"diag","weight":{"relu":{"eps":1}}}}"#, "eps"),
        (r#"{"width":64,"heads":2,"rotary":{"base":1e4,"factor":2.0}}"#, "factor"),
        (r#"{"width":64,"heads":2,"rotary":{"interleaved":true}}"#, "base"),
        (r#"{"width":64,"heads":2,"rotary":{"base":1e4,"scaling":{"kind":"linear","factor":2.0,"low":1}}}"#, "low"),
        (r#"{"width":64,"heads":2,"rotary":{"base":1e4,"scaling":{"kind":"dynamic"}}}"#, "dynamic"),
        (r#"{"width":64,"heads":2,"query_key_norm":{"kind":"rms"}}"#, "kind"),
        (r#"{"heads":2}"#, "width"),
    ];
    for (json, word) in cases {
        let error = serde_json::from_str::<AttentionConfig>(json).unwrap_err().to_string();
        assert!(error.contains(&format!("`{word}`")), "{error}");
    }
}

/// Configurations of before: a base is a number, also in what is written.
#[test]
fn a_base_is_a_rotary_embedding() {
    let with = |rotary: &str| serde_json::from_str::<AttentionConfig>(&format!(r#"{{"width":64,"heads":2,{rotary}}}"#));
    let plain = AttentionConfig::new(64, 2, Mechanism::default());
    let rotated = AttentionConfig { rotary: Some(10000.0.into()), ..plain.clone() };
    for rotary in [r#""rotary":10000.0"#, r#""rotary":10000"#, r#""rotary":1e4"#, r#""rotary":{"base":10000.0}"#] {
        assert_eq!(with(rotary).unwrap(), rotated, "{rotary}");
    }
    assert_eq!(with(r#""rotary":null"#).unwrap(), plain);
    // Nothing of what is not chosen is written, so that older caches load.
    let json = r#"{"width":64,"heads":2,"key_heads":null,"head_width":null,"causal":true,"bias":false,"rotary":10000.0,"mechanism":{"kind":"softmax","window":null,"soft_cap":null}}"#;
    assert_eq!(serde_json::to_string(&rotated).unwrap(), json);
    for rotary in [r#""rotary":-1"#, r#""rotary":"1e4""#, r#""rotary":[10000.0]"#, r#""rotary":true"#] {
        let error = with(rotary).unwrap_err().to_string();
        assert!(error.contains("the base of a rotary embedding"), "{rotary}: {error}");
    }
}

/// The fields that the guide shows are fields of configurations that layers take.
#[test]
fn fields_of_the_guide() {
    let guide = include_str!("../../docs/guide.md");
    let fields: Vec<_> = guide.lines().filter_map(|line| line.strip_prefix("| `\"")?.split('`').next()).collect();
    for fields in &fields {
        let json = format!(r#"{{"width":512,"heads":2,"head_width":256,"{fields}}}"#);
        let config = serde_json::from_str::<AttentionConfig>(&json).unwrap_or_else(|error| panic!("{fields}: {error}"));
        config.check().unwrap();
        assert_ne!(
            config,
            AttentionConfig { head_width: Some(256), ..AttentionConfig::new(512, 2, Mechanism::default()) }
        );
    }
    assert!(fields.len() >= 8, "{fields:?}");
}
