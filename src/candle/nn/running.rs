use std::collections::VecDeque;

use candle_core::{Error, Result};

use super::cache::ModelCache;
use super::generate::Writer;
use super::model::LanguageModel;
use super::sampler::Sampler;
use crate::problem::ensure_value;

/// A sequence that a [`RunningBatch`] is to continue.
///
/// ```
/// use attn_kernels::nn::{Request, Sampler, SamplerConfig};
///
/// let sampler = Sampler::new(SamplerConfig { temperature: 0.8, seed: 3, ..Default::default() })?;
/// let request = Request { until: vec![0], limit: Some(100), ..Request::new(&[72, 101], sampler) };
/// assert_eq!(request.prompt, [72, 101]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Request {
    /// Its tokens so far, beyond those in the cache.
    pub prompt: Vec<u32>,
    /// Chooses its tokens.
    pub sampler: Sampler,
    /// Tokens that end it; the one that does is returned. Default: none.
    pub until: Vec<u32>,
    /// Ends it after so many tokens. Default: it does not end by itself.
    pub limit: Option<usize>,
    /// What has been read before the prompt: a clone of the cache of a common beginning, say. Default: nothing.
    pub cache: Option<ModelCache>,
}

impl Request {
    /// Without an end and a beginning.
    pub fn new(prompt: &[u32], sampler: Sampler) -> Self {
        Self { prompt: prompt.to_vec(), sampler, until: Vec::new(), limit: None, cache: None }
    }
}

/// Sequences of any lengths that a model continues side by side, one token for each in a step: continuous batching. Others
/// join at any time, their prompts are read beside the steps of those that run; each ends at its own tokens or length, or is
/// removed.
///
/// A sequence gives what [`LanguageModel::generate`] gives for it alone, whatever runs beside it: on the CPU to the bit, and
/// on any number of threads.
///
/// As an iterator it returns pairs of a sequence's number and its next token, step by step, until no sequence is left. An error
/// of one sequence (logits without a number) ends that one; after an error of the model, which changes nothing, the
/// iterator ends.
///
/// # Example
/// ```
/// use attn_kernels::nn::{LanguageModel, LanguageModelConfig, Request, RunningBatch, Sampler, SamplerConfig};
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let variables = VarMap::new();
/// let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let model = LanguageModel::new(&LanguageModelConfig::named("retention", 256, 32, 2, 2)?, weights)?;
/// let sampler = Sampler::new(SamplerConfig::default())?;
/// let request = |prompt: &[u8], limit| {
///     let prompt: Vec<u32> = prompt.iter().map(|&byte| byte.into()).collect();
///     Request { limit: Some(limit), ..Request::new(&prompt, sampler.clone()) }
/// };
///
/// let mut batch = RunningBatch::new(&model);
/// let (first, second) = (batch.add(request(b"to be", 5))?, batch.add(request(b"or not to be", 2))?);
/// let mut written = vec![Vec::new(); 3];
/// while let Some(next) = batch.next() {
///     let (sequence, token) = next?;
///     written[sequence].push(token);
///     if sequence == second && !batch.is_running(second) {
///         batch.add(request(b"that", 4))?; // takes the place
///     }
/// }
/// assert_eq!(written.iter().map(Vec::len).collect::<Vec<_>>(), [5, 2, 4]);
/// assert!(!batch.is_running(first));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct RunningBatch<'m> {
    model: &'m LanguageModel,
    rows: Vec<Row>,
    /// Sequences added so far.
    added: usize,
    /// Tokens that the iterator has not returned yet.
    waiting: VecDeque<Written>,
    has_failed: bool,
}

/// A sequence's number and its next token.
type Written = (usize, Result<u32>);

/// A running sequence.
#[derive(Debug)]
struct Row {
    number: usize,
    writer: Writer,
    cache: ModelCache,
}

impl<'m> RunningBatch<'m> {
    /// Without sequences.
    pub fn new(model: &'m LanguageModel) -> Self {
        Self { model, rows: Vec::new(), added: 0, waiting: VecDeque::new(), has_failed: false }
    }

