//! Layers with a state of a fixed size. Gated linear attention, the delta rules, Mamba-2 and lightning attention are one chain of
//! parts, some of which a kind leaves out; [`kinds`] says which it has, and under which names they are among the weights.
//! [`Rwkv7`], [`Mamba`], [`S4d`] and [`Lru`] have parts of their own.

mod decay;
mod kinds;
mod logits;
mod lru;
mod mamba;
mod output;
mod rwkv7;
mod s4d;
mod scanned;
mod short_convolution;
mod slopes;

use candle_core::{DType, Module, Result, Tensor};

use super::batch::Batch;
use super::cache::{Cache, Recurrence};
use super::pieces::{Piece, side_by_side};
use super::projection::{Products, Projection};
use crate::activation::Activation;
use crate::candle::engine::accumulator;
use crate::candle::{
    LinearState, delta_attention, delta_attention_with_state, gated_linear_attention,
    gated_linear_attention_with_state, linear_attention, linear_attention_with_state,
};
use crate::delta::DeltaOptions;
use crate::linear::{FeatureMap, LinearOptions};

use decay::Decay;
pub(super) use kinds::{all_others, other_weights, sizes};
pub(super) use lru::Lru;
pub(super) use mamba::Mamba;
use output::Output;
pub(super) use rwkv7::Rwkv7;
pub(super) use s4d::S4d;
use short_convolution::{Place, ShortConvolution};
pub use slopes::Slopes;

/// ε of the l2 norm of queries and keys.
const NORMALIZE: f64 = 1e-6;

/// Heads and their widths.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sizes {
    pub query_heads: usize,
    pub key_heads: usize,
    pub value_heads: usize,
    /// D
    pub key_width: usize,
    /// E
    pub value_width: usize,
}

impl Sizes {
    /// Heads of the output.
    pub fn heads(&self) -> usize {
        self.query_heads.max(self.value_heads)
    }

    /// Widths of the rows of all heads of q, k and v.
    fn widths(&self) -> [usize; 3] {
        let Self { query_heads, key_heads, value_heads, key_width, value_width } = *self;
        [query_heads * key_width, key_heads * key_width, value_heads * value_width]
    }
}

#[derive(Debug, Clone)]
pub(super) struct Recurrent {
    sizes: Sizes,
    inward: Inward,
    decay: Decay,
    /// Of the delta rules: β is the factor times the sigmoid of this.
    beta: Option<(Projection, f64)>,
    output: Output,
}

/// Where q, k and v come from.
#[derive(Debug, Clone)]
enum Inward {
    Apart([Stream; 3]),
    /// Those of a head side by side, behind SiLU.
    ByHead(Projection),
}

#[derive(Debug, Clone)]
struct Stream {
    projection: Projection,
    convolution: Option<ShortConvolution>,
}

/// The operands of the recurrence, `[B, heads, N, ·]`.
struct Operands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// Values as they are for the skip, where Δ scales those of the recurrence.
    unscaled: Option<Tensor>,
    log_decay: Option<Tensor>,
    beta: Option<Tensor>,
}

impl Recurrent {
    pub fn forward(&self, x: &Tensor, batch: Batch<'_>) -> Result<Tensor> {
        let rows = self.project(x, Products::Joint)?;
        let (operands, _) = self.operands(&rows, Place::Whole(batch.sequences))?;
        let out = self.attend(&operands, batch)?;
        self.output.forward(x, &self.output.skipped(out, &operands)?, Products::Joint)
    }

    /// The rows after those of the caches, which take them in.
    pub fn forward_cached(&self, x: &Tensor, pieces: &mut [Piece<&mut Cache>]) -> Result<Tensor> {
        let rows = self.project(x, Products::Alone)?;
        let out = side_by_side(&rows.iter().collect::<Vec<_>>(), pieces, |rows, cache| {
            let position = cache.position;
            let before = cache.recurrence()?;
            let (operands, inputs) = self.operands(rows, Place::After(before.as_ref()))?;
            let (out, s) = self.attend_after(&operands, before.as_ref(), position)?;
            *before = Some(Recurrence { s: s.detach(), inputs: inputs.iter().map(Tensor::detach).collect() });
            self.output.skipped(out, &operands)
        })?;
        self.output.forward(x, &out, Products::Alone)
    }

    /// What rows x `[B, N, width]` give on their own, `[B, 1, N, ·]` each: q, k and v, then what decay and β are made of.
    fn project(&self, x: &Tensor, products: Products) -> Result<Vec<Tensor>> {
        let mut rows = match &self.inward {
            Inward::Apart(streams) => {
                streams.iter().map(|stream| stream.projection.forward(x, products)).collect::<Result<_>>()?
            }
            Inward::ByHead(projection) => vec![projection.forward(x, products)?],
        };
        rows.extend(self.decay.project(x, products)?);
        rows.extend(self.beta.as_ref().map(|(projection, _)| projection.forward(x, products)).transpose()?);
        rows.iter().map(|rows| rows.unsqueeze(1)).collect()
    }

