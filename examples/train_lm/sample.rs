//! What the model writes, one byte at a time from a cache.

use attn_kernels::nn::{LanguageModel, Sampler, SamplerConfig};
use candle_core::{Device, Module, Result, Tensor};

/// Steps whose choice is compared with that of one pass over all bytes.
pub const CHECKED: usize = 256;

/// Continues `prompt` by `count` bytes.
pub fn continuation(model: &LanguageModel, prompt: &[u32], count: usize, config: SamplerConfig) -> Result<Vec<u32>> {
    let mut cache = model.cache()?;
    model.generate(prompt, Sampler::new(config)?, &mut cache)?.take(count).collect()
}

/// Generates the most likely bytes step by step and asks for each whether one pass over all of them chooses the same.
///
/// # Errors
/// Says at which step they part.
pub fn check_steps(model: &LanguageModel, prompt: &[u32], device: &Device) -> std::result::Result<(), String> {
    let choices = || -> Result<_> {
        let steps = continuation(model, prompt, CHECKED, SamplerConfig::default())?;
        let all: Vec<_> = prompt.iter().chain(&steps).copied().collect();
        let logits = model.forward(&Tensor::new(&all[..all.len() - 1], device)?.unsqueeze(0)?)?;
        let one_pass = logits.squeeze(0)?.narrow(0, prompt.len() - 1, CHECKED)?.argmax(1)?.to_vec1::<u32>()?;
        Ok((steps, one_pass))
    };
    let (steps, one_pass) = choices().map_err(|error| format!("sampling: {error}"))?;
    match steps.iter().zip(&one_pass).position(|(step, pass)| step != pass) {
        None => Ok(()),
        Some(at) => Err(format!("step {at} chooses byte {}, one pass over all bytes {}", steps[at], one_pass[at])),
    }
}

pub fn text(bytes: &[u32]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|&byte| byte as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
