use std::borrow::Borrow;
use std::path::Path;

use candle_core::Result;

use super::Cache;
use super::file::{load, save};
use crate::problem::ensure_value;

/// The [caches](Cache) of all layers of a [`LanguageModel`](crate::nn::LanguageModel), which agree about the tokens seen.
#[derive(Debug, Clone)]
pub struct ModelCache {
    layers: Vec<Cache>,
}

impl ModelCache {
    pub(in crate::candle::nn) fn new(layers: Vec<Cache>) -> Self {
        Self { layers }
    }

    pub(in crate::candle::nn) fn layers_mut(&mut self) -> &mut [Cache] {
        &mut self.layers
    }

    /// The caches of the layers.
    pub fn layers(&self) -> &[Cache] {
        &self.layers
    }

    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, Cache::len)
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that all tensors take.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Cache::bytes).sum()
    }

    /// Sequences of the batch; none before the first token.
    pub fn sequences(&self) -> Option<usize> {
        self.layers.first().and_then(Cache::sequences)
    }

    /// As [`Cache::cat`].
    ///
    /// # Errors
    /// As there; caches of different numbers of layers.
    pub fn cat<C: Borrow<Self>>(caches: &[C]) -> Result<Self> {
        let counts: Vec<_> = caches.iter().map(|cache| cache.borrow().layers.len()).collect();
        let got = format!("of {counts:?} layers");
        let needs = "at least one cache, all of as many layers";
        let is_alike = !counts.is_empty() && counts.iter().all(|count| *count == counts[0]);
        ensure_value(is_alike, "ModelCache::cat", "caches", got, needs)?;
        let layer =
            |layer: usize| Cache::cat(&caches.iter().map(|cache| &cache.borrow().layers[layer]).collect::<Vec<_>>());
        Ok(Self { layers: (0..counts[0]).map(layer).collect::<Result<_>>()? })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.layers.iter_mut().for_each(Cache::clear);
    }

    /// As [`Cache::reorder`].
    ///
    /// # Errors
    /// As there.
    pub fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        self.layers.iter_mut().try_for_each(|cache| cache.reorder(rows))
    }

    /// As [`Cache::truncate`]; if one layer refuses, none is changed.
    ///
    /// # Errors
    /// As there.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let mut layers = self.layers.clone();
        layers.iter_mut().try_for_each(|cache| cache.truncate(len))?;
        self.layers = layers;
        Ok(())
    }

    /// As [`Cache::save`], all layers in one file.
    ///
    /// # Errors
    /// As there.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        save(&self.layers, path.as_ref())
    }

    /// As [`Cache::load`].
    ///
    /// # Errors
    /// As there.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        load(&mut self.layers, path.as_ref())
    }
}
