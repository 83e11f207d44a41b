//! Gated attention units: squared-ReLU attention and the mixed chunk attention of FLASH.
//! Hua et al. 2022, "Transformer Quality in Linear Time".

use crate::Result;
use crate::linear::FeatureMap;
use crate::problem::{
    Linear, LinearFinish, LinearShapes, Map, Mask, Operand, PerKey, Quadratic, QuadraticFinish, QuadraticShapes, Scan,
    Sequences, Weight, ensure_value,
};

/// How the squared-ReLU weights of [`GauOptions`] are scaled; n is the number of keys, less those of the batch entry that
/// the key mask removes, s = D the key width, x_ij = ⟨q_i, k_j⟩. Scaling happens before squaring, in f32 (f64 for f64 inputs).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(
    feature = "candle",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case", deny_unknown_fields)
)]
pub enum GauNorm {
    /// relu²(x/n + b), the paper's. The weight of a pair changes with n, so a prefix is not a prefix of the whole.
    #[default]
    Length,
    /// relu²(x + b)/(n·s).
    LengthWidth,
    /// relu²(x/√s + b) divided by its sum over the visible keys plus ε.
    RowSum {
        /// ε ≥ 0, added to the sum.
        epsilon: f64,
    },
    /// relu²(x/n₀ + b): independent of the current length.
    Fixed {
        /// n₀ > 0.
        length: f64,
    },
}

/// Choices of `gau_attention`: o_i = Σ_j a_ij v_j with the weights a of [`GauNorm`].
/// The gate U ⊙ (·) and the output projection are the caller's.
#[derive(Debug, Clone)]
pub struct GauOptions<T> {
    /// Which keys a query sees. Default: all.
    pub mask: Mask,
    /// Scaling of the weights. Default [`GauNorm::Length`].
    pub norm: GauNorm,
    /// `[B, M]` of u8: 0 removes the key for every query. Default: none.
    pub key_mask: Option<T>,
    /// `[1 or H, 2R + 1]`, as in [`SoftmaxOptions`](crate::softmax::SoftmaxOptions::bias). Default: none.
    pub bias: Option<T>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for GauOptions<T> {
    fn default() -> Self {
        Self { mask: Mask::Full, norm: GauNorm::Length, key_mask: None, bias: None, sequences: None }
    }
}

impl<T: Operand> GauOptions<T> {
    /// Checks the operands and describes the computation for an engine.
    pub fn problem(&self, function: &'static str, q: &T, k: &T, v: &T) -> Result<Quadratic> {
        let shapes = QuadraticShapes::new(
            function,
            [q, k, v],
            self.key_mask.as_ref(),
            self.bias.as_ref(),
            self.sequences.as_ref(),
        )?;
        if let GauNorm::Fixed { length } = self.norm {
            ensure_value(length.is_finite() && length > 0.0, function, "length", length, "a finite number above 0")?;
        }
        let s = shapes.width as f64;
        let (scale, finish, per_key) = match self.norm {
            GauNorm::Length => (1.0, QuadraticFinish::None, PerKey::Scores),
            GauNorm::LengthWidth => (1.0, QuadraticFinish::Scale(1.0 / s), PerKey::Sums),
            GauNorm::RowSum { epsilon } => (1.0 / s.sqrt(), QuadraticFinish::RowSum { epsilon }, PerKey::Nothing),
            GauNorm::Fixed { length } => (1.0 / length, QuadraticFinish::None, PerKey::Nothing),
        };
        let problem = Quadratic::new(function, shapes, Weight::ReluSquared, self.mask, scale, None, finish)?;
        Ok(problem.per_key(per_key))
    }
}

/// How the global branch of causal [`MixedChunkOptions`] is scaled in chunk g = 1, 2, …; n is the number of keys of this
/// call, less those of the batch entry that the key mask removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "candle", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum GlobalNorm {
    /// 1/((g − 1)·C), the mean over the positions of the finished chunks, masked ones included (1/n when not causal).
    #[default]
    Mean,
    /// 1/C.
    Chunk,
    /// 1/n.
    Length,
}

/// Choices of `mixed_chunk_attention`: with chunks of C positions,
///
/// ```text
/// local_i  = Σ_j relu²(c ⟨q_i, k_j⟩ + bias[j − p]) v_j           j in the chunk of i, and j ≤ i when causal
/// global_i = norm_g · q'_i Σ_{chunks h < g} K'_hᵀ V_h             causal, i in chunk g
/// global_i = norm   · q'_i Σ_{all chunks}  K'_hᵀ V_h              not causal
/// o_i      = local_i + global_i
/// ```
#[derive(Debug, Clone)]
pub struct MixedChunkOptions<T> {
    /// C. Default 256.
    pub chunk_size: usize,
    /// Whether a query sees only keys up to itself. Default: no.
    pub causal: bool,
    /// c; `None` is 1/C.
    pub scale: Option<f64>,
    /// Scaling of the global branch. Default [`GlobalNorm::Mean`].
    pub global_norm: GlobalNorm,
    /// `[B, M]` of u8: 0 removes the key from both branches. Default: none.
    pub key_mask: Option<T>,
    /// `[1 or H, 2R + 1]` with R ≥ C − 1, for the local branch. Default: none.
    pub bias: Option<T>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for MixedChunkOptions<T> {
    fn default() -> Self {
        Self {
            chunk_size: 256,
            causal: false,
            scale: None,
            global_norm: GlobalNorm::Mean,
            key_mask: None,
            bias: None,
            sequences: None,
        }
    }
}

impl<T: Operand> MixedChunkOptions<T> {
    /// Checks the operands of the local branch and describes it for the quadratic engine.
    pub fn local_problem(&self, function: &'static str, q: &T, k: &T, v: &T) -> Result<Quadratic> {
        let shapes = QuadraticShapes::new(
            function,
            [q, k, v],
            self.key_mask.as_ref(),
            self.bias.as_ref(),
            self.sequences.as_ref(),
        )?;
        ensure_value(self.chunk_size > 0, function, "chunk_size", self.chunk_size, "at least 1")?;
        let scale = self.scale.unwrap_or(1.0 / self.chunk_size as f64);
        let mask = Mask::Blocks { size: self.chunk_size, causal: self.causal };
        Quadratic::new(function, shapes, Weight::ReluSquared, mask, scale, None, QuadraticFinish::None)
    }

    /// Checks the operands of the global branch and describes it for the linear engine.
    pub fn global_problem(&self, function: &'static str, q: &T, k: &T, v: &T) -> Result<Linear> {
        let chunk = self.chunk_size;
        let scan = if self.causal { Scan::ChunkExclusive { chunk } } else { Scan::Full };
        let shapes =
            LinearShapes::new(function, scan, [q, k, v], self.key_mask.as_ref(), None, self.sequences.as_ref())?;
        let finish = LinearFinish::ChunkNorm { norm: self.global_norm, chunk };
        Linear::new(function, shapes, Map::Plain(FeatureMap::Identity), scan, finish)
    }
}