    /// Adds a sequence and returns its number: 0, 1, 2, … in the order of their coming. The next step reads its prompt.
    ///
    /// # Errors
    /// An empty prompt, one with tokens beyond the vocabulary, a limit of 0, a cache of another model or of several
    /// sequences. The batch stays as it is.
    pub fn add(&mut self, request: Request) -> Result<usize> {
        let function = "RunningBatch::add";
        let Request { prompt, sampler, until, limit, cache } = request;
        let vocabulary = self.model.config().vocabulary;
        let beyond = prompt.iter().find(|token| **token as usize >= vocabulary);
        let needs = format!("numbers below the vocabulary of {vocabulary}");
        ensure_value(beyond.is_none(), function, "prompt", beyond.copied().unwrap_or(0), &needs)?;
        ensure_value(limit != Some(0), function, "limit", 0, "at least 1")?;
        let cache = cache.map_or_else(|| self.model.cache(), Ok)?;
        self.model.check_cache(function, &cache)?;
        let sequences = cache.sequences().unwrap_or(1);
        ensure_value(sequences == 1, function, "cache", format!("of {sequences} sequences"), "one of one sequence")?;
        let writer = Writer::new(function, &prompt, sampler)?.until(&until).at_most(limit);
        let number = self.added;
        self.rows.push(Row { number, writer, cache });
        self.added += 1;
        Ok(number)
    }

    /// Takes a running sequence out, before its end, and returns its cache; tokens of it that have not been returned are
    /// dropped. None if it is not running.
    pub fn remove(&mut self, number: usize) -> Option<ModelCache> {
        let place = self.rows.iter().position(|row| row.number == number)?;
        self.waiting.retain(|(other, _)| *other != number);
        Some(self.rows.remove(place).cache)
    }

    /// Whether a sequence has been added and has neither ended nor been removed.
    pub fn is_running(&self, number: usize) -> bool {
        self.rows.iter().any(|row| row.number == number)
    }

    /// The cache of a running sequence: all of its tokens but the last.
    pub fn cache(&self, number: usize) -> Option<&ModelCache> {
        self.rows.iter().find(|row| row.number == number).map(|row| &row.cache)
    }

    /// Running sequences.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no sequence is running.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Bytes that all caches take.
    pub fn bytes(&self) -> usize {
        self.rows.iter().map(|row| row.cache.bytes()).sum()
    }

    /// The next token of every running sequence, with its number; those that the iterator has not returned yet come alone and
    /// first.
    ///
    /// # Errors
    /// Those of the model; the batch is then as before.
    pub fn step(&mut self) -> Result<Vec<(usize, Result<u32>)>> {
        if self.waiting.is_empty() {
            self.advance()?;
        }
        Ok(self.waiting.drain(..).collect())
    }

    /// Lets every sequence write a token.
    fn advance(&mut self) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let (tokens, mut caches): (Vec<&[u32]>, Vec<&mut ModelCache>) =
            self.rows.iter_mut().map(|row| (row.writer.new_tokens(), &mut row.cache)).unzip();
        let logits = self.model.next_logits_each(&tokens, &mut caches)?;
        for (index, row) in self.rows.iter_mut().enumerate() {
            let token = logits.get(index).and_then(|logits| row.writer.write(&logits));
            self.waiting.push_back((row.number, token));
        }
        self.rows.retain(|row| !row.writer.has_ended());
        Ok(())
    }
}

impl Iterator for RunningBatch<'_> {
    type Item = Result<(usize, u32)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.waiting.is_empty()
            && !self.has_failed
            && let Err(error) = self.advance()
        {
            self.has_failed = true;
            return Some(Err(error));
        }
        let (number, token) = self.waiting.pop_front()?;
        Some(token.map(|token| (number, token)).map_err(|error| Error::msg(format!("sequence {number}: {error}"))))
    }
}
