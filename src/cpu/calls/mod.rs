//! Whole calls on slices: an options struct in, owned results out, and from them the gradients.

mod attention;
mod delta;
mod element;
mod linear_attention;
mod mixed_chunk;

pub use attention::{Attention, AttentionGradients, diag, gau, softmax};
pub use delta::{DeltaAttention, DeltaAttentionGradients, delta, gated_linear, generalized_delta};
pub use element::Element;
pub use linear_attention::{
    LinearAttention, LinearAttentionGradients, LinearState, LinearStateGradient, WithState, linear, linear_with_state,
    norm, norm_with_state, performer, performer_with_state,
};
pub use mixed_chunk::{MixedChunk, MixedChunkGradients, mixed_chunk, mixed_chunk_with_state};
