//! Weights that a checkpoint has beside those that are read: without them a layer is another.

use candle_core::{Error, Result};
use candle_nn::VarBuilder;

/// Refuses weights of these names, which the layer at the path of `weights` would leave out. `why` says what the
/// configuration leaves them out for, and how they are taken if they can be.
pub(super) fn ensure_absent<'a>(
    weights: &VarBuilder,
    names: impl IntoIterator<Item = &'a str>,
    why: &str,
) -> Result<()> {
    // Some sources, zeros among them, have every tensor that is asked for.
    if weights.contains_tensor("no such tensor") {
        return Ok(());
    }
    let present: Vec<String> = names
        .into_iter()
        .filter(|name| weights.contains_tensor(name))
        .map(|name| match weights.prefix().as_str() {
            "" => format!("`{name}`"),
            path => format!("`{path}.{name}`"),
        })
        .collect();
    if present.is_empty() {
        return Ok(());
    }
    let (tensors, are) = if present.len() == 1 { ("tensor", "is") } else { ("tensors", "are") };
    Err(Error::msg(format!("{tensors} {} {are} among the weights and would not be used: {why}", present.join(", "))))
}
