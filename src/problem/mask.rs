use std::ops::Range;

/// Which keys a query may see. Query i of N stands at position p = i + M − N among M keys
/// (the last query at the last key).
///
/// A pair that the mask hides has weight 0, and keys that no query sees are not read. Keys and values that are hidden from
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
}

impl Mask {
    /// The keys that a query at `position` sees, out of `keys`. Both ends grow with the position.
    pub fn visible(self, position: i64, keys: usize) -> Range<usize> {
        let clip = |j: i64| j.clamp(0, keys as i64) as usize;
        let past = |left: usize| position.saturating_sub_unsigned(left as u64);
        let after = |right: usize| position.saturating_add_unsigned(right as u64).saturating_add(1);
        let (low, high) = match self {
            Self::Full => (0, keys),
            Self::Causal => (0, clip(after(0))),
            Self::Window { left, right } => {
                (left.map_or(0, |left| clip(past(left))), right.map_or(keys, |right| clip(after(right))))
            }
            Self::Blocks { size, causal } => {
                let size = size.min(i64::MAX as usize) as i64;
                let start = position.div_euclid(size).saturating_mul(size);
                let end = if causal { after(0) } else { start.saturating_add(size) };
                (clip(start), clip(end))
            }
        };
        low..high.max(low)
    }

    /// The largest |j − p| over visible pairs, or an upper bound of it.
    pub fn reach(self, queries: usize, keys: usize) -> usize {
        let past = keys.saturating_sub(1);
        let future = queries.max(keys).saturating_sub(1);
        match self {
            Self::Full => future,
            Self::Causal => past,
            Self::Window { left, right } => {
                left.map_or(past, |left| left.min(past)).max(right.map_or(future, |right| right.min(future)))
            }
            Self::Blocks { size, .. } => size.saturating_sub(1).min(past),
        }
    }
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

    #[test]
    fn reach_bounds_every_visible_distance() {
        let masks = [
            Mask::Full,
            Mask::Causal,
            Mask::Window { left: Some(3), right: Some(1) },
            Mask::Window { left: None, right: Some(0) },
            Mask::Blocks { size: 4, causal: false },
            Mask::Blocks { size: 4, causal: true },
        ];
        for mask in masks {
            for (queries, keys) in [(7, 7), (3, 9), (9, 3), (1, 5), (5, 1)] {
                let reach = mask.reach(queries, keys) as i64;
                for i in 0..queries {
                    let position = i as i64 + keys as i64 - queries as i64;
                    for j in mask.visible(position, keys) {
                        assert!((j as i64 - position).abs() <= reach, "{mask:?} {queries}×{keys}");
                    }
                }
            }
        }
    }
}
