//! Layers, caches, models and sampling.

mod by_hand;
mod by_hand_recurrent;
mod by_hand_states;
mod caches;
mod checkpoints;
mod configs;
mod decoding;
mod elements;
mod formulas;
mod gradients;
mod hybrid;
mod models;
mod norms;
mod options;
mod padding;
mod positions;
mod published;
mod ragged;
mod recurrent;
mod refusals;
mod rotary;
mod running;
mod sampling;
mod sequences;
mod states;

use std::path::PathBuf;

use attn_kernels::gau::{GauNorm, GlobalNorm};
use attn_kernels::linear::FeatureMap;
use attn_kernels::nn::{
    Attention, AttentionConfig, Mechanism, NormConfig, NormKind, QueryKeyNorm, RotaryConfig, RotaryScaling, Slopes,
    seeded_weights,
};
use attn_kernels::performer::FavorMap;
use attn_kernels::random_features::FeatureKind;
use attn_kernels::transnormer::{DiagWeight, NormScope};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarMap;

use crate::common::random::Random;

const WIDTH: usize = 8;

/// A layer for every mechanism and choice; blocks, chunks and windows of 5.
fn layers() -> Vec<AttentionConfig> {
    let heads = |mechanism| AttentionConfig {
        key_heads: Some(2),
        head_width: Some(4),
        rotary: Some(100.0.into()),
        ..AttentionConfig::new(WIDTH, 4, mechanism)
    };
    let unit = |mechanism| AttentionConfig { rotary: Some(100.0.into()), ..AttentionConfig::new(WIDTH, 1, mechanism) };
    let plain = |config| AttentionConfig { rotary: None, bias: true, key_heads: None, ..config };
    // With ε and exponential features the gradient is inexact by design.
    let performer = |directions, map: FavorMap| {
        let epsilon = if map.is_exponential() { 0.0 } else { 0.01 };
        Mechanism::Performer { features: 6, directions, seed: 1 << 40 | 9, map, epsilon }
    };
    let norm = |map, scope| Mechanism::Norm { map, epsilon: 0.01, scope };
    let gau = |norm, bias_reach| Mechanism::Gau { key_width: 4, expansion: 2, norm, bias_reach };
    let flash = |global_norm| Mechanism::Flash { chunk: 5, key_width: 4, expansion: 2, global_norm };
    let recurrent = |mechanism| AttentionConfig { head_width: Some(4), ..AttentionConfig::new(WIDTH, 4, mechanism) };
    let grouped = |config| AttentionConfig { key_heads: Some(2), ..config };
    let gla = |key_width, gate_divisor, convolution| Mechanism::Gla {
        key_width,
        low_rank: 3,
        gate_divisor,
        convolution,
        epsilon: 0.01,
    };
    let deltanet = |key_width, convolution, gate, negative_eigenvalues| Mechanism::Deltanet {
        key_width,
        convolution,
        gate,
        negative_eigenvalues,
        epsilon: 0.01,
    };
    let gated_deltanet = |key_width| Mechanism::GatedDeltanet { key_width, convolution: 4, epsilon: 0.01 };
    let mamba2 = |convolution_bias| Mechanism::Mamba2 { key_width: 6, convolution: 4, convolution_bias, epsilon: 0.01 };
    let lightning = |slopes, place| Mechanism::Lightning { slopes, place, epsilon: 0.01 };
    let mamba = |states, rank, convolution_bias| {
        let mechanism = Mechanism::Mamba { states, rank, convolution: 4, convolution_bias };
        AttentionConfig::new(WIDTH, 1, mechanism)
    };
    let rwkv7 = |ranks, place| Mechanism::Rwkv7 { ranks, place, epsilon: 0.01 };
    let alone = |mechanism| AttentionConfig::new(WIDTH, 1, mechanism);
    let lru = |states, radii, phase| Mechanism::Lru { states, radii, phase };
    let norms =
        |kind, unit_offset, joint| Some(QueryKeyNorm { norm: NormConfig { kind, epsilon: 0.1, unit_offset }, joint });
    let linear = Mechanism::Linear { map: FeatureMap::EluPlusOne, normalized: true };
    let window = Mechanism::Softmax { window: Some(5), soft_cap: Some(2.0) };
    let diag = Mechanism::Diag { block: 5, weight: DiagWeight::Softmax };
    let retention = Mechanism::Retention { log_decay: None, gate: true, epsilon: 0.01 };
    let turned = |scaling| Some(RotaryConfig { scaling: Some(scaling), ..100.0.into() });
    let interleaved = Some(RotaryConfig { interleaved: true, ..100.0.into() });
    let partial = Some(RotaryConfig { width: Some(2), ..100.0.into() });
    let [stretched, llama3, yarn] = scalings();
    vec![
        heads(Mechanism::default()),
        plain(heads(Mechanism::Softmax { window: Some(5), soft_cap: Some(2.0) })),
        heads(Mechanism::Linear { map: FeatureMap::EluPlusOne, normalized: true }),
        plain(heads(Mechanism::Linear { map: FeatureMap::Silu, normalized: false })),
        heads(performer(FeatureKind::Orthogonal, FavorMap::Positive)),
        plain(heads(performer(FeatureKind::HyperbolicPairs, FavorMap::Hyperbolic))),
        heads(performer(FeatureKind::Iid, FavorMap::Relu)),
        heads(norm(FeatureMap::EluPlusOne, NormScope::Head)),
        plain(heads(norm(FeatureMap::Exp, NormScope::AllHeads))),
        heads(Mechanism::Diag { block: 5, weight: DiagWeight::Softmax }),
        plain(heads(Mechanism::Diag { block: 5, weight: DiagWeight::Relu { epsilon: 0.01 } })),
        heads(Mechanism::Retention { log_decay: None, gate: true, epsilon: 0.01 }),
        plain(heads(Mechanism::Retention {
            log_decay: Some(vec![-0.5, 0.0, -0.01, -2.0]),
            gate: false,
            epsilon: 0.01,
        })),
        unit(gau(GauNorm::RowSum { epsilon: 1e-3 }, Some(3))),
        plain(unit(gau(GauNorm::Fixed { length: 2.0 }, None))),
        unit(flash(GlobalNorm::Mean)),
        plain(unit(flash(GlobalNorm::Chunk))),
        grouped(recurrent(gla(Some(3), 4.0, None))),
        plain(recurrent(gla(None, 2.0, Some(3)))),
        recurrent(deltanet(None, 4, false, true)),
        plain(recurrent(deltanet(Some(3), 2, true, false))),
        grouped(recurrent(gated_deltanet(Some(6)))),
        plain(recurrent(gated_deltanet(None))),
        recurrent(Mechanism::Kda { convolution: 4, epsilon: 0.01 }),
        recurrent(mamba2(true)),
        AttentionConfig { bias: true, ..grouped(recurrent(mamba2(false))) },
        mamba(5, Some(3), true),
        AttentionConfig { bias: true, head_width: Some(9), ..mamba(4, None, false) },
        recurrent(lightning(Slopes::Geometric, None)),
        plain(recurrent(lightning(Slopes::Linear, Some([1, 3])))),
        recurrent(rwkv7(Some([3, 2, 2, 3]), None)),
        AttentionConfig { bias: true, head_width: Some(3), ..recurrent(rwkv7(None, Some([0, 3]))) },
        alone(Mechanism::S4d { states: 5 }),
        AttentionConfig { bias: true, ..alone(Mechanism::S4d { states: 1 }) },
        alone(lru(None, [0.0, 1.0], 6.0)),
        AttentionConfig { bias: true, ..alone(lru(Some(5), [0.5, 0.9], 1.0)) },
        // What published decoders choose: as in Qwen3, Gemma 3, OLMo 2, GPT-OSS, Qwen3-Next; and what none has.
        AttentionConfig {
            rotary: turned(llama3),
            query_key_norm: norms(NormKind::Rms, false, false),
            ..heads(Mechanism::default())
        },
        AttentionConfig {
            scale: Some(0.3),
            query_key_norm: norms(NormKind::Rms, true, false),
            ..heads(window.clone())
        },
        AttentionConfig { query_key_norm: norms(NormKind::Rms, false, true), ..heads(Mechanism::default()) },
        AttentionConfig {
            rotary: turned(yarn),
            sinks: true,
            bias: true,
            ..heads(Mechanism::Softmax { window: Some(5), soft_cap: None })
        },
        AttentionConfig {
            rotary: partial,
            output_gate: true,
            query_key_norm: norms(NormKind::Rms, true, false),
            ..heads(Mechanism::default())
        },
        AttentionConfig {
            rotary: interleaved,
            scale: Some(0.7),
            query_key_norm: norms(NormKind::Layer, false, true),
            sinks: true,
            output_gate: true,
            ..plain(heads(window))
        },
        AttentionConfig { query_key_norm: norms(NormKind::Layer, true, false), ..heads(linear) },
        AttentionConfig {
            query_key_norm: norms(NormKind::Rms, false, true),
            ..heads(performer(FeatureKind::Orthogonal, FavorMap::Positive))
        },
        AttentionConfig {
            query_key_norm: norms(NormKind::Rms, true, true),
            ..heads(norm(FeatureMap::EluPlusOne, NormScope::Head))
        },
        AttentionConfig { rotary: turned(yarn), query_key_norm: norms(NormKind::Rms, false, false), ..heads(diag) },
        AttentionConfig {
            rotary: turned(stretched),
            query_key_norm: norms(NormKind::Rms, false, false),
            ..heads(retention)
        },
        AttentionConfig { rotary: interleaved, ..unit(gau(GauNorm::RowSum { epsilon: 1e-3 }, Some(3))) },
        AttentionConfig { rotary: partial, ..unit(flash(GlobalNorm::Mean)) },
    ]
}

