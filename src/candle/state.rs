use candle_core::{Result, Tensor};

use crate::problem::ensure_value;

/// The sums that linear attention carries from one piece of a sequence to the next, with H the larger of key heads
/// and value heads, D' the width of the features, E that of the values:
///
/// ```text
/// S = Σ_t decay · φ(k_t) v_tᵀ    [B, H, D', E]
/// z = Σ_t decay · φ(k_t)         [B, H, D']
/// c                              [B, H], the running stabiliser; exponential FAVOR+ features only
/// ```
///
/// All in f32, f64 for f64 inputs, of a size that does not depend on how many tokens have been seen. A function with
/// state returns one; handing it to the same function with the next piece continues the sequence. States carry no
/// gradient: the tensors of a state returned are outside of any graph, tracked ones handed in are refused.
#[derive(Debug, Clone)]
pub struct LinearState {
    s: Tensor,
    z: Tensor,
    stabilizer: Option<Tensor>,
    position: usize,
}

impl LinearState {
    /// A state from its tensors, for one that was stored or sent elsewhere. Shapes and dtypes are checked where it is
    /// used.
    pub fn new(s: Tensor, z: Tensor, stabilizer: Option<Tensor>, position: usize) -> Self {
        Self { s, z, stabilizer, position }
    }

    /// S, `[B, H, D', E]`.
    pub fn s(&self) -> &Tensor {
        &self.s
    }

    /// z, `[B, H, D']`.
    pub fn z(&self) -> &Tensor {
        &self.z
    }

    /// c, `[B, H]`; exponential FAVOR+ features only.
    pub fn stabilizer(&self) -> Option<&Tensor> {
        self.stabilizer.as_ref()
    }

    /// Keys seen so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes that the tensors take.
    pub fn size_in_bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.s, &self.z].into_iter().chain(&self.stabilizer)
    }
}

/// Refuses forms with state that are not causal: there the first piece would have to read the last one.
pub(super) fn ensure_causal(function: &'static str, causal: bool) -> Result<()> {
    Ok(ensure_value(causal, function, "causal", causal, "`true` to carry a state")?)
}

/// Refuses a state that ends inside a chunk.
pub(super) fn ensure_whole_chunks(function: &'static str, state: Option<&LinearState>, chunk: usize) -> Result<()> {
    let position = state.map_or(0, LinearState::position);
    let got = format!("at position {position}");
    let needs = format!("a position at the end of a chunk of {chunk}");
    Ok(ensure_value(position.is_multiple_of(chunk.max(1)), function, "state", got, &needs)?)
}
