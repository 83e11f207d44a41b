//! Layers and models on packed sequences.

use attn_kernels::Sequences;
use attn_kernels::nn::{LanguageModel, LanguageModelConfig, seeded_weights};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarMap;

const LENGTHS: [u32; 5] = [7, 1, 0, 40, 20];

/// Rows of one mechanism's model over all sequences, and alone.
fn largest_difference(name: &str) -> Result<f64> {
    let variables = VarMap::new();
    let config = LanguageModelConfig::named(name, 11, 16, 2, 2)?;
    let model = LanguageModel::new(&config, seeded_weights(&variables, 0, DType::F64, &Device::Cpu))?;
    let total: u32 = LENGTHS.iter().sum();
    let tokens = Tensor::from_vec((0..total).map(|i| i * i % 11).collect(), (1, total as usize), &Device::Cpu)?;
    let out = model.forward_sequences(&tokens, &Sequences::of_lengths(LENGTHS))?;
    let (mut worst, mut start) = (0f64, 0);
    for length in LENGTHS.map(|length| length as usize).into_iter().filter(|&length| length > 0) {
        let alone = model.forward(&tokens.narrow(1, start, length)?)?;
        let difference = (out.narrow(1, start, length)? - alone)?.abs()?.max_all()?.to_scalar::<f64>()?;
        worst = worst.max(difference);
        start += length;
    }
    let gradients = out.sqr()?.sum_all()?.backward()?;
    let trained = variables.all_vars().iter().filter(|variable| gradients.get(variable).is_some()).count();
    assert!(trained > 10, "{name}: {trained} variables with a gradient");
    Ok(worst)
}

#[test]
fn models_see_one_sequence_at_a_time() -> Result<()> {
    for name in LanguageModelConfig::NAMES {
        let worst = largest_difference(name)?;
        assert!(worst < 1e-12, "{name}: {worst:e}");
    }
    Ok(())
}

#[test]
fn offsets_of_queries_alone_are_refused() -> Result<()> {
    let config = LanguageModelConfig::named("softmax", 11, 16, 1, 2)?;
    let model = LanguageModel::new(&config, seeded_weights(&VarMap::new(), 0, DType::F32, &Device::Cpu))?;
    let tokens = Tensor::zeros((1, 6), DType::U32, &Device::Cpu)?;
    let refused = model.forward_sequences(&tokens, &Sequences::with_keys(&[0, 2, 6], &[0, 3, 6]));
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("`sequences` is of two kinds of offsets"), "{message}");
    Ok(())
}
