//! Where results go, head by head.

use crate::problem::SliceMut;

/// Room for the rows of every head; only those of one head lie together.
pub struct Rooms<'o>(Vec<SliceMut<'o>>);

impl<'o> Rooms<'o> {
    /// The heads of `all`, one behind another.
    pub fn of(mut all: SliceMut<'o>, heads: usize) -> Self {
        let len = all.len() / heads.max(1);
        Self((0..heads).map(|_| all.take(len)).collect())
    }

    /// Each head's rows, cut into pieces of so many elements: the rooms of each piece.
    pub fn cut(mut self, lens: impl IntoIterator<Item = usize>) -> Vec<Self> {
        lens.into_iter().map(|len| Self(self.0.iter_mut().map(|head| head.take(len)).collect())).collect()
    }

    /// Shares the heads out among so many, in order.
    pub fn share(self, among: usize) -> impl Iterator<Item = Self> {
        let each = self.0.len() / among.max(1);
        let mut heads = self.0.into_iter();
        (0..among).map(move |_| Self(heads.by_ref().take(each).collect()))
    }

    /// The next elements of a head.
    pub fn take(&mut self, head: usize, count: usize) -> SliceMut<'o> {
        self.0[head].take(count)
    }

    /// All that is left, per head.
    pub fn into_heads(self) -> Vec<SliceMut<'o>> {
        self.0
    }
}
