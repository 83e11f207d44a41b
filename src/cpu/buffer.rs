//! Memory that starts on a cache line.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the longest vector.
const LINE: usize = 64;

/// A fixed number of elements, the first on a cache line, so that no vector of a tile lies across two lines.
pub struct Buffer<X> {
    data: Vec<X>,
    start: usize,
    len: usize,
}

impl<X: Copy + Default> Buffer<X> {
    pub fn zeros(len: usize) -> Self {
        let spare = LINE / size_of::<X>();
        let data = vec![X::default(); len + spare];
        // An offset of `usize::MAX` means that there is none.
        let start = data.as_ptr().align_offset(LINE).min(spare);
        Self { data, start, len }
    }
}

impl<X> Deref for Buffer<X> {
    type Target = [X];

    fn deref(&self) -> &[X] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<X> DerefMut for Buffer<X> {
    fn deref_mut(&mut self) -> &mut [X] {
        &mut self.data[self.start..self.start + self.len]
    }
}

impl<X: Copy + Default> Clone for Buffer<X> {
    fn clone(&self) -> Self {
        let mut clone = Self::zeros(self.len);
        clone.copy_from_slice(self);
        clone
    }

    fn clone_from(&mut self, source: &Self) {
        if self.len == source.len {
            self.copy_from_slice(source);
        } else {
            *self = source.clone();
        }
    }
}
