use std::ops::Range;

use super::ensure_value;
use crate::Result;

/// Which keys a query may see. Query i of N stands at position p = i + M − N among M keys
/// (the last query at the last key).
///
/// A pair that the mask hides has weight 0, and keys before the first and behind the last that any query sees are not read;
/// tiles of pairs that are all hidden are not computed. Keys and values that are hidden from
/// some queries but not from all must be finite: 0 times NaN or ∞ is NaN, which neighbours of a query that sees them may
/// get. (What a key mask removes is never read.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mask {
    /// Every key.
    #[default]
    Full,
    /// Keys j ≤ p.
    Causal,
    /// Keys p − left ≤ j ≤ p + right; `None` is unlimited.
    Window {
        /// Keys before p.
        left: Option<usize>,
        /// Keys after p.
        right: Option<usize>,
    },
    /// Keys of the block of p: ⌊j/size⌋ = ⌊p/size⌋, and j ≤ p when `causal`.
    Blocks {
        /// Positions in a block, at least 1.
        size: usize,
        /// Whether keys after p are hidden.
        causal: bool,
    },
    /// Keys j ≤ p that are among the first ones, j < sinks, or near, p − left ≤ j (StreamingLLM, Xiao et al. 2024).
    Streaming {
        /// Keys that every later query sees.
        sinks: usize,
        /// Keys before p.
        left: usize,
    },
    /// Keys j < len, and those with j ≤ p (prefix language models, Raffel et al. 2020).
    Prefix {
        /// Keys that every query sees.
        len: usize,
    },
    /// Keys j ≤ p that are near, p − left ≤ j, or a multiple of the stride away, (p − j) mod stride = 0 (the strided pattern of
    /// Sparse Transformers, Child et al. 2019, which has left = stride).
    Strided {
        /// Keys before p.
        left: usize,
        /// At least 1.
        stride: usize,
    },
    /// Keys j ≤ p of the block of p, ⌊j/size⌋ = ⌊p/size⌋, or among the last ones of any block, j mod size ≥ size − summary
    /// (the fixed pattern of Sparse Transformers, Child et al. 2019).
    Fixed {
        /// Positions in a block, at least 1.
        size: usize,
        /// The last of each block that all later queries see, from 1 to size.
        summary: usize,
    },
    /// Every dilation-th key around p: (j − p) mod dilation = 0 and p − left·dilation ≤ j ≤ p + right·dilation (the dilated
    /// window of Longformer, Beltagy et al. 2020).
    Dilated {
        /// Keys before p that are seen.
        left: usize,
        /// Keys after p that are seen.
        right: usize,
        /// At least 1.
        dilation: usize,
    },
}

impl Mask {
    /// The keys that a query at `position` sees, out of `keys`, and with some masks those between them: see [`Mask::sees`]. Both
    /// ends grow with the position.
    pub fn visible(self, position: i64, keys: usize) -> Range<usize> {
        let clip = |j: i64| j.clamp(0, keys as i64) as usize;
        let past = |left: usize| position.saturating_sub_unsigned(left as u64);
        let after = |right: usize| position.saturating_add_unsigned(right as u64).saturating_add(1);
        let (low, high) = match self {
            Self::Full => (0, keys),
            Self::Causal | Self::Streaming { .. } | Self::Strided { .. } | Self::Fixed { .. } => (0, clip(after(0))),
            Self::Prefix { len } => (0, clip(after(0)).max(len.min(keys))),
            Self::Window { left, right } => {
                (left.map_or(0, |left| clip(past(left))), right.map_or(keys, |right| clip(after(right))))
            }
            Self::Dilated { left, right, dilation } => {
                (clip(past(left.saturating_mul(dilation))), clip(after(right.saturating_mul(dilation))))
            }
            Self::Blocks { size, causal } => {
                let start = block_start(position, size);
                let end = if causal { after(0) } else { start.saturating_add_unsigned(size as u64) };
                (clip(start), clip(end))
            }
        };
        low..high.max(low)
    }

