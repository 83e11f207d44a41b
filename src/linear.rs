//! Linear attention by prefix sums of φ(K)ᵀV (Katharopoulos et al. 2020; Shen et al. 2018), with the
//! decays of RetNet (Sun et al. 2023), Lightning Attention (Qin et al. 2024) and Mamba-2 (Dao & Gu 2024).

use crate::Result;
use crate::problem::{Linear, LinearFinish, LinearShapes, Map, Operand, Scan, Sequences};

/// φ, applied to every query and key row of width D.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "candle", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum FeatureMap {
    /// x
    Identity,
    /// elu(x) + 1: x + 1 for x ≥ 0, eˣ below; computed without cancellation.
    #[default]
    EluPlusOne,
    /// max(x, 0)
    Relu,
    /// max(x, 0)²
    ReluSquared,
    /// x·sigmoid(x)
    Silu,
    /// eˣ
    Exp,
    /// softmax over the D entries of the row
    Softmax,
    /// `[1, x, (x ⊗ x)/√2]` of width 1 + D + D²: weight 1 + s + s²/2 with s = ⟨q, k⟩.
    Taylor,
    /// `[1, x/‖x‖]` of width 1 + D: weight 1 + cos(q, k). A zero row maps to `[1, 0]`; ‖x‖ neither overflows nor
    /// underflows.
    Cosine,
}

impl FeatureMap {
    /// Width of φ(x) for x of width `width`.
    pub fn feature_width(self, width: usize) -> usize {
        match self {
            Self::Taylor => 1 + width + width * width,
            Self::Cosine => 1 + width,
            _ => width,
        }
    }
}

/// Choices of `linear_attention`:
///
/// ```text
/// S_t = e^{g_t} S_{t−1} + φ(k_t) v_tᵀ      z_t = e^{g_t} z_{t−1} + φ(k_t)
/// o_t = φ(q_t) S_t / (⟨φ(q_t), z_t⟩ + ε)   or without the divisor
/// ```
///
/// Not causal: S and z are those of the whole sequence for every query.
#[derive(Debug, Clone)]
pub struct LinearOptions<T> {
    /// φ. Default elu + 1.
    pub map: FeatureMap,
    /// Whether a query sees only keys up to itself. Default: no.
    pub causal: bool,
    /// `Some(ε)` divides by ⟨φ(q), z⟩ + ε, `None` does not divide. Default `Some(1e-6)`. A zero divisor gives 0.
    pub normalizer: Option<f64>,
    /// g ≤ 0, causal only: `[H]` per head or `[B, H, M]` per head and token, in f32 (f64 for f64 inputs),
    /// H the larger of key heads and value heads. −∞ cuts the state off, as at the start of a document: nothing from
    /// before the token is read from there on, and its g has gradient 0. Default: none.
    pub log_decay: Option<T>,
    /// `[B, M]` of u8: 0 removes the token from S and z, and from the decay: the state passes it unchanged, whatever its
    /// g, whose gradient is 0. So padding on either side leaves the state as it is without. Default: none.
    pub key_mask: Option<T>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for LinearOptions<T> {
    fn default() -> Self {
        Self {
            map: FeatureMap::EluPlusOne,
            causal: false,
            normalizer: Some(1e-6),
            log_decay: None,
            key_mask: None,
            sequences: None,
        }
    }
}

impl<T: Operand> LinearOptions<T> {
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
        let finish = match self.normalizer {
            Some(epsilon) => LinearFinish::Normalize { epsilon },
            None => LinearFinish::None,
        };
        Linear::new(function, shapes, Map::Plain(self.map), scan, finish)
    }
}
