//! TransNormer: attention without a denominator (NormAttention) and inside blocks (DiagAttention).
//! Qin et al. 2022, "The Devil in Linear Transformer".

use crate::Result;
use crate::linear::FeatureMap;
use crate::problem::{
    Linear, LinearFinish, LinearShapes, Map, Mask, Operand, Quadratic, QuadraticFinish, QuadraticShapes, Scan,
    Sequences, Weight,
};

/// What weighs a value in `diag_attention`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(
    feature = "candle",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case", deny_unknown_fields)
)]
pub enum DiagWeight {
    /// Softmax over the block.
    Softmax,
    /// ReLU of the scores, then an RMS norm of the output row: o = t / √(mean t² + ε).
    Relu {
        /// ε > 0 under the root.
        epsilon: f64,
    },
}

/// Choices of `diag_attention`: attention inside non-overlapping blocks of `block_size` positions;
/// the last block may be shorter.
#[derive(Debug, Clone)]
pub struct DiagOptions<T> {
    /// Positions in a block. Default 64.
    pub block_size: usize,
    /// Whether a query sees only keys up to itself. Default: no.
    pub causal: bool,
    /// Softmax or ReLU with RMS norm. Default: softmax.
    pub weight: DiagWeight,
    /// τ; `None` is 1/√D.
    pub scale: Option<f64>,
    /// `[B, M]` of u8: 0 removes the key for every query. Default: none.
    pub key_mask: Option<T>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for DiagOptions<T> {
    fn default() -> Self {
        Self {
            block_size: 64,
            causal: false,
            weight: DiagWeight::Softmax,
            scale: None,
            key_mask: None,
            sequences: None,
        }
    }
}

impl<T: Operand> DiagOptions<T> {
    /// Checks the operands and describes the computation for an engine.
    pub fn problem(&self, function: &'static str, q: &T, k: &T, v: &T) -> Result<Quadratic> {
        let shapes = QuadraticShapes::new(function, [q, k, v], self.key_mask.as_ref(), None, self.sequences.as_ref())?;
        let scale = self.scale.unwrap_or(1.0 / (shapes.width as f64).sqrt());
        let mask = Mask::Blocks { size: self.block_size, causal: self.causal };
        let (weight, finish) = match self.weight {
            DiagWeight::Softmax => (Weight::Softmax, QuadraticFinish::None),
            DiagWeight::Relu { epsilon } => (Weight::Relu, QuadraticFinish::RmsNorm { epsilon }),
        };
        Quadratic::new(function, shapes, weight, mask, scale, None, finish)
    }
}

/// Over which values the RMS norm of `norm_attention` runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "candle", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum NormScope {
    /// Over the E values of each head.
    #[default]
    Head,
    /// Over the H·E values of all heads of a token, as in the paper's code.
    AllHeads,
}

/// Choices of `norm_attention`:
///
/// ```text
/// t_i = Σ_{j ≤ i} ⟨φ(q_i), φ(k_j)⟩ v_j        (all j when not causal)
/// o_i = t_i / √(mean(t_i²) + ε)
/// ```
///
/// ε bounds the gradient (by a multiple of 1/√ε): raise it when training is unstable.
#[derive(Debug, Clone)]
pub struct NormOptions<T> {
    /// φ. Default elu + 1.
    pub map: FeatureMap,
    /// Whether a query sees only keys up to itself. Default: no.
    pub causal: bool,
    /// ε > 0 under the root. Default 1e-6.
    pub epsilon: f64,
    /// Norm per head or over all heads. Default: per head.
    pub norm: NormScope,
    /// Log-decay ≤ 0, −∞ included, as in [`LinearOptions`](crate::linear::LinearOptions). Default: none.
    pub log_decay: Option<T>,
    /// `[B, M]` of u8: 0 removes the token for every query, and from the decay. Default: none.
    pub key_mask: Option<T>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for NormOptions<T> {
    fn default() -> Self {
        Self {
            map: FeatureMap::EluPlusOne,
            causal: false,
            epsilon: 1e-6,
            norm: NormScope::Head,
            log_decay: None,
            key_mask: None,
            sequences: None,
        }
    }
}

impl<T: Operand> NormOptions<T> {
    /// Checks the operands and describes the computation for an engine.
    pub fn problem(&self, function: &'static str, q: &T, k: &T, v: &T) -> Result<Linear> {
        let scan = Scan::new(self.causal);
        let shapes = LinearShapes::new(
            function,
            scan,
            [q, k, v],
            self.key_mask.as_ref(),
            self.log_decay.as_ref(),
            self.sequences.as_ref(),
        )?;
        let finish = LinearFinish::RmsNorm { epsilon: self.epsilon, scope: self.norm };
        Linear::new(function, shapes, Map::Plain(self.map), scan, finish)
    }
}
