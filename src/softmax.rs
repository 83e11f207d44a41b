//! Softmax attention (Vaswani et al. 2017; computed online as in FlashAttention, Dao et al. 2022).

use crate::Result;
use crate::problem::{Dropout, Mask, Operand, Quadratic, QuadraticFinish, QuadraticShapes, Sequences, Weight};

/// Choices of `softmax_attention`:
///
/// ```text
/// s_ij = cap(τ ⟨q_i, k_j⟩) + bias[j − p] + b_ij,   cap(x) = c·tanh(x/c)
/// o_i  = Σ_j exp(s_ij) v_j / (e^sink + Σ_j exp(s_ij))     over the keys j that query i sees
/// L_i  = ln(e^sink + Σ_j exp(s_ij))                       the log-sum-exp
/// ```
///
/// where e^sink is 0 without sinks. [`Dropout`] is behind the softmax.
///
/// `T` is the tensor type of the layer that is called: candle's `Tensor`, or a
/// [`View`](crate::problem::View) of a slice.
#[derive(Debug, Clone)]
pub struct SoftmaxOptions<T> {
    /// Which keys a query sees. Default: all.
    pub mask: Mask,
    /// τ; `None` is 1/√D.
    pub scale: Option<f64>,
    /// Soft-cap c > 0 on the scaled scores, applied before the bias. Default: none.
    pub soft_cap: Option<f64>,
    /// `[B, M]` of u8: 0 removes the key for every query. Default: none.
    pub key_mask: Option<T>,
    /// `[1 or H, 2R + 1]`: added to the score of a key at distance d = j − p from the query's position p, from entry `R + d`.
    /// Every visible distance must be within R. Default: none.
    pub bias: Option<T>,
    /// b, `[B, H, N, M]`, each of these sizes or 1, which stands for all: in the dtype of q or f32, added to the score of the
    /// pair, −∞ removes it; or of u8, 0 removes the pair. Read where it lies, and it has a gradient as long as it is added. NaN
    /// and +∞ make the rows NaN that see them, as in q. Not with packed sequences. Default: none.
    ///
    /// It is one option for both, as a mask of floats and a mask of 0 and 1 exclude each other: where both are wanted, the bias
    /// is −∞ where the mask is 0. A row without a pair gives 0, and −∞ as its log-sum-exp.
    pub attention_bias: Option<T>,
    /// `[H]` in the dtype of q or f32: the score of a sink for each head, one more key that every query sees, with the value 0
    /// (attention sinks of GPT-OSS, OpenAI 2025). Default: none.
    ///
    /// As a key, it counts in the log-sum-exp. So of the parts of a row that are merged by their log-sum-exp, one has the sinks,
    /// and the others have none.
    pub sinks: Option<T>,
    /// Dropout of the weights, for training. The log-sum-exp is that without it. Default: none.
    pub dropout: Option<Dropout>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for SoftmaxOptions<T> {
    fn default() -> Self {
        Self {
            mask: Mask::Full,
            scale: None,
            soft_cap: None,
            key_mask: None,
            bias: None,
            attention_bias: None,
            sinks: None,
            dropout: None,
            sequences: None,
        }
    }
}

impl<T: Operand> SoftmaxOptions<T> {
    /// Checks the operands and describes the computation for an engine.
    pub fn problem(&self, function: &'static str, q: &T, k: &T, v: &T) -> Result<Quadratic> {
        let shapes = QuadraticShapes::new(
            function,
            [q, k, v],
            self.key_mask.as_ref(),
            self.bias.as_ref(),
            self.sequences.as_ref(),
        )?;
        let shapes = shapes.with_attention_bias(function, self.attention_bias.as_ref())?;
        let shapes = shapes.with_sinks(function, self.sinks.as_ref())?;
        let scale = self.scale.unwrap_or(1.0 / (shapes.width as f64).sqrt());
        let (weight, finish) = (Weight::Softmax, QuadraticFinish::None);
        Quadratic::new(function, shapes, weight, self.mask, scale, self.soft_cap, finish)?.with_dropout(self.dropout)
    }
}
