mod file;
mod model;
mod recurrence;
mod rows;

use std::borrow::Borrow;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};

use super::config::AttentionConfig;
use super::mechanism::Mechanism;
use crate::Error;
use crate::candle::LinearState;
use crate::problem::ensure_value;

use file::{load, save};
pub use model::ModelCache;
pub(super) use recurrence::Recurrence;
pub(super) use rows::Rows;

/// What an [`Attention`](super::Attention) layer keeps of the tokens that it has seen, so that a sequence can be
/// continued: [`Attention::forward_cached`](super::Attention::forward_cached) reads and extends it.
///
/// | mechanism | kept, for a batch of B | grows |
/// | --- | --- | --- |
/// | softmax, GAU | keys and values of all tokens | with every token |
/// | softmax with a window of w | keys and values of the last w − 1 tokens | no (at most 2w + 64 rows of room) |
/// | diag | keys and values of the current block | no |
/// | linear, Performer, norm, retention | S, z and the stabiliser: a [`LinearState`] | no |
/// | FLASH | keys and values of the current chunk, S | no |
/// | GLA, DeltaNet, Gated DeltaNet, KDA, Mamba-2, Mamba, lightning | S, and the last inputs of the short convolutions, one fewer than taps | no |
/// | RWKV-7 | S, and the last row | no |
/// | S4D, LRU | the complex state | no |
///
/// Rows are appended in place in buffers that grow by half when full, so a token costs no copy of those before it. A
/// clone is cheap and independent: the buffers are shared until one of both is extended. Nothing in a cache is in a
/// graph of gradients.
///
/// # Example
/// ```
/// use attn_kernels::nn::{Attention, AttentionConfig, Mechanism};
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let variables = VarMap::new();
/// let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let layer = Attention::new(&AttentionConfig::new(16, 2, Mechanism::named("linear")?), weights)?;
/// let x = Tensor::randn(0f32, 1.0, (1, 10, 16), &Device::Cpu)?;
///
/// let mut cache = layer.cache()?;
/// layer.forward_cached(&x.narrow(1, 0, 9)?, &mut cache)?;
/// let bytes = cache.bytes();
/// let last = layer.forward_cached(&x.narrow(1, 9, 1)?, &mut cache)?;
/// assert_eq!((cache.len(), cache.bytes()), (10, bytes));
///
/// let whole = layer.forward(&x)?.narrow(1, 9, 1)?;
/// assert!((whole - last)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Cache {
    /// Of the layer, with the seed of its random features.
    pub(super) config: AttentionConfig,
    pub(super) dtype: DType,
    pub(super) device: Device,
    /// How often the layer had drawn its random features anew.
    pub(super) redraws: u64,
    pub(super) position: usize,
    pub(super) batch: Option<usize>,
    pub(super) contents: Contents,
}

#[derive(Debug, Clone)]
pub(super) enum Contents {
    /// Keys and values.
    Rows(Rows),
    /// Sums over all tokens.
    Sums(Option<LinearState>),
    /// Local keys, global keys and values of the current chunk, and the sums over those before.
    Chunk(Rows, Option<LinearState>),
    /// State and convolutions of recurrent layers.
    Recurrent(Option<Recurrence>),
}

impl Contents {
    fn new(mechanism: &Mechanism) -> Self {
        match mechanism {
            Mechanism::Softmax { .. } | Mechanism::Diag { .. } | Mechanism::Gau { .. } => Self::Rows(Rows::default()),
            Mechanism::Flash { .. } => Self::Chunk(Rows::default(), None),
            Mechanism::Linear { .. }
            | Mechanism::Performer { .. }
            | Mechanism::Norm { .. }
            | Mechanism::Retention { .. } => Self::Sums(None),
            Mechanism::Gla { .. }
            | Mechanism::Deltanet { .. }
            | Mechanism::GatedDeltanet { .. }
            | Mechanism::Kda { .. }
            | Mechanism::Mamba2 { .. }
            | Mechanism::Mamba { .. }
            | Mechanism::Lightning { .. }
            | Mechanism::Rwkv7 { .. }
            | Mechanism::S4d { .. }
            | Mechanism::Lru { .. } => Self::Recurrent(None),
        }
    }
}

impl Contents {
    fn rows(&self) -> Option<&Rows> {
        match self {
            Self::Rows(rows) | Self::Chunk(rows, _) => Some(rows),
            Self::Sums(_) | Self::Recurrent(_) => None,
        }
    }

    fn sums(&self) -> Option<&LinearState> {
        match self {
            Self::Sums(state) | Self::Chunk(_, state) => state.as_ref(),
            Self::Rows(_) | Self::Recurrent(_) => None,
        }
    }

    fn recurrence(&self) -> Option<&Recurrence> {
        match self {
            Self::Recurrent(recurrence) => recurrence.as_ref(),
            _ => None,
        }
    }
}

