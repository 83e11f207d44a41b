use std::cmp::Ordering;
use std::collections::HashSet;

use candle_core::{DType, Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::problem::ensure_value;

/// How a [`Sampler`] chooses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// T ≥ 0: logits are divided by it; 0 takes the most likely token always. Default 0.
    pub temperature: f64,
    /// Chooses among the k most likely tokens only. Default: all.
    pub top_k: Option<usize>,
    /// Chooses among the fewest most likely tokens whose probabilities add up to p at least (nucleus sampling,
    /// Holtzman et al. 2019), 0 < p ≤ 1, after `top_k`. Default: all.
    pub top_p: Option<f64>,
    /// Chooses among the tokens only that are at least this times as likely as the most likely one (Nguyen et al. 2024),
    /// 0 < p ≤ 1. Default: all.
    pub min_p: Option<f64>,
    /// θ > 0: logits of tokens that were seen before are divided by it where they are above 0 and multiplied by it below
    /// (Keskar et al. 2019), before everything else. Above 1 repetitions are rarer. Default 1.
    pub repetition_penalty: f64,
    /// The choices are a function of the logits and of this. Default 0.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Chooses tokens by their logits: token i with probability softmax(logits/T)_i, renormalised over the tokens that
/// `top_k`, `top_p` and `min_p` leave. Of equally likely tokens the lower number counts as the more likely. NaN is never chosen.
///
/// # Example
/// ```
/// use attn_kernels::nn::{Sampler, SamplerConfig};
/// use candle_core::{Device, Tensor};
///
/// let logits = Tensor::new(&[1f32, 3.0, 2.0], &Device::Cpu)?;
/// assert_eq!(Sampler::new(SamplerConfig::default())?.sample(&logits)?, 1);
/// let config = SamplerConfig { temperature: 1.0, top_k: Some(2), seed: 7, ..Default::default() };
/// let mut sampler = Sampler::new(config)?;
/// assert!((0..100).all(|_| sampler.sample(&logits).is_ok_and(|token| token > 0)));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    random: ChaCha8Rng,
    /// Tokens of the sequence, as far as they count.
    seen: HashSet<u32>,
}

impl Sampler {
    /// # Errors
    /// A temperature below 0 or not finite, a `top_k` of 0, a `top_p` or `min_p` that is not in (0, 1], a penalty that is
    /// not above 0 or not finite.
    pub fn new(config: SamplerConfig) -> Result<Self> {
        let function = "Sampler::new";
        let SamplerConfig { temperature, top_k, top_p, min_p, repetition_penalty: penalty, seed } = config;
        let is_finite = temperature.is_finite() && temperature >= 0.0;
        ensure_value(is_finite, function, "temperature", temperature, "a finite number, at least 0")?;
        ensure_value(top_k != Some(0), function, "top_k", 0, "at least 1")?;
        for (argument, p) in [("top_p", top_p), ("min_p", min_p)] {
            let p = p.unwrap_or(1.0);
            ensure_value(p > 0.0 && p <= 1.0, function, argument, p, "above 0 and at most 1")?;
        }
        let is_finite = penalty.is_finite() && penalty > 0.0;
        ensure_value(is_finite, function, "repetition_penalty", penalty, "a finite number above 0")?;
        Ok(Self { config, random: ChaCha8Rng::seed_from_u64(seed), seen: HashSet::new() })
    }

    /// Counts tokens among those seen, for the repetition penalty; those that [`Self::sample`] returns count anyway.
    pub fn observe(&mut self, tokens: &[u32]) {
        if self.config.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }

    /// The token chosen by `logits` `[vocabulary]`, of any float dtype.
    ///
    /// # Errors
    /// Logits of another rank, none, or none that is a number.
    pub fn sample(&mut self, logits: &Tensor) -> Result<u32> {
        let token = self.choose(logits.to_dtype(DType::F64)?.to_vec1()?)?;
        self.observe(&[token]);
        Ok(token)
    }

    /// A token for each row of `logits` `[B, vocabulary]`, one after the other.
    ///
    /// # Errors
    /// As [`Self::sample`]; a repetition penalty, which takes a sampler for each sequence.
    pub fn sample_batch(&mut self, logits: &Tensor) -> Result<Vec<u32>> {
        let penalty = self.config.repetition_penalty;
        let needs = "1 for a batch: a sampler for each sequence";
        ensure_value(penalty == 1.0, "Sampler::sample_batch", "repetition_penalty", penalty, needs)?;
        let rows = logits.to_dtype(DType::F64)?.to_vec2()?;
        rows.into_iter().map(|row| self.choose(row)).collect()
    }

    fn choose(&mut self, mut logits: Vec<f64>) -> Result<u32> {
        let penalty = self.config.repetition_penalty;
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        let mut tokens: Vec<usize> = (0..logits.len()).filter(|token| !logits[*token].is_nan()).collect();
        ensure_value(!tokens.is_empty(), "Sampler::sample", "logits", "without a number", "at least one number")?;
        let SamplerConfig { temperature, top_k, top_p, min_p, .. } = self.config;
        let likelier = |a: &usize, b: &usize| {
            let by_logit = logits[*b].partial_cmp(&logits[*a]).unwrap_or(Ordering::Equal);
            by_logit.then(a.cmp(b))
        };
        let best = tokens.iter().copied().min_by(likelier).unwrap_or(0);
        if temperature == 0.0 || logits[best].is_infinite() {
            return Ok(best as u32);
        }
        if let Some(k) = top_k.filter(|k| *k < tokens.len()) {
            tokens.select_nth_unstable_by(k, likelier);
            tokens.truncate(k);
        }
        // In an order that does not depend on the algorithm above.
        match top_p {
            Some(_) => tokens.sort_unstable_by(likelier),
            None => tokens.sort_unstable(),
        }
        let weight = |token: usize| ((logits[token] - logits[best]) / temperature).exp();
        let mut weights: Vec<f64> = tokens.iter().map(|token| weight(*token)).collect();
        if let Some(p) = top_p {
            let wanted = p * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let needed = weights.iter().take_while(|weight| {
                let is_needed = sum < wanted;
                sum += **weight;
                is_needed
            });
            let needed = needed.count();
            weights.truncate(needed.max(1));
        }
        if let Some(least) = min_p {
            weights.iter_mut().filter(|weight| **weight < least).for_each(|weight| *weight = 0.0);
        }
        let total: f64 = weights.iter().sum();
        // 53 random bits: uniform in [0, 1).
        let mut left = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        let chosen = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a rest: never to a token of weight 0.
        let last = weights.iter().rposition(|weight| *weight > 0.0);
        Ok(tokens[chosen.or(last).unwrap_or(0)] as u32)
    }
}
