//! Which query sees which key, and which head reads which.

use super::Array;
use crate::problem::Mask;

/// Position of query `i` of `queries` among `keys`: the last query stands at the last key.
pub(super) fn position(i: usize, queries: usize, keys: usize) -> i128 {
    i as i128 + keys as i128 - queries as i128
}

/// Whether a query at `position` sees `key`, as far as the mask goes.
pub(super) fn is_visible(mask: Mask, position: i128, key: usize) -> bool {
    let key = key as i128;
    match mask {
        Mask::Full => true,
        Mask::Causal => key <= position,
        Mask::Window { left, right } => {
            left.is_none_or(|left| position - key <= left as i128)
                && right.is_none_or(|right| key - position <= right as i128)
        }
        Mask::Blocks { size, causal } => {
            let block = |at: i128| at.div_euclid(size as i128);
            block(key) == block(position) && (!causal || key <= position)
        }
        Mask::Streaming { sinks, left } => key <= position && (key < sinks as i128 || position - key <= left as i128),
        Mask::Prefix { len } => key < len as i128 || key <= position,
        Mask::Strided { left, stride } => {
            key <= position && (position - key <= left as i128 || (position - key) % stride as i128 == 0)
        }
        Mask::Fixed { size, summary } => {
            let (size, first) = (size as i128, size as i128 - summary as i128);
            key <= position && (key / size == position / size || key % size >= first)
        }
        Mask::Dilated { left, right, dilation } => {
            let dilation = dilation as i128;
            let (first, last) = (position - left as i128 * dilation, position + right as i128 * dilation);
            (key - position) % dilation == 0 && (first..=last).contains(&key)
        }
    }
}

/// Whether `key` of batch entry `b` is left in by the key mask `[1, 1, B, M]`.
pub(super) fn is_kept(key_mask: Option<&Array>, b: usize, key: usize) -> bool {
    key_mask.is_none_or(|mask| mask.row(0, 0, b)[key] != 0.0)
}

/// The head of an operand with `operand_heads` heads that head `h` of `heads` reads.
pub(super) fn shared_head(h: usize, heads: usize, operand_heads: usize) -> usize {
    h / (heads / operand_heads)
}