/// Scalings that show in rows of 4 numbers with the base 100, whose frequencies are 1 and 1/10.
fn scalings() -> [RotaryScaling; 3] {
    let (factor, original_length) = (3.0, 20);
    [
        RotaryScaling::Linear { factor },
        RotaryScaling::Llama3 { factor, low_frequency_factor: 0.2, high_frequency_factor: 5.0, original_length },
        RotaryScaling::Yarn {
            factor,
            original_length,
            beta_fast: 2.0,
            beta_slow: 0.05,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: false,
        },
    ]
}

/// The same, each causal and not where both are possible.
fn layers_both_ways() -> impl Iterator<Item = AttentionConfig> {
    let both = |config: AttentionConfig| [true, false].map(|causal| AttentionConfig { causal, ..config.clone() });
    layers().into_iter().flat_map(both).filter(|config| config.check().is_ok())
}

/// Numbers of standard deviation 1, the same for the same name.
fn random(name: &str, dims: &[usize]) -> Result<Tensor> {
    let mut random = Random::new(name);
    Tensor::from_vec((0..dims.iter().product()).map(|_| random.normal()).collect(), dims, &Device::Cpu)
}

/// A layer in f64 whose weights are large enough that all parts of it matter.
fn layer(config: &AttentionConfig) -> Result<(VarMap, Attention)> {
    let variables = VarMap::new();
    let layer = Attention::new(config, seeded_weights(&variables, 3, DType::F64, &Device::Cpu))?;
    enlarge(&variables)?;
    Ok((variables, layer))
}

