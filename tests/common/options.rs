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
    pub attention_bias: Option<T>,
    pub sinks: Option<T>,
}

impl<T> Default for Extras<T> {
    fn default() -> Self {
        Self { key_mask: None, bias: None, log_decay: None, attention_bias: None, sinks: None }
    }
}

impl<T> Extras<T> {
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Extras<U> {
        let Self { key_mask, bias, log_decay, attention_bias, sinks } = self;
        let [key_mask, bias, log_decay, attention_bias, sinks] =
            [key_mask, bias, log_decay, attention_bias, sinks].map(|x| x.map(&mut f));
        Extras { key_mask, bias, log_decay, attention_bias, sinks }
    }

    pub fn as_ref(&self) -> Extras<&T> {
        Extras {
            key_mask: self.key_mask.as_ref(),
            bias: self.bias.as_ref(),
            log_decay: self.log_decay.as_ref(),
            attention_bias: self.attention_bias.as_ref(),
            sinks: self.sinks.as_ref(),
        }
    }
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
    SoftmaxOptions { mask, scale, soft_cap, dropout } { key_mask, bias, attention_bias, sinks }
    DiagOptions { block_size, causal, weight, scale } { key_mask }
    GauOptions { mask, norm } { key_mask, bias }
    LinearOptions { map, causal, normalizer } { key_mask, log_decay }
    PerformerOptions { map, causal, epsilon } { key_mask }
    NormOptions { map, causal, epsilon, norm } { key_mask, log_decay }
    MixedChunkOptions { chunk_size, causal, scale, global_norm } { key_mask, bias }
}
