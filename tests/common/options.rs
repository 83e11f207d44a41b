//! The options of a case for any tensor type.

use attn_kernels::gau::{GauOptions, MixedChunkOptions};
use attn_kernels::linear::LinearOptions;
use attn_kernels::performer::PerformerOptions;
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{DiagOptions, NormOptions};

/// The optional tensors.
#[derive(Debug, Clone)]
pub struct Extras<T> {
    pub key_mask: Option<T>,
    pub bias: Option<T>,
    pub log_decay: Option<T>,
}

/// Options with other tensors in them.
pub trait With<T> {
    type Options;
    fn with(&self, extras: Extras<T>) -> Self::Options;
}

/// Copies the plain fields and puts the tensors in.
macro_rules! with {
    ($($options:ident { $($field:ident),* } { $($tensor:ident),* })*) => { $(
        impl<S, T> With<T> for $options<S> {
            type Options = $options<T>;
            fn with(&self, extras: Extras<T>) -> $options<T> {
                let sequences = self.sequences.clone();
                $options { $($field: self.$field,)* $($tensor: extras.$tensor,)* sequences }
            }
        }
    )* };
}

with! {
    SoftmaxOptions { mask, scale, soft_cap } { key_mask, bias }
    DiagOptions { block_size, causal, weight, scale } { key_mask }
    GauOptions { mask, norm } { key_mask, bias }
    LinearOptions { map, causal, normalizer } { key_mask, log_decay }
    PerformerOptions { map, causal, epsilon } { key_mask }
    NormOptions { map, causal, epsilon, norm } { key_mask, log_decay }
    MixedChunkOptions { chunk_size, causal, scale, global_norm } { key_mask, bias }
}