/// Replaces weights that begin at 0 or nearly so.
fn enlarge(variables: &VarMap) -> Result<()> {
    for (name, variable) in variables.data().lock().unwrap().iter() {
        if ["bias", "gamma", "beta", "sinks", "norm.weight", "g_norm_swish_gate.weight"]
            .iter()
            .any(|end| name.ends_with(end))
        {
            variable.set(&random(name, variable.dims())?.to_dtype(variable.dtype())?)?;
        }
    }
    Ok(())
}

/// Whether a weight is trained: not a mark, not a random direction.
fn is_trained(name: &str) -> bool {
    !name.contains("mechanism.") && !name.contains("features.")
}

/// Largest |a − b|; infinite for NaN and other shapes.
fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
    let difference = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.flatten_all()?.to_vec1::<f64>()?;
    Ok(difference.into_iter().fold(0.0, |worst, d| if d.is_nan() { f64::INFINITY } else { f64::max(worst, d) }))
}

#[track_caller]
fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) -> Result<()> {
    let distance = distance(a, b)?;
    assert!(distance <= tolerance, "{what}: {distance:e} > {tolerance:e}");
    Ok(())
}

/// Checks that the error says all of `words`.
#[track_caller]
fn assert_refused<T>(result: Result<T>, words: &[&str]) {
    let Err(error) = result else { panic!("accepted, though {words:?}") };
    let message = error.to_string();
    let missing = words.iter().find(|word| !message.contains(**word));
    assert!(missing.is_none(), "`{}` is not in: {message}", missing.unwrap_or(&""));
}

/// A file or folder that goes away.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("attn-kernels-{}-{name}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // It may never have been written.
        if self.0.is_dir() { std::fs::remove_dir_all(&self.0) } else { std::fs::remove_file(&self.0) }
            .unwrap_or_default();
    }
}
