use std::ops::Range;
use std::sync::Arc;

use super::{Operand, ensure_shape, ensure_value};
use crate::Result;

/// Where sequences lie that are packed one behind another into a single batch entry: sequence s has the tokens from offset
/// s up to offset s + 1 (`cu_seqlens` of other programs). No token sees another sequence; masks, blocks, chunks, positions,
/// decays and states are each sequence's own, as if it were computed alone.
///
/// ```
/// use attn_kernels::Sequences;
///
/// // Three sequences of 5, 0 and 7 tokens.
/// let sequences = Sequences::new(&[0, 5, 5, 12]);
/// assert_eq!(sequences, Sequences::of_lengths([5, 0, 7]));
/// assert_eq!(sequences.count(), 3);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Sequences {
    queries: Arc<[u32]>,
    keys: Arc<[u32]>,
}

impl Sequences {
    /// Offsets of queries and keys: 0 first, never decreasing, the number of tokens last. They are checked where they are
    /// used.
    pub fn new(offsets: &[u32]) -> Self {
        let queries: Arc<[u32]> = offsets.into();
        Self { keys: queries.clone(), queries }
    }

    /// Offsets of queries and those of keys, as many of both. The last query of a sequence stands at its last key.
    pub fn with_keys(queries: &[u32], keys: &[u32]) -> Self {
        Self { queries: queries.into(), keys: keys.into() }
    }

    /// Sequences of these lengths; offsets end at `u32::MAX`.
    pub fn of_lengths(lengths: impl IntoIterator<Item = u32>) -> Self {
        let mut end = 0u32;
        let ends = lengths.into_iter().map(|length| {
            end = end.saturating_add(length);
            end
        });
        Self::new(&[0].into_iter().chain(ends).collect::<Vec<_>>())
    }

    /// How many sequences there are.
    pub fn count(&self) -> usize {
        self.queries.len().saturating_sub(1)
    }

    /// Whether each sequence has as many keys as queries.
    #[cfg(feature = "candle")]
    pub(crate) fn are_aligned(&self) -> bool {
        self.queries == self.keys
    }

    /// The tokens of each sequence, where queries and keys are the same.
    #[cfg(feature = "candle")]
    pub(crate) fn aligned(&self, function: &'static str, tokens: usize) -> Result<Vec<Range<usize>>> {
        let needs = "those of queries and keys in one";
        ensure_value(self.are_aligned(), function, "sequences", "of two kinds of offsets", needs)?;
        check_offsets(function, "token", &self.queries, tokens)?;
        Ok(self.ranges().map(|[tokens, _]| tokens).collect())
    }

    /// Queries and keys of each sequence.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = [Range<usize>; 2]> {
        let range = |ends: &[u32]| ends[0] as usize..ends[1] as usize;
        self.queries.windows(2).zip(self.keys.windows(2)).map(move |(queries, keys)| [range(queries), range(keys)])
    }

    /// Refuses offsets that do not cut these tensors.
    pub(super) fn check<T: Operand>(&self, function: &'static str, q: &T, k: &T) -> Result<()> {
        let batch = [Some(1), None, None, None];
        ensure_shape(function, "q", q, &batch, "[1, heads, queries, width]: packed sequences are one batch entry")?;
        check_offsets(function, "query", &self.queries, q.dims()[2])?;
        check_offsets(function, "key", &self.keys, k.dims()[2])?;
        let got = format!("of {} query and {} key offsets", self.queries.len(), self.keys.len());
        ensure_value(self.queries.len() == self.keys.len(), function, "sequences", got, "as many of both")
    }
}

fn check_offsets(function: &'static str, of: &str, offsets: &[u32], tokens: usize) -> Result<()> {
    let check = |holds, got: String, needs: &str| ensure_value(holds, function, "sequences", got, needs);
    let (Some(&first), Some(&last)) = (offsets.first(), offsets.last()) else {
        return check(false, format!("of no {of} offsets"), "0 and the end of each");
    };
    check(first == 0, format!("of {of} offsets that begin with {first}"), "offsets that begin with 0")?;
    if let Some(ends) = offsets.windows(2).find(|ends| ends[0] > ends[1]) {
        let (before, after) = (ends[0], ends[1]);
        return check(false, format!("of {of} offsets that fall from {before} to {after}"), "offsets that never fall");
    }
    let needs = format!("offsets that end with {tokens}, the number of tokens");
    check(last as usize == tokens, format!("of {of} offsets that end with {last}"), &needs)
}
