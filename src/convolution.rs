//! Short causal convolution, every channel on its own: what stands before the recurrences of DeltaNet (Yang et al. 2024),
//! Mamba (Gu & Dao 2023) and others.

use crate::problem::Sequences;
#[cfg(feature = "candle")]
use crate::{
    Result,
    problem::{Operand, ensure_dtype, ensure_shape, ensure_value},
};

/// Choices of `causal_convolution`, with W taps w and a bias b for every channel:
///
/// ```text
/// y_t = a(b + Σ_{j<W} w_j ⊙ x_{t−W+1+j})     x before the first token: the state, or 0
/// ```
#[derive(Debug, Clone)]
pub struct ConvolutionOptions<T> {
    /// Whether a is SiLU; else y is the sum itself. Default: no.
    pub silu: bool,
    /// `[B, N]` of u8: a token whose entry is 0 is as if it were not there. Taps count the tokens that are left, so that
    /// padding may be on any side; the rows of removed tokens are 0. Read on the host. Not with `sequences`. Default: none.
    pub key_mask: Option<T>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]: each begins anew. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for ConvolutionOptions<T> {
    fn default() -> Self {
        Self { silu: false, key_mask: None, sequences: None }
    }
}

/// The sizes of a call, checked.
#[cfg(feature = "candle")]
pub(crate) struct ConvolutionShapes {
    pub channels: usize,
    pub taps: usize,
    /// Of all rows, `[B · N]`.
    pub sequences: Vec<std::ops::Range<usize>>,
}

#[cfg(feature = "candle")]
impl<T: Operand> ConvolutionOptions<T> {
    /// Checks x, weight, and what may be absent: bias and state. The key mask is another's.
    pub(crate) fn shapes(
        &self,
        function: &'static str,
        [x, weight]: [&T; 2],
        [bias, state]: [Option<&T>; 2],
    ) -> Result<ConvolutionShapes> {
        ensure_shape(function, "x", x, &[None; 3], "[batch, tokens, channels]")?;
        let dtype = x.dtype();
        if !dtype.is_float() {
            let (got, needs) = (dtype.to_string(), "f32, f64, f16 or bf16".into());
            return Err(crate::Error::DType { function, argument: "x", got, needs });
        }
        let [batch, tokens, channels] = [0, 1, 2].map(|dimension| x.dims()[dimension]);
        ensure_value(channels > 0, function, "x", format_args!("of shape {:?}", x.dims()), "at least one channel")?;
        ensure_shape(function, "weight", weight, &[Some(channels), None], "[channels of x, taps]")?;
        let taps = weight.dims()[1];
        ensure_value(taps > 0, function, "weight", format_args!("of shape {:?}", weight.dims()), "at least one tap")?;
        ensure_dtype(function, "weight", weight, dtype, "that of x")?;
        let sequences = match &self.sequences {
            None => (0..batch).map(|entry| entry * tokens..(entry + 1) * tokens).collect(),
            Some(sequences) => {
                let got = format_args!("of shape {:?}", x.dims());
                ensure_value(batch == 1, function, "x", got, "1 first: packed sequences are one batch entry")?;
                let needs = "none with packed sequences: leave the removed tokens out of them";
                ensure_value(self.key_mask.is_none(), function, "key_mask", "given", needs)?;
                sequences.aligned(function, tokens)?
            }
        };
        if let Some(bias) = bias {
            ensure_shape(function, "bias", bias, &[Some(channels)], "[channels of x]")?;
            ensure_dtype(function, "bias", bias, dtype, "that of x")?;
        }
        if let Some(state) = state {
            let dims = [sequences.len(), taps - 1, channels].map(Some);
            ensure_shape(function, "state", state, &dims, "[sequences, taps − 1, channels of x]")?;
            ensure_dtype(function, "state", state, dtype, "that of x")?;
        }
        Ok(ConvolutionShapes { channels, taps, sequences })
    }
}