/// Rows and sums to go back to.
pub(super) struct Snapshot {
    position: usize,
    batch: Option<usize>,
    contents: Contents,
}

impl Cache {
    pub(super) fn snapshot(&self) -> Snapshot {
        let contents = match &self.contents {
            Contents::Rows(rows) => Contents::Rows(rows.snapshot()),
            Contents::Sums(state) => Contents::Sums(state.clone()),
            Contents::Chunk(rows, state) => Contents::Chunk(rows.snapshot(), state.clone()),
            Contents::Recurrent(recurrence) => Contents::Recurrent(recurrence.clone()),
        };
        Snapshot { position: self.position, batch: self.batch, contents }
    }

    pub(super) fn restore(&mut self, snapshot: Snapshot) {
        Snapshot { position: self.position, batch: self.batch, contents: self.contents } = snapshot;
    }

    pub(super) fn new(config: AttentionConfig, dtype: DType, device: &Device, redraws: u64) -> Self {
        let contents = Contents::new(&config.mechanism);
        Self { config, dtype, device: device.clone(), redraws, position: 0, batch: None, contents }
    }

    /// What a recurrent layer has kept.
    pub(super) fn recurrence(&mut self) -> Result<&mut Option<Recurrence>> {
        match &mut self.contents {
            Contents::Recurrent(recurrence) => Ok(recurrence),
            _ => candle_core::bail!("the cache is not one of recurrent layers"),
        }
    }

    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.position
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.position == 0
    }

    /// Bytes that the tensors take, with the room to grow.
    pub fn bytes(&self) -> usize {
        let sums = |state: &Option<LinearState>| state.as_ref().map_or(0, LinearState::size_in_bytes);
        match &self.contents {
            Contents::Rows(rows) => rows.bytes(),
            Contents::Sums(state) => sums(state),
            Contents::Chunk(rows, state) => rows.bytes() + sums(state),
            Contents::Recurrent(recurrence) => recurrence.as_ref().map_or(0, Recurrence::bytes),
        }
    }

    /// Sequences of the batch; none before the first token.
    pub fn sequences(&self) -> Option<usize> {
        self.batch
    }

    /// The caches as one, of all their sequences in a batch: to go on together what was begun apart.
    /// ([`Attention::forward_sequences_cached`](super::Attention::forward_sequences_cached) takes them as they are, of any
    /// lengths.)
    ///
    /// # Errors
    /// No caches, empty ones, some of different layers or lengths.
    pub fn cat<C: Borrow<Self>>(caches: &[C]) -> Result<Self> {
        let function = "Cache::cat";
        let Some(first) = caches.first().map(Borrow::borrow) else {
            return Err(Error::Value {
                function,
                argument: "caches",
                got: "empty".into(),
                needs: "at least one cache".into(),
            }
            .into());
        };
        let caches: Vec<&Self> = caches.iter().map(Borrow::borrow).collect();
        let check = |holds, got: String, needs: &str| ensure_value(holds, function, "caches", got, needs);
        for cache in &caches {
            let is_alike = (&cache.config, cache.dtype, cache.redraws) == (&first.config, first.dtype, first.redraws);
            let [got, needs] = [cache, first].map(|cache| format!("of a {} layer", cache.config.mechanism.name()));
            check(
                is_alike,
                format!("{got}, {:?}", cache.config),
                &format!("those of one layer, {needs}, {:?}", first.config),
            )?;
            let (len, needs) = (cache.position, format!("as many as in the first, {}", first.position));
            check(len == first.position, format!("of {len} tokens"), &needs)?;
            check(len > 0, "empty".into(), "caches that have seen tokens")?;
        }
        let rows = |of: fn(&Contents) -> Option<&Rows>| {
            Rows::cat(&caches.iter().filter_map(|cache| of(&cache.contents)).collect::<Vec<_>>())
        };
        let sums = |of: fn(&Contents) -> Option<&LinearState>| -> Result<Option<LinearState>> {
            let states: Vec<_> = caches.iter().filter_map(|cache| of(&cache.contents)).cloned().collect();
            if states.is_empty() { Ok(None) } else { LinearState::cat(&states).map(Some) }
        };
        let contents = match &first.contents {
            Contents::Rows(_) => Contents::Rows(rows(Contents::rows)?),
            Contents::Sums(_) => Contents::Sums(sums(Contents::sums)?),
            Contents::Chunk(..) => Contents::Chunk(rows(Contents::rows)?, sums(Contents::sums)?),
            Contents::Recurrent(_) => {
                let all: Vec<_> = caches.iter().filter_map(|cache| cache.contents.recurrence()).collect();
                Contents::Recurrent(Recurrence::cat(&all)?)
            }
        };
        let batch = caches.iter().filter_map(|cache| cache.batch).sum();
        Ok(Self { contents, batch: Some(batch), ..first.clone() })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.contents = Contents::new(&self.config.mechanism);
        (self.position, self.batch) = (0, None);
    }

    /// Makes sequence `rows[b]` of the batch sequence b: for beam search, or to drop and repeat sequences. The batch
    /// becomes as large as the list.
    ///
    /// # Errors
    /// An empty cache or list, a number that is not of the batch.
    pub fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        let function = "Cache::reorder";
        let batch = self.batch.unwrap_or(0);
        ensure_value(batch > 0, function, "self", "empty", "a cache that has seen tokens")?;
        ensure_value(!rows.is_empty(), function, "rows", "empty", "at least one sequence")?;
        let bad = rows.iter().find(|row| **row >= batch);
        ensure_value(
            bad.is_none(),
            function,
            "rows",
            format!("{rows:?}"),
            &format!("numbers below the batch of {batch}"),
        )?;
        let indices = Tensor::from_vec(rows.iter().map(|row| *row as u32).collect(), rows.len(), &self.device)?;
        let select = |tensor: &Tensor| tensor.index_select(&indices, 0);
        let sums = |state: &mut Option<LinearState>| -> Result<()> {
            if let Some(old) = state {
                let stabilizer = old.stabilizer().map(select).transpose()?;
                *state = Some(LinearState::new(select(old.s())?, select(old.z())?, stabilizer, old.position()));
            }
            Ok(())
        };
        match &mut self.contents {
            Contents::Rows(rows) => rows.reorder(&indices)?,
            Contents::Sums(state) => sums(state)?,
            Contents::Chunk(rows, state) => {
                rows.reorder(&indices)?;
                sums(state)?;
            }
            Contents::Recurrent(recurrence) => {
                *recurrence = recurrence.as_ref().map(|one| one.reordered(&indices)).transpose()?;
            }
        }
        self.batch = Some(rows.len());
        Ok(())
    }

    /// Forgets all tokens but the first `len`: to take back tokens that were tried.
    ///
    /// Softmax and GAU take back any number. With a window, in blocks and in chunks older keys are gone: as far back as
    /// those that are kept reach. Sums over the past cannot be taken back at all (but to nothing): keep a clone of the
    /// cache instead, it is small.
    ///
    /// # Errors
    /// More tokens than seen; tokens that cannot be taken back.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let function = "Cache::truncate";
        let seen = self.position;
        ensure_value(len <= seen, function, "len", len, &format!("at most the {seen} tokens seen"))?;
        if len == 0 {
            self.clear();
        }
        let count = self.position - len;
        let refuse = |needs: String| ensure_value(count == 0, function, "len", len, &needs);
        match &mut self.contents {
            Contents::Sums(_) | Contents::Recurrent(_) => {
                let kind = self.config.mechanism.name();
                refuse(format!("0 or {seen}: sums of {kind} attention cannot be taken back; keep a clone"))?;
            }
            Contents::Rows(rows) => {
                let held_from = seen - rows.len();
                let mut possible = held_from..=seen;
                if needed_from(&self.config, len) < held_from {
                    let first = possible.find(|len| needed_from(&self.config, *len) >= held_from).unwrap_or(seen);
                    refuse(format!("{}: keys before token {held_from} are gone", zero_or(first, seen)))?;
                }
                rows.drop_last(count);
            }
            Contents::Chunk(rows, _) => {
                let first = seen - rows.len();
                if len < first {
                    refuse(format!("{}: the chunks before are summed up; keep a clone", zero_or(first, seen)))?;
                }
                rows.drop_last(count);
            }
        }
        self.position = len;
        Ok(())
    }

    /// Writes the cache to a safetensors file, with the configuration of its layer.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        save(std::slice::from_ref(self), path.as_ref())
    }

    /// Replaces the contents by those of a file, which a cache of a layer of the same configuration and dtype wrote.
    ///
    /// # Errors
    /// Those of the file system; a file that is not of a cache, or of a cache of another configuration.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        load(std::slice::from_mut(self), path.as_ref())
    }
}

/// The lengths that a cache can go back to, in words.
fn zero_or(first: usize, last: usize) -> String {
    if first == last { format!("0 or all {last}") } else { format!("0 or {first} to {last}") }
}

/// The first token whose key the token at `position` sees.
fn needed_from(config: &AttentionConfig, position: usize) -> usize {
    position - kept_rows(config, position).unwrap_or(position)
}

/// How many of the rows before `position` are still needed there; all without an answer.
pub(super) fn kept_rows(config: &AttentionConfig, position: usize) -> Option<usize> {
    match config.mechanism {
        Mechanism::Softmax { window: Some(window), .. } => Some((window - 1).min(position)),
        Mechanism::Diag { block, .. } => Some(position % block),
        _ => None,
    }
}
