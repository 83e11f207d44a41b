use candle_core::{Result, Tensor};

use super::sampler::Sampler;
use crate::problem::ensure_value;

/// Tokens one by one, for any model: `next` is handed the tokens that are new to it, the whole prompt and then one
/// token at a time, and returns the logits `[vocabulary]` after the last of them. What came before is its own business,
/// in a cache usually.
///
/// The iterator ends after a token of [`Generation::until`], or else not by itself: stop it with `take`, `take_while` or a
/// loop. After an error it ends. The prompt and what is returned count as seen for a repetition penalty.
///
/// # Errors
/// An empty prompt.
///
/// # Example
/// ```
/// use attn_kernels::nn::{Sampler, SamplerConfig, generate};
/// use candle_core::{Device, Tensor};
///
/// // A model that counts modulo 4.
/// let next = |tokens: &[u32]| {
///     let last = tokens[tokens.len() - 1] as usize;
///     let logits: Vec<f32> = (0..4).map(|token| f32::from(token == (last + 1) % 4)).collect();
///     Tensor::from_vec(logits, 4, &Device::Cpu)
/// };
/// let tokens = generate(next, &[0, 1], Sampler::new(SamplerConfig::default())?)?;
/// let tokens: Vec<u32> = tokens.take_while(|token| !matches!(token, Ok(0))).collect::<Result<_, _>>()?;
/// assert_eq!(tokens, [2, 3]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn generate<F>(next: F, prompt: &[u32], sampler: Sampler) -> Result<Generation<F>>
where
    F: FnMut(&[u32]) -> Result<Tensor>,
{
    Ok(Generation { next, writer: Writer::new("generate", prompt, sampler)? })
}

/// The iterator of [`generate`].
#[derive(Debug, Clone)]
pub struct Generation<F> {
    next: F,
    writer: Writer,
}

impl<F> Generation<F> {
    /// The same, ending with the first of these tokens, which is returned.
    pub fn until(self, tokens: &[u32]) -> Self {
        Self { writer: self.writer.until(tokens), ..self }
    }
}

impl<F: FnMut(&[u32]) -> Result<Tensor>> Iterator for Generation<F> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Result<u32>> {
        if self.writer.has_ended {
            return None;
        }
        Some(match (self.next)(&self.writer.new) {
            Ok(logits) => self.writer.write(&logits),
            Err(error) => {
                self.writer.has_ended = true;
                Err(error)
            }
        })
    }
}

/// What a sequence needs of the logits after its tokens.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    sampler: Sampler,
    /// Tokens that the model has not seen.
    new: Vec<u32>,
    /// Tokens that end it.
    last: Vec<u32>,
    /// Tokens until its end.
    left: Option<usize>,
    has_ended: bool,
}

impl Writer {
    pub fn new(function: &'static str, prompt: &[u32], mut sampler: Sampler) -> Result<Self> {
        ensure_value(!prompt.is_empty(), function, "prompt", "empty", "at least one token")?;
        sampler.observe(prompt);
        Ok(Self { sampler, new: prompt.to_vec(), last: Vec::new(), left: None, has_ended: false })
    }

    /// The same, ending with the first of these tokens.
    pub fn until(self, tokens: &[u32]) -> Self {
        Self { last: tokens.to_vec(), ..self }
    }

    /// The same, ending after so many tokens.
    pub fn at_most(self, count: Option<usize>) -> Self {
        Self { left: count, ..self }
    }

    pub fn new_tokens(&self) -> &[u32] {
        &self.new
    }

    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Chooses the next token; an error ends the sequence.
    pub fn write(&mut self, logits: &Tensor) -> Result<u32> {
        let token = self.sampler.sample(logits);
        self.left = self.left.map(|left| left.saturating_sub(1));
        match &token {
            Ok(token) => {
                (self.new, self.has_ended) = (vec![*token], self.last.contains(token) || self.left == Some(0));
            }
            Err(_) => self.has_ended = true,
        }
        token
    }
}
