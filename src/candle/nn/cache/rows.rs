//! Rows of keys and values, appended in place.

use std::sync::Arc;

use candle_core::{Result, Tensor};

/// The rows of several tensors `[B, H, rows, width]` side by side, with room to grow at the end.
///
/// Buffers are written only past the rows in use, and not at all while a clone shares them.
#[derive(Debug, Clone, Default)]
pub struct Rows {
    /// Each [B, H, capacity, width of its own].
    buffers: Arc<Vec<Tensor>>,
    start: usize,
    len: usize,
}

impl Rows {
    /// From stored tensors.
    pub fn new(tensors: Vec<Tensor>) -> Result<Self> {
        let len = tensors.first().map_or(Ok(0), |tensor| tensor.dim(2))?;
        Ok(Self { buffers: Arc::new(tensors), start: 0, len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.elem_count() * buffer.dtype().size_in_bytes()).sum()
    }

    /// What [`append`](Self::append) and [`keep_last`](Self::keep_last) can be taken back to: unlike a clone it does not
    /// keep rows from being appended in place, since those are beyond its own. It must not be appended to while this
    /// is in use.
    pub fn snapshot(&self) -> Self {
        Self { buffers: Arc::new(self.buffers.to_vec()), start: self.start, len: self.len }
    }

    /// The rows in use, as views.
    pub fn tensors(&self) -> Result<Vec<Tensor>> {
        self.buffers.iter().map(|buffer| buffer.narrow(2, self.start, self.len)).collect()
    }

    /// Appends rows and returns all in use.
    pub fn append(&mut self, new: &[&Tensor]) -> Result<Vec<Tensor>> {
        let count = new[0].dim(2)?;
        let end = self.start + self.len + count;
        let fits =
            self.buffers.first().map_or(Ok(false), |buffer| Ok::<_, candle_core::Error>(end <= buffer.dim(2)?))?;
        if !fits || Arc::strong_count(&self.buffers) > 1 {
            // Half as much again, so that a row is copied three times at most, however many are appended.
            let rows = self.len + count;
            self.resize(new, rows + rows / 2 + 16)?;
        }
        for (buffer, new) in self.buffers.iter().zip(new) {
            if count > 0 {
                buffer.slice_set(&new.detach().contiguous()?, 2, self.start + self.len)?;
            }
        }
        self.len += count;
        self.tensors()
    }

    /// Forgets all but the last `count` rows, and room far beyond them.
    pub fn keep_last(&mut self, count: usize) -> Result<()> {
        let dropped = self.len.saturating_sub(count);
        (self.start, self.len) = (self.start + dropped, self.len - dropped);
        let capacity = self.buffers.first().map_or(Ok(0), |buffer| buffer.dim(2))?;
        if capacity > 2 * count + 64 {
            let rows = self.tensors()?;
            self.resize(&rows.iter().collect::<Vec<_>>(), self.len + count / 2 + 16)?;
        }
        Ok(())
    }

    /// Forgets the last `count` rows.
    pub fn drop_last(&mut self, count: usize) {
        self.len -= count;
    }

    /// Row `rows[b]` of the batch becomes row b.
    pub fn reorder(&mut self, rows: &Tensor) -> Result<()> {
        let select = |tensor: Tensor| tensor.contiguous()?.index_select(rows, 0);
        *self = Self::new(self.tensors()?.into_iter().map(select).collect::<Result<_>>()?)?;
        Ok(())
    }

    /// As many rows of several batches as those of one.
    pub fn cat(all: &[&Self]) -> Result<Self> {
        if all.iter().all(|rows| rows.len == 0) {
            return Ok(Self::default());
        }
        let parts: Vec<_> = all.iter().map(|rows| rows.tensors()).collect::<Result<_>>()?;
        let count = parts.first().map_or(0, Vec::len);
        let joined =
            (0..count).map(|tensor| Tensor::cat(&parts.iter().map(|part| &part[tensor]).collect::<Vec<_>>(), 0));
        Self::new(joined.collect::<Result<_>>()?)
    }

    /// Moves the rows in use to buffers of `capacity` rows like those of `like`.
    fn resize(&mut self, like: &[&Tensor], capacity: usize) -> Result<()> {
        let mut buffers = Vec::with_capacity(like.len());
        for (index, like) in like.iter().enumerate() {
            let (batch, heads, _, width) = like.dims4()?;
            let buffer = Tensor::zeros((batch, heads, capacity, width), like.dtype(), like.device())?;
            if self.len > 0 {
                let old = self.buffers[index].narrow(2, self.start, self.len)?;
                buffer.slice_set(&old.contiguous()?, 2, 0)?;
            }
            buffers.push(buffer);
        }
        (self.buffers, self.start) = (Arc::new(buffers), 0);
        Ok(())
    }
}