    /// The operands, and the last inputs of the convolutions.
    fn operands(&self, rows: &[Tensor], place: Place<'_>) -> Result<(Operands, Vec<Tensor>)> {
        let rows: Vec<Tensor> = rows.iter().map(|rows| rows.squeeze(1)).collect::<Result<_>>()?;
        let count = if let Inward::Apart(streams) = &self.inward { streams.len() } else { 1 };
        let (inward, logits) = rows.split_at(count);
        let ([q, k, v], inputs) = self.heads(inward, place)?;
        let sums = accumulator(v.dtype());
        let (by_token, of_beta) = logits.split_at(usize::from(self.decay.is_by_token()));
        let decay = self.decay.of(by_token.first(), &self.sizes, sums)?;
        let beta = self.beta.as_ref().zip(of_beta.first()).map(|((_, factor), logits)| -> Result<_> {
            let beta = Activation::Sigmoid.forward(&logits.to_dtype(sums)?)?;
            if *factor == 1.0 { beta } else { (beta * *factor)? }.transpose(1, 2)
        });
        let (v, unscaled) = match decay.steps {
            None => (v, None),
            Some(steps) => {
                let steps = steps.transpose(1, 2)?.unsqueeze(3)?;
                (v.to_dtype(sums)?.broadcast_mul(&steps)?.to_dtype(v.dtype())?, Some(v))
            }
        };
        Ok((Operands { q, k, v, unscaled, log_decay: decay.log_decay, beta: beta.transpose()? }, inputs))
    }

    /// q, k and v `[B, heads, N, ·]`, and the last inputs of the convolutions.
    fn heads(&self, rows: &[Tensor], place: Place<'_>) -> Result<([Tensor; 3], Vec<Tensor>)> {
        let Sizes { query_heads, key_heads, value_heads, key_width, .. } = self.sizes;
        let mut inputs = Vec::new();
        let heads = match &self.inward {
            Inward::Apart(streams) => {
                let mut convolved = |index: usize, heads: usize| match &streams[index].convolution {
                    None => split(&rows[index], heads),
                    Some(convolution) => {
                        let (rows, last) = convolution.forward(&rows[index], place, inputs.len())?;
                        inputs.extend(last);
                        split(&rows, heads)
                    }
                };
                [convolved(0, query_heads)?, convolved(1, key_heads)?, convolved(2, value_heads)?]
            }
            Inward::ByHead(_) => {
                let all = split(&Activation::Silu.forward(&rows[0])?, value_heads)?;
                let part = |index: usize| all.narrow(3, index * key_width, key_width);
                [part(0)?, part(1)?, part(2)?]
            }
        };
        Ok((heads, inputs))
    }

    /// `[B, H, N, E]` of whole sequences.
    fn attend(&self, operands: &Operands, batch: Batch<'_>) -> Result<Tensor> {
        let Operands { q, k, v, beta, .. } = operands;
        let (key_mask, sequences) = (batch.key_mask.cloned(), batch.sequences.cloned());
        let log_decay = match (&operands.log_decay, &key_mask) {
            (Some(log_decay), Some(key_mask)) if self.decay.is_by_token() => Some(visible(log_decay, key_mask)?),
            (log_decay, _) => log_decay.clone(),
        };
        match beta {
            None if !self.decay.is_by_channel() => {
                linear_attention(q, k, v, &LinearOptions { log_decay, key_mask, sequences, ..plain() })
            }
            None => {
                let options = DeltaOptions { log_decay, key_mask, sequences, ..Default::default() };
                gated_linear_attention(q, k, v, &options)
            }
            Some(beta) => {
                let normalize = Some(NORMALIZE);
                let options = DeltaOptions { log_decay, normalize, key_mask, sequences, ..Default::default() };
                delta_attention(q, k, v, beta, &options)
            }
        }
    }

    /// `[B, H, N, E]` of the rows after those of a state, and the state that follows.
    fn attend_after(
        &self,
        operands: &Operands,
        before: Option<&Recurrence>,
        position: usize,
    ) -> Result<(Tensor, Tensor)> {
        let Operands { q, k, v, beta, .. } = operands;
        let (log_decay, s) = (operands.log_decay.clone(), before.map(|before| &before.s));
        match beta {
            None if !self.decay.is_by_channel() => {
                let state = s.map(|s| -> Result<_> {
                    let (batch, heads, width, _) = s.dims4()?;
                    // Nothing is divided by ⟨q, z⟩.
                    let z = Tensor::zeros((batch, heads, width), s.dtype(), s.device())?;
                    Ok(LinearState::new(s.clone(), z, None, position))
                });
                let options = LinearOptions { log_decay, ..plain() };
                let (out, next) = linear_attention_with_state(q, k, v, &options, state.transpose()?.as_ref())?;
                Ok((out, next.s().clone()))
            }
            None => {
                let options = DeltaOptions { log_decay, ..Default::default() };
                gated_linear_attention_with_state(q, k, v, &options, s)
            }
            Some(beta) => {
                let options = DeltaOptions { log_decay, normalize: Some(NORMALIZE), ..Default::default() };
                delta_attention_with_state(q, k, v, beta, &options, s)
            }
        }
    }
}

/// S_t = e^g S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t
fn plain() -> LinearOptions<Tensor> {
    LinearOptions { map: FeatureMap::Identity, causal: true, normalizer: None, ..Default::default() }
}

/// `[B, N, heads · width]` → `[B, heads, N, width]`
fn split(rows: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, count, width) = rows.dims3()?;
    rows.reshape((batch, count, heads, width / heads))?.transpose(1, 2)
}

/// The log-decay `[B, H, N, …]` with 0 for removed tokens, whose rows may hold anything.
fn visible(log_decay: &Tensor, key_mask: &Tensor) -> Result<Tensor> {
    let (batch, count) = (log_decay.dim(0)?, log_decay.dim(2)?);
    if key_mask.dims() != [batch, count] || key_mask.dtype() != DType::U8 {
        // The operation says what is wrong with it.
        return Ok(log_decay.clone());
    }
    let mut dims = vec![batch, 1, count];
    dims.resize(log_decay.rank(), 1);
    let keep = key_mask.reshape(dims)?.broadcast_as(log_decay.shape())?;
    keep.where_cond(log_decay, &log_decay.zeros_like()?)
}