    /// Whether a query at `position` sees `key`.
    pub fn sees(self, position: i64, key: usize) -> bool {
        let (position, key) = (i128::from(position), key as i128);
        let distance = position - key;
        match self {
            Self::Full => true,
            Self::Causal => distance >= 0,
            Self::Window { left, right } => {
                left.is_none_or(|left| distance <= left as i128) && right.is_none_or(|right| -distance <= right as i128)
            }
            Self::Blocks { size, causal } => {
                let block = |at: i128| at.div_euclid(size as i128);
                block(key) == block(position) && (!causal || distance >= 0)
            }
            Self::Streaming { sinks, left } => distance >= 0 && (key < sinks as i128 || distance <= left as i128),
            Self::Prefix { len } => key < len as i128 || distance >= 0,
            Self::Strided { left, stride } => {
                distance >= 0 && (distance <= left as i128 || distance % stride as i128 == 0)
            }
            Self::Fixed { size, summary } => {
                let (size, summary) = (size as i128, summary as i128);
                distance >= 0 && (key / size == position / size || key % size >= size - summary)
            }
            Self::Dilated { left, right, dilation } => {
                let steps = distance.div_euclid(dilation as i128);
                steps * dilation as i128 == distance && (-(right as i128)..=left as i128).contains(&steps)
            }
        }
    }

    /// Whether a query may not see a key between others that it sees.
    pub fn has_gaps(self) -> bool {
        match self {
            Self::Full | Self::Causal | Self::Window { .. } | Self::Blocks { .. } | Self::Prefix { .. } => false,
            Self::Streaming { .. } | Self::Strided { .. } | Self::Fixed { .. } | Self::Dilated { .. } => true,
        }
    }

    /// Runs of those of the keys that a query at `position` sees, in order.
    pub(crate) fn runs(self, position: i64, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let visible = self.visible(position, keys.end);
        let mut next = visible.start.max(keys.start);
        std::iter::from_fn(move || {
            let run = self.run(position, next..visible.end)?;
            next = run.end;
            Some(run)
        })
    }

    /// The first run of keys inside what [`Mask::visible`] says.
    fn run(self, position: i64, keys: Range<usize>) -> Option<Range<usize>> {
        let (from, end) = (keys.start, keys.end);
        if keys.is_empty() {
            return None;
        }
        let before = |distance: usize| usize::try_from(position.saturating_sub_unsigned(distance as u64)).unwrap_or(0);
        let (start, stop) = match self {
            Self::Streaming { sinks, left } => match before(left) {
                near if from >= near || sinks >= near => (from, end),
                _ if from < sinks => (from, sinks),
                near => (near, end),
            },
            Self::Strided { left, stride } => {
                let near = before(left);
                let step = from + (position as usize - from) % stride;
                match from.max(near.min(step)) {
                    start if start >= near || stride == 1 => (start, end),
                    start => (start, start + 1),
                }
            }
            Self::Fixed { size, summary } => {
                let own = position as usize / size * size;
                let block = from / size * size;
                match from.max(block + (size - summary)) {
                    _ if from >= own || summary == size => (from, end),
                    start => (start, block + size),
                }
            }
            Self::Dilated { dilation, .. } => {
                let size = dilation.min(i64::MAX as usize) as i64;
                let step = position.saturating_sub_unsigned(from as u64).rem_euclid(size) as usize;
                let start = from.saturating_add(step);
                (start, if dilation == 1 { end } else { start.saturating_add(1) })
            }
            _ => (from, end),
        };
        (start < end).then(|| start..stop.min(end))
    }

    /// Refuses sizes that no mask has.
    pub(super) fn check(self, function: &'static str) -> Result<()> {
        match self {
            Self::Blocks { size, .. } => ensure_value(size > 0, function, "block size", size, "at least 1"),
            Self::Strided { stride, .. } => ensure_value(stride > 0, function, "stride", stride, "at least 1"),
            Self::Fixed { size, summary } => {
                ensure_value(size > 0, function, "block size", size, "at least 1")?;
                let needs = format!("from 1 to {size}, the block size");
                ensure_value((1..=size).contains(&summary), function, "summary", summary, &needs)
            }
            Self::Dilated { dilation, .. } => ensure_value(dilation > 0, function, "dilation", dilation, "at least 1"),
            _ => Ok(()),
        }
    }

    /// The largest |j − p| over visible pairs, or an upper bound of it.
    pub fn reach(self, queries: usize, keys: usize) -> usize {
        let past = keys.saturating_sub(1);
        let future = queries.max(keys).saturating_sub(1);
        match self {
            Self::Full | Self::Prefix { .. } => future,
            Self::Causal | Self::Streaming { .. } | Self::Strided { .. } | Self::Fixed { .. } => past,
            Self::Window { left, right } => {
                left.map_or(past, |left| left.min(past)).max(right.map_or(future, |right| right.min(future)))
            }
            Self::Dilated { left, right, dilation } => {
                left.saturating_mul(dilation).min(past).max(right.saturating_mul(dilation).min(future))
            }
            Self::Blocks { size, .. } => size.saturating_sub(1).min(past),
        }
    }
}

