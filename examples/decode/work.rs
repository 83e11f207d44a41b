//! Counted work of a step.

use crate::decoding::Decoding;

/// Multiplications and additions of a step, and the bytes that it moves at least: `weights` numbers once, keys and values of
/// a cache that has no room to grow once, sums read and written. (Between two chunks FLASH only reads its sums. Features,
/// norms and the choice of the token are not counted.)
pub fn of_step(decoding: &Decoding<'_>, weights: usize) -> (f64, f64) {
    let batch = decoding.tokens.elem_count();
    let (mut flops, mut bytes) = (2 * batch * weights, size_of::<f32>() * weights);
    for (block, cache) in decoding.model.blocks().iter().zip(decoding.cache.layers()) {
        let mechanism = &block.attention().config().mechanism;
        let is_rule = matches!(mechanism.name(), "deltanet" | "gated_deltanet" | "kda" | "rwkv7");
        let are_sums = matches!(mechanism.name(), "linear" | "performer" | "norm" | "retention");
        let times = if are_sums || mechanism.is_recurrent() { 2 } else { 1 };
        // A delta rule looks up what the state holds before it changes it.
        flops += (times + usize::from(is_rule)) * 2 * cache.bytes() / size_of::<f32>();
        bytes += times * cache.bytes();
    }
    (flops as f64, bytes as f64)
}
