//! Language models that go on from caches.

use std::borrow::BorrowMut;
use std::ops::Range;

use candle_core::{Result, Tensor};

use super::batch::packed_tokens;
use super::cache::{Cache, ModelCache};
use super::first_values::FirstValues;
use super::generate::{Generation, generate};
use super::model::LanguageModel;
use super::pieces::{Piece, cut};
use super::projection::Products;
use super::running::{Request, RunningBatch};
use super::sampler::Sampler;
use crate::candle::packing::Packing;
use crate::problem::ensure_value;
use crate::{Result as CoreResult, Sequences};

/// Rows that pass through the blocks at a time, so that what is between operations stays in the cache.
const GROUP: usize = 256;

impl LanguageModel {
    /// An empty cache for decoding.
    ///
    /// # Errors
    /// A model that is not causal.
    pub fn cache(&self) -> Result<ModelCache> {
        let layers = self.body.blocks.iter().map(|block| block.attention.cache());
        Ok(ModelCache::new(layers.collect::<Result<_>>()?))
    }

    /// The logits `[B, N, vocabulary]` after each of the next tokens of the sequences in the cache, which takes them
    /// in; see [`Attention::forward_cached`](super::Attention::forward_cached).
    ///
    /// # Errors
    /// As [`Self::forward_masked`] and [`Attention::forward_cached`](super::Attention::forward_cached). No layer's cache is
    /// changed then.
    pub fn forward_cached(&self, tokens: &Tensor, cache: &mut ModelCache) -> Result<Tensor> {
        let rows = self.rows("LanguageModel::forward_cached", tokens, all_of(tokens, cache), Tensor::clone)?;
        self.logits(&rows, Products::Alone)
    }

    /// The logits `[1, T, vocabulary]` after each of the next tokens of sequences of any lengths, which have a cache each:
    /// `tokens` `[1, T]` are packed as `sequences` says. Every sequence gives what [`Self::forward_cached`] gives for it alone,
    /// on the CPU to the bit; see [`Attention::forward_sequences_cached`](super::Attention::forward_sequences_cached).
    ///
    /// # Errors
    /// As [`Self::forward_cached`] and
    /// [`Attention::forward_sequences_cached`](super::Attention::forward_sequences_cached). No cache is changed then.
    pub fn forward_sequences_cached<C: BorrowMut<ModelCache>>(
        &self,
        tokens: &Tensor,
        sequences: &Sequences,
        caches: &mut [C],
    ) -> Result<Tensor> {
        let function = "LanguageModel::forward_sequences_cached";
        let pieces = cut(function, packed_tokens(function, "tokens", tokens)?, sequences, caches)?;
        self.logits(&self.rows(function, tokens, pieces, Tensor::clone)?, Products::Alone)
    }

    /// The logits `[B, N, vocabulary]` after the next tokens of sequences that are padded to one length, `tokens` `[B, N]`:
    /// those whose entry of `key_mask` `[B, N]` (u8) is 0 are left out, wherever they stand, and have logits of 0; see
    /// [`Attention::forward_masked_cached`](super::Attention::forward_masked_cached).
    ///
    /// # Errors
    /// As [`Self::forward_sequences_cached`]; a mask of another shape or dtype.
    pub fn forward_masked_cached<C: BorrowMut<ModelCache>>(
        &self,
        tokens: &Tensor,
        key_mask: &Tensor,
        caches: &mut [C],
    ) -> Result<Tensor> {
        let packing = Packing::new("LanguageModel::forward_masked_cached", tokens, key_mask)?;
        packing.unpacked(&self.forward_sequences_cached(&packing.packed(tokens)?, &packing.sequences, caches)?)
    }

