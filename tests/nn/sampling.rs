use attn_kernels::nn::{Sampler, SamplerConfig, generate};
use candle_core::{DType, Device, Result, Tensor};

/// How often each token is chosen.
fn counts(logits: &[f64], config: SamplerConfig, draws: usize) -> Result<Vec<f64>> {
    let logits = Tensor::new(logits, &Device::Cpu)?;
    let mut sampler = Sampler::new(config)?;
    let mut counts = vec![0.0; logits.elem_count()];
    for _ in 0..draws {
        counts[sampler.sample(&logits)? as usize] += 1.0;
    }
    Ok(counts)
}

/// Checks counts against probabilities, within 5 standard deviations.
#[track_caller]
fn assert_distributed(counts: &[f64], probabilities: &[f64]) {
    let draws: f64 = counts.iter().sum();
    for (token, (count, p)) in counts.iter().zip(probabilities).enumerate() {
        let allowed = 5.0 * (draws * p * (1.0 - p)).sqrt();
        assert!((count - draws * p).abs() <= allowed, "token {token}: {count} of {draws}, expected {}", draws * p);
    }
}

#[test]
fn distributions() -> Result<()> {
    let probabilities = [0.1, 0.4, 0.05, 0.3, 0.15];
    let logits = probabilities.map(|p: f64| p.ln() + 3.0);
    let config = |temperature, top_k, top_p| SamplerConfig { temperature, top_k, top_p, seed: 5, ..Default::default() };
    let draws = 20_000;
    assert_distributed(&counts(&logits, config(1.0, None, None), draws)?, &probabilities);
    // T = 2: proportional to √p.
    let roots = probabilities.map(f64::sqrt);
    let sum: f64 = roots.iter().sum();
    assert_distributed(&counts(&logits, config(2.0, None, None), draws)?, &roots.map(|root| root / sum));
    assert_distributed(&counts(&logits, config(1.0, Some(2), None), draws)?, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
    // 0.4 + 0.3 is 0.7: one more is needed for 0.75, none for 0.65.
    let nucleus = counts(&logits, config(1.0, None, Some(0.75)), draws)?;
    assert_distributed(&nucleus, &[0.0, 0.4 / 0.85, 0.0, 0.3 / 0.85, 0.15 / 0.85]);
    let nucleus = counts(&logits, config(1.0, None, Some(0.65)), draws)?;
    assert_distributed(&nucleus, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
    // top_p counts within what top_k leaves: 4/7 is more than a half.
    assert_distributed(&counts(&logits, config(1.0, Some(2), Some(0.5)), 100)?, &[0.0, 1.0, 0.0, 0.0, 0.0]);
    // All of p = 1, the most likely of a tiny p, and of a tiny temperature.
    assert_distributed(&counts(&logits, config(1.0, None, Some(1.0)), draws)?, &probabilities);
    for config in [config(1.0, None, Some(1e-9)), config(1e-6, None, None), config(0.0, None, None)] {
        assert_distributed(&counts(&logits, config, 100)?, &[0.0, 1.0, 0.0, 0.0, 0.0]);
    }
    Ok(())
}

#[test]
fn unlikely_tokens_are_left_out() -> Result<()> {
    let logits = [0.1, 0.4, 0.05, 0.3, 0.15].map(|p: f64| p.ln() - 2.0);
    let config =
        |min_p, top_k| SamplerConfig { temperature: 1.0, min_p: Some(min_p), top_k, seed: 5, ..Default::default() };
    // At least half of 0.4, a fifth of it.
    assert_distributed(&counts(&logits, config(0.5, None), 20_000)?, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
    let fifth = [0.1 / 0.95, 0.4 / 0.95, 0.0, 0.3 / 0.95, 0.15 / 0.95];
    assert_distributed(&counts(&logits, config(0.2, None), 20_000)?, &fifth);
    assert_distributed(&counts(&logits, config(0.2, Some(1)), 100)?, &[0.0, 1.0, 0.0, 0.0, 0.0]);
    assert_distributed(&counts(&logits, config(1.0, None), 100)?, &[0.0, 1.0, 0.0, 0.0, 0.0]);
    Ok(())
}

#[test]
fn repetitions_are_made_rarer() -> Result<()> {
    let config = SamplerConfig { repetition_penalty: 2.0, ..Default::default() };
    let logits = Tensor::new(&[3f32, 4.0, -1.0, 2.5, f32::NEG_INFINITY], &Device::Cpu)?;
    // 4 → 2, 3 → 1.5, 2.5 → 1.25, then all once more do not change: seen is seen.
    let mut sampler = Sampler::new(config)?;
    let chosen: Vec<u32> = (0..5).map(|_| sampler.sample(&logits)).collect::<Result<_>>()?;
    assert_eq!(chosen, [1, 0, 3, 1, 1]);
    // Below 0 a penalty makes less of it; tokens beyond the vocabulary do not matter.
    let mut sampler = Sampler::new(config)?;
    sampler.observe(&[0, 7]);
    assert_eq!(sampler.sample(&Tensor::new(&[-1f64, -1.5], &Device::Cpu)?)?, 1);
    let refused = sampler.sample_batch(&logits.unsqueeze(0)?).unwrap_err().to_string();
    assert!(refused.contains("`repetition_penalty` is 2, needs 1 for a batch"), "{refused}");

    // The prompt has been seen.
    let next = |_: &[u32]| logits.narrow(0, 0, 4);
    let generation = generate(next, &[1, 1], Sampler::new(config)?)?;
    assert_eq!(generation.take(2).collect::<Result<Vec<u32>>>()?, [0, 3]);
    Ok(())
}

#[test]
fn generation_ends_with_a_token() -> Result<()> {
    let next = |tokens: &[u32]| {
        let last = tokens[tokens.len() - 1];
        Tensor::from_vec((0..10).map(|token| f32::from(token == last + 1)).collect(), 10, &Device::Cpu)
    };
    let generation = || generate(next, &[2], Sampler::new(SamplerConfig::default())?);
    assert_eq!(generation()?.until(&[6, 5]).collect::<Result<Vec<u32>>>()?, [3, 4, 5]);
    assert_eq!(generation()?.until(&[1]).take(4).collect::<Result<Vec<u32>>>()?, [3, 4, 5, 6]);
    Ok(())
}

#[test]
fn choices_follow_the_seed() -> Result<()> {
    let logits = Tensor::zeros((4, 50), DType::BF16, &Device::Cpu)?;
    let draw = |seed| -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(SamplerConfig { temperature: 1.0, seed, ..Default::default() })?;
        sampler.sample_batch(&logits)
    };
    assert_eq!(draw(1)?, draw(1)?);
    assert_ne!(draw(1)?, draw(2)?);
    // A batch is its rows one after the other.
    let mut sampler = Sampler::new(SamplerConfig { temperature: 1.0, seed: 1, ..Default::default() })?;
    let rows: Vec<u32> = (0..4).map(|row| sampler.sample(&logits.get(row)?)).collect::<Result<_>>()?;
    assert_eq!(rows, draw(1)?);
    Ok(())
}

#[test]
fn extreme_logits() -> Result<()> {
    for temperature in [0.0, 1.0] {
        let config = SamplerConfig { temperature, ..Default::default() };
        assert_eq!(
            counts(&[f64::NAN, f64::NEG_INFINITY, -1e300, f64::NEG_INFINITY], config, 50)?,
            [0.0, 0.0, 50.0, 0.0]
        );
        assert_eq!(counts(&[0.0, f64::INFINITY, 1e308], config, 50)?, [0.0, 50.0, 0.0]);
        assert_eq!(counts(&[-1e308, 1e308], config, 50)?, [0.0, 50.0]);
    }
    // Of equals, greedy takes the first, of two zeros as well.
    assert_eq!(counts(&[-0.0, 0.0], SamplerConfig::default(), 3)?, [3.0, 0.0]);
    assert_eq!(counts(&[1.0, 2.0, 2.0], SamplerConfig::default(), 3)?, [0.0, 3.0, 0.0]);
    Ok(())
}

#[test]
fn generation_hands_over_new_tokens_only() -> Result<()> {
    let mut seen: Vec<Vec<u32>> = Vec::new();
    let next = |tokens: &[u32]| {
        seen.push(tokens.to_vec());
        let sum: u32 = tokens.iter().sum();
        Tensor::from_vec((0..10).map(|token| f32::from(token == (sum + 1) % 10)).collect(), 10, &Device::Cpu)
    };
    let generation = generate(next, &[1, 2, 3], Sampler::new(SamplerConfig::default())?)?;
    assert_eq!(generation.take(3).collect::<Result<Vec<u32>>>()?, [7, 8, 9]);
    assert_eq!(seen, [vec![1, 2, 3], vec![7], vec![8]]);
    Ok(())
}
