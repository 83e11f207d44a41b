//! Linear attention with a decay per channel (GLA, Yang et al. 2023) and the delta rules (DeltaNet, Schlag et al. 2021, Yang
//! et al. 2024; Gated DeltaNet, Yang et al. 2024; Kimi Delta Attention, Kimi Team 2025; RWKV-7, Peng et al. 2025).

use crate::Result;
use crate::problem::{Delta, DeltaShapes, Operand, RankOne, Sequences};

/// Choices of `gated_linear_attention`, `delta_attention` and `generalized_delta_attention`, which are one recurrence over
/// the tokens of each head, with a state S of D × E:
///
/// ```text
/// S_t = Diag(e^{g_t}) S_{t−1} + a_t b_tᵀ S_{t−1} + k_t v_tᵀ,   o_t = S_tᵀ τ q_t
/// ```
///
/// | mechanism | g | a, b and k of the recurrence | operation |
/// | --- | --- | --- | --- |
/// | GLA, HGRN-2 | per channel | a = 0 | `gated_linear_attention` |
/// | RWKV-6 | per channel | a = 0 | `gated_linear_attention` with a bonus, scale 1 |
/// | DeltaNet | none | −β k, k, β k | `delta_attention` |
/// | Gated DeltaNet | per head and token | −β k, e^g k, β k | `delta_attention` |
/// | Kimi Delta Attention | per channel | −β k, e^g ⊙ k, β k | `delta_attention` |
/// | RWKV-7 | per channel | −(a ⊙ κ), κ, k | `generalized_delta_attention`, scale 1 |
///
/// A scalar decay without a, b is `linear_attention`.
#[derive(Debug, Clone)]
pub struct DeltaOptions<T> {
    /// g ≤ 0, in f32 (f64 for f64 inputs), Hs the larger of key heads and value heads: `[Hs]` per head, `[B, Hs, N]` per head
    /// and token or `[B, Hs, N, D]` per channel. −∞ cuts the state off: nothing from before the token is read from there on,
    /// and its g has gradient 0. Default: none.
    pub log_decay: Option<T>,
    /// `[Hs, D]` in the dtype of sums, of `gated_linear_attention` alone: an exclusive read, with a bonus u for a token's own key
    /// (RWKV-6, Peng et al. 2024):
    ///
    /// ```text
    /// o_t = S_{t−1}ᵀ τ q_t + ⟨τ q_t, u ⊙ k_t⟩ v_t
    /// ```
    ///
    /// With one, a decay may be of any form; a masked token has none. The last state holds all tokens, as without. Default: none, which reads S_t.
    pub bonus: Option<T>,
    /// τ; `None` is 1/√D.
    pub scale: Option<f64>,
    /// `Some(ε)` divides every query and key by √(Σ_d x_d² + ε) first. Default: none.
    pub normalize: Option<f64>,
    /// `[B, N]` of u8: 0 removes the token from the state, which passes it unchanged, whatever its g. So padding on either
    /// side leaves the state as it is without. Default: none.
    pub key_mask: Option<T>,
    /// Sequences that are packed into one batch entry, see [`Sequences`]. Default: none.
    pub sequences: Option<Sequences>,
}

impl<T> Default for DeltaOptions<T> {
    fn default() -> Self {
        Self { log_decay: None, bonus: None, scale: None, normalize: None, key_mask: None, sequences: None }
    }
}

impl<T: Operand> DeltaOptions<T> {
    /// Checks the operands and describes the computation for an engine.
    pub fn problem(&self, function: &'static str, [q, k, v]: [&T; 3], rank_one: RankOne<&T>) -> Result<Delta> {
        let weights = [self.log_decay.as_ref(), self.bonus.as_ref()];
        let (key_mask, sequences) = (self.key_mask.as_ref(), self.sequences.as_ref());
        let shapes = DeltaShapes::new(function, [q, k, v], rank_one, weights, key_mask, sequences)?;
        let scale = self.scale.unwrap_or(1.0 / (shapes.width as f64).sqrt());
        Delta::new(function, shapes, scale, self.normalize)
    }
}