/// The first position of a block.
fn block_start(position: i64, size: usize) -> i64 {
    let size = size.min(i64::MAX as usize) as i64;
    position.div_euclid(size).saturating_mul(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_ranges() {
        let window = Mask::Window { left: Some(2), right: Some(1) };
        assert_eq!(Mask::Full.visible(-3, 5), 0..5);
        assert_eq!(Mask::Causal.visible(-1, 5), 0..0);
        assert_eq!(Mask::Causal.visible(2, 5), 0..3);
        assert_eq!(window.visible(3, 5), 1..5);
        assert_eq!(window.visible(-2, 5), 0..0);
        assert_eq!(Mask::Blocks { size: 4, causal: false }.visible(5, 6), 4..6);
        assert_eq!(Mask::Blocks { size: 4, causal: true }.visible(5, 9), 4..6);
        assert_eq!(Mask::Blocks { size: 4, causal: false }.visible(-1, 9), 0..0);
        assert_eq!(Mask::Blocks { size: usize::MAX, causal: false }.visible(3, 9), 0..9);
        assert_eq!(Mask::Window { left: Some(usize::MAX), right: Some(usize::MAX) }.visible(3, 9), 0..9);
    }

    const MASKS: [Mask; 21] = [
        Mask::Full,
        Mask::Causal,
        Mask::Window { left: Some(3), right: Some(1) },
        Mask::Window { left: None, right: Some(0) },
        Mask::Blocks { size: 4, causal: false },
        Mask::Blocks { size: 4, causal: true },
        Mask::Streaming { sinks: 2, left: 3 },
        Mask::Streaming { sinks: 0, left: 0 },
        Mask::Streaming { sinks: usize::MAX, left: 1 },
        Mask::Prefix { len: 3 },
        Mask::Prefix { len: usize::MAX },
        Mask::Strided { left: 2, stride: 4 },
        Mask::Strided { left: 0, stride: 1 },
        Mask::Strided { left: usize::MAX, stride: usize::MAX },
        Mask::Fixed { size: 4, summary: 1 },
        Mask::Fixed { size: 3, summary: 3 },
        Mask::Fixed { size: usize::MAX, summary: 2 },
        Mask::Dilated { left: 2, right: 1, dilation: 3 },
        Mask::Dilated { left: 4, right: 0, dilation: 1 },
        Mask::Dilated { left: 0, right: usize::MAX, dilation: 2 },
        Mask::Dilated { left: usize::MAX, right: 0, dilation: usize::MAX },
    ];

    #[test]
    fn runs_are_what_is_seen() {
        for mask in MASKS {
            let mut before = 0..0;
            for (position, keys) in [(4, 0), (4, 1)].into_iter().chain((-9..30).map(|position| (position, 17))) {
                let seen: Vec<usize> = (0..keys).filter(|&j| mask.sees(position, j)).collect();
                let runs: Vec<_> = mask.runs(position, 0..keys).collect();
                assert!(runs.iter().all(|run| !run.is_empty()), "{mask:?} {position}: {runs:?}");
                assert_eq!(runs.into_iter().flatten().collect::<Vec<_>>(), seen, "{mask:?} at {position}");
                for low in 0..keys {
                    let part: Vec<_> = mask.runs(position, low..keys.min(low + 5)).flatten().collect();
                    let own = seen.iter().copied().filter(|j| (low..low + 5).contains(j));
                    assert_eq!(part, own.collect::<Vec<_>>(), "{mask:?} at {position} from {low}");
                }
                let visible = mask.visible(position, keys);
                assert!(seen.iter().all(|j| visible.contains(j)), "{mask:?} at {position}: {visible:?}");
                assert!(mask.has_gaps() || visible.len() == seen.len(), "{mask:?} at {position}: {visible:?}");
                if keys == 17 {
                    assert!(visible.start >= before.start && visible.end >= before.end, "{mask:?} at {position}");
                    before = visible;
                }
            }
        }
    }

    #[test]
    fn reach_bounds_every_visible_distance() {
        for mask in MASKS {
            for (queries, keys) in [(7, 7), (3, 9), (9, 3), (1, 5), (5, 1)] {
                let reach = mask.reach(queries, keys) as i64;
                for i in 0..queries {
                    let position = i as i64 + keys as i64 - queries as i64;
                    for j in (0..keys).filter(|&j| mask.sees(position, j)) {
                        assert!((j as i64 - position).abs() <= reach, "{mask:?} {queries}×{keys}");
                    }
                }
            }
        }
    }
}
