//! One attention operation, swapped for another without training.

use attn_kernels::{
    FeatureKind, diag_attention, gau_attention, linear_attention, mixed_chunk_attention, norm_attention,
    performer_attention, random_features, softmax_attention,
};
use candle_core::{Device, Result, Tensor};

use crate::common::mechanism::{self, DIRECTIONS, Mechanism};

pub struct Attention {
    mechanism: Mechanism,
    /// The Performer's directions, `[DIRECTIONS, width of a head]`.
    omega: Tensor,
}

impl Attention {
    /// # Errors
    /// A mechanism that is causal only.
    pub fn new(mechanism: Mechanism, head_dim: usize, device: &Device) -> std::result::Result<Self, String> {
        if !mechanism.supports(false) {
            return Err(format!("--mechanism {0}: {0} is causal, an encoder is not", mechanism.name()));
        }
        let omega = random_features(FeatureKind::Orthogonal, DIRECTIONS, head_dim, 0).map_err(|e| e.to_string())?;
        let omega: Vec<_> = omega.into_iter().map(|x| x as f32).collect();
        let omega = Tensor::from_vec(omega, (DIRECTIONS, head_dim), device).map_err(|error| error.to_string())?;
        Ok(Self { mechanism, omega })
    }

    /// q, k, v `[batch, heads, length, width]`, every query sees every key that `mask` keeps.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (causal, mask) = (false, Some(mask.clone()));
        match self.mechanism {
            Mechanism::Softmax => softmax_attention(q, k, v, &mechanism::softmax(causal, mask)),
            Mechanism::Linear => linear_attention(q, k, v, &mechanism::linear(causal, mask)),
            Mechanism::Performer => performer_attention(q, k, v, &self.omega, &mechanism::performer(causal, mask)),
            Mechanism::Norm => norm_attention(q, k, v, &mechanism::norm(causal, mask)),
            Mechanism::Diag => diag_attention(q, k, v, &mechanism::diag(causal, mask)),
            Mechanism::Gau => gau_attention(q, k, v, &mechanism::gau(causal, mask, k.dim(2)?)),
            Mechanism::Flash => mixed_chunk_attention(q, k, q, k, v, &mechanism::flash(causal, mask)),
            Mechanism::Retention => linear_attention(q, k, v, &mechanism::retention(mask, None)),
        }
    }
}
