//! Performer attention with FAVOR+ random features (Choromanski et al. 2020).

use crate::Result;
use crate::problem::{Linear, LinearFinish, LinearShapes, Map, Operand, Scan, Sequences};

/// The FAVOR+ feature map, with x̃ = x/D^{1/4} and ω the m×D matrix of random directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "candle", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum FavorMap {
    /// m^{-1/2} exp(ωx̃ − ‖x̃‖²/2)
    #[default]
    Positive,
    /// (2m)^{-1/2} [exp(ωx̃ − ‖x̃‖²/2), exp(−ωx̃ − ‖x̃‖²/2)]
    Hyperbolic,
    /// m^{-1/2} relu(ωx̃) + 1e-3
    Relu,
}

impl FavorMap {
    /// κ of the ReLU features.
    pub const RELU_OFFSET: f64 = 1e-3;

    /// Width of φ(x) for m random directions.
    pub fn feature_width(self, directions: usize) -> usize {
        match self {
            Self::Hyperbolic => 2 * directions,
            _ => directions,
        }
    }

    /// Whether the features are exponentials, kept in range by a stabiliser.
    pub fn is_exponential(self) -> bool {
        self != Self::Relu
    }
}

/// Choices of `performer_attention`: linear attention on FAVOR+ features, an estimate of softmax attention,
///
/// ```text
/// o_t = φ(q_t) S_t / (⟨φ(q_t), z_t⟩ + ε)
/// ```
///
/// Exponential features are computed relative to a stabiliser: for a query the largest exponent of its row; for
/// keys c_t, the largest exponent among the keys up to t (all keys when not causal), carried with S and z. It
/// depends on the past only, cancels from the quotient (ε is added to the stabilised denominator) and receives no gradient.
///
/// At unit-variance q and k this is a poor estimate of softmax (relative error near 4 at D = 64 even with
/// m = 1024); with entries of standard deviation 0.25 the error is about 0.05 at m = 256 and falls as 1/√m.
#[derive(Debug, Clone)]
pub struct PerformerOptions<T> {
    /// The feature map. Default positive.
    pub map: FavorMap,
    /// Whether a query sees only keys up to itself. Default: no.
    pub causal: bool,
    /// ε ≥ 0, added to the stabilised denominator. Default 1e-6. A zero divisor gives 0.
    pub epsilon: f64,
    /// `[B, M]` of u8: 0 removes the key from S, z and the stabiliser. Default: none.
    pub key_mask: Option<T>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for PerformerOptions<T> {
    fn default() -> Self {
        Self { map: FavorMap::Positive, causal: false, epsilon: 1e-6, key_mask: None, sequences: None }
    }
}

impl<T: Operand> PerformerOptions<T> {
    /// Checks the operands and describes the computation for an engine; `omega` is `[m, D]`.
    pub fn problem(&self, function: &'static str, q: &T, k: &T, v: &T, omega: &T) -> Result<Linear> {
        let scan = Scan::new(self.causal);
        let shapes =
            LinearShapes::new(function, scan, [q, k, v], self.key_mask.as_ref(), None, self.sequences.as_ref())?;
        let directions = shapes.check_omega(function, omega)?;
        let map = Map::Favor { map: self.map, directions };
        Linear::new(function, shapes, map, scan, LinearFinish::Normalize { epsilon: self.epsilon })
    }
}