    /// The logits `[B, vocabulary]` after the last of the next tokens, without the head's work for those before; they carry no
    /// gradient.
    ///
    /// # Errors
    /// As [`Self::forward_cached`]; no tokens.
    pub fn next_logits(&self, tokens: &Tensor, cache: &mut ModelCache) -> Result<Tensor> {
        let (function, count) = ("LanguageModel::next_logits", tokens.dims().last().copied().unwrap_or(0));
        ensure_value(count > 0, function, "tokens", "empty", "at least one token")?;
        let rows = self.rows(function, tokens, all_of(tokens, cache), Tensor::detach)?;
        Ok(self.logits(&rows.narrow(1, count - 1, 1)?.squeeze(1)?, Products::Alone)?.detach())
    }

    /// The logits `[sequences, vocabulary]` after the last of the next tokens of each sequence, of any number from 1 on, with a
    /// cache each. Every sequence gives what [`Self::next_logits`] gives for it alone, on the CPU to the bit. They carry no
    /// gradient.
    ///
    /// # Errors
    /// As [`Self::forward_sequences_cached`]; no sequences, one without tokens.
    ///
    /// # Example
    /// ```
    /// use attn_kernels::nn::{LanguageModel, LanguageModelConfig};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let variables = VarMap::new();
    /// let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    /// let model = LanguageModel::new(&LanguageModelConfig::named("linear", 256, 32, 2, 2)?, weights)?;
    /// let mut caches = vec![model.cache()?; 2];
    /// let logits = model.next_logits_each(&[&[72, 101, 108, 108, 111][..], &[72, 105]], &mut caches)?;
    /// assert_eq!((logits.dims(), caches[0].len(), caches[1].len()), (&[2, 256][..], 5, 2));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn next_logits_each<P: AsRef<[u32]>, C: BorrowMut<ModelCache>>(
        &self,
        tokens: &[P],
        caches: &mut [C],
    ) -> Result<Tensor> {
        let function = "LanguageModel::next_logits_each";
        ensure_value(!tokens.is_empty(), function, "tokens", "of no sequence", "at least one sequence")?;
        let empty = tokens.iter().position(|tokens| tokens.as_ref().is_empty());
        let got = format!("empty in sequence {}", empty.unwrap_or(0));
        ensure_value(empty.is_none(), function, "tokens", got, "at least one token")?;
        let all: Vec<u32> = tokens.iter().flat_map(|tokens| tokens.as_ref()).copied().collect();
        let sequences = Sequences::of_lengths(tokens.iter().map(|tokens| tokens.as_ref().len() as u32));
        let (count, device) = (all.len(), self.embedding().device());
        let pieces = cut(function, count, &sequences, caches)?;
        let last: Vec<u32> = pieces.iter().map(|piece| piece.rows.end as u32 - 1).collect();
        let tokens = Tensor::from_vec(all, (1, count), device)?;
        let rows = self.rows(function, &tokens, pieces, Tensor::detach)?.squeeze(0)?;
        let rows = if last.len() == count { rows } else { rows.index_select(&Tensor::new(last, device)?, 0)? };
        Ok(self.logits(&rows, Products::Alone)?.detach())
    }

    /// Continues one sequence token by token: what the cache has seen, then `prompt`, then what the iterator returns.
    /// It does not end by itself; the last token returned is not in the cache yet.
    ///
    /// # Errors
    /// An empty prompt.
    pub fn generate<'a>(
        &'a self,
        prompt: &[u32],
        sampler: Sampler,
        cache: &'a mut ModelCache,
    ) -> Result<Generation<impl FnMut(&[u32]) -> Result<Tensor> + 'a>> {
        let device = self.embedding().device().clone();
        let next = move |tokens: &[u32]| {
            let tokens = Tensor::new(tokens, &device)?.unsqueeze(0)?;
            self.next_logits(&tokens, cache)?.squeeze(0)
        };
        generate(next, prompt, sampler)
    }

    /// Continues many sequences side by side, each as [`Self::generate`] would alone; others may join later, see
    /// [`RunningBatch`].
    ///
    /// # Errors
    /// No requests; as [`RunningBatch::add`].
    pub fn generate_each(&self, requests: impl IntoIterator<Item = Request>) -> Result<RunningBatch<'_>> {
        let mut batch = RunningBatch::new(self);
        requests.into_iter().try_for_each(|request| batch.add(request).map(|_| ()))?;
        ensure_value(!batch.is_empty(), "LanguageModel::generate_each", "requests", "empty", "at least one request")?;
        Ok(batch)
    }

    /// Refuses a cache of another model.
    pub(super) fn check_cache(&self, function: &'static str, cache: &ModelCache) -> CoreResult<()> {
        let (got, needs) = (cache.layers().len(), self.body.blocks.len());
        ensure_value(got == needs, function, "cache", format!("of {got} layers"), &format!("of {needs} layers"))?;
        let mut layers = self.body.blocks.iter().zip(cache.layers());
        layers.try_for_each(|(block, cache)| block.attention.check_cache(function, cache))
    }

    /// The rows before the head; `between` makes of a block's rows what the next one takes.
    fn rows(
        &self,
        function: &'static str,
        tokens: &Tensor,
        mut pieces: Vec<Piece<&mut ModelCache>>,
        between: fn(&Tensor) -> Tensor,
    ) -> Result<Tensor> {
        pieces.iter().try_for_each(|piece| self.check_cache(function, piece.cache))?;
        let snapshot =
            |piece: &Piece<&mut ModelCache>| -> Vec<_> { piece.cache.layers().iter().map(Cache::snapshot).collect() };
        let before: Vec<_> = pieces.iter().map(snapshot).collect();
        let rows = self.body.embedding.rows(function, tokens).map(|x| between(&x)).and_then(|x| {
            let (mut rest, mut outs) = (&mut pieces[..], Vec::new());
            while outs.is_empty() || !rest.is_empty() {
                let count = group_len(rest);
                let (group, behind) = std::mem::take(&mut rest).split_at_mut(count);
                outs.push(self.group_rows(function, &x, group, between)?);
                rest = behind;
            }
            self.body.finish(&if outs.len() == 1 { outs[0].clone() } else { Tensor::cat(&outs, 1)? })
        });
        if rows.is_err() {
            for (piece, before) in pieces.iter_mut().zip(before) {
                piece.cache.layers_mut().iter_mut().zip(before).for_each(|(cache, before)| cache.restore(before));
            }
        }
        rows
    }

    /// What the blocks make of the rows of pieces that lie one behind another in x.
    fn group_rows(
        &self,
        function: &'static str,
        x: &Tensor,
        pieces: &mut [Piece<&mut ModelCache>],
        between: fn(&Tensor) -> Tensor,
    ) -> Result<Tensor> {
        let start = pieces.first().map_or(0, |piece| piece.rows.start);
        let end = pieces.last().map_or(0, |piece| piece.rows.end);
        let places: Vec<_> = pieces.iter().map(|piece| (piece.cache.len(), piece.rows.len())).collect();
        let x = self.body.embedding.placed(function, &x.narrow(1, start, end - start)?, &places)?;
        let (mut blocks, mut first) = (self.body.blocks.iter().enumerate(), FirstValues::default());
        blocks.try_fold(x, |x, (layer, block)| {
            let pieces = pieces.iter_mut().map(|piece| {
                let (rows, cache) = (piece.rows.start - start..piece.rows.end - start, &mut *piece.cache);
                Piece { rows, cache: &mut cache.layers_mut()[layer] }
            });
            block.forward_pieces(function, &x, pieces.collect(), &mut first).map(|x| between(&x))
        })
    }
}

/// How many of the pieces have [`GROUP`] rows together, the first in any case.
fn group_len<C>(pieces: &[Piece<C>]) -> usize {
    let start = pieces.first().map_or(0, |piece| piece.rows.start);
    let fitting = pieces.iter().take_while(|piece| piece.rows.end - start <= GROUP).count();
    fitting.max(1).min(pieces.len())
}

/// All tokens `[B, N]` for one cache.
fn all_of<'c>(tokens: &Tensor, cache: &'c mut ModelCache) -> Vec<Piece<&'c mut ModelCache>> {
    let rows: Range<usize> = 0..tokens.dims().get(1).copied().unwrap_or(0);
    vec![Piece { rows, cache }]
}
