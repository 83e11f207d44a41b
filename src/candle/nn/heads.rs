//! Multi-head attention between projections.

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::batch::Batch;
use super::cache::{Cache, Contents, kept_rows};
use super::config::AttentionConfig;
use super::mechanism::Mechanism;
use super::omega::Omega;
use super::pieces::{Piece, positions, side_by_side};
use super::projection::{Products, Projection};
use crate::activation::Activation;
use crate::candle::engine::accumulator;
use crate::candle::rotary::Rotary;
use crate::candle::{
    LinearState, diag_attention, linear_attention, linear_attention_with_state, norm_attention,
    norm_attention_with_state, performer_attention, performer_attention_with_state, rotary_linear_attention,
    rotary_linear_attention_with_state, rotary_norm_attention, rotary_norm_attention_with_state,
    rotary_performer_attention, rotary_performer_attention_with_state, softmax_attention,
};
use crate::linear::{FeatureMap, LinearOptions};
use crate::performer::PerformerOptions;
use crate::problem::Mask;
use crate::softmax::SoftmaxOptions;
use crate::transnormer::{DiagOptions, NormOptions, NormScope};

/// ε of normalised linear attention.
const NORMALIZER: f64 = 1e-6;

#[derive(Debug, Clone)]
pub(super) struct Heads {
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    gate: Option<Projection>,
    /// Of rows of q and k, or of their features where there is a φ.
    rotary: Option<Rotary>,
    kernel: Kernel,
    query_heads: usize,
    key_heads: usize,
}

/// The operation on q, k, v, with its options.
#[derive(Debug, Clone)]
enum Kernel {
    Softmax(SoftmaxOptions<Tensor>),
    Diag(DiagOptions<Tensor>),
    Linear(LinearOptions<Tensor>),
    Norm(NormOptions<Tensor>),
    Performer(PerformerOptions<Tensor>, Omega),
}

impl Heads {
    pub fn new(config: &AttentionConfig, weights: &VarBuilder) -> Result<Self> {
        let (width, head_width) = (config.width, config.head_width());
        let (query_heads, key_heads) = (config.heads, config.key_heads());
        let inward = |name: &str, heads: usize| {
            Projection::new(width, heads * head_width, config.has_bias(name), weights.pp(name))
        };
        let has_gate = matches!(config.mechanism, Mechanism::Retention { gate: true, .. });
        Ok(Self {
            q: inward("q_proj", query_heads)?,
            k: inward("k_proj", key_heads)?,
            v: inward("v_proj", key_heads)?,
            o: Projection::new(query_heads * head_width, width, config.has_bias("o_proj"), weights.pp("o_proj"))?,
            gate: if has_gate { Some(inward("g_proj", query_heads)?) } else { None },
            rotary: config.rotary.map(|base| Rotary::new(config.rotated_width().1, base)).transpose()?,
            kernel: Kernel::new(config, weights)?,
            query_heads,
            key_heads,
        })
    }

    pub fn omega(&self) -> Option<&Omega> {
        match &self.kernel {
            Kernel::Performer(_, omega) => Some(omega),
            _ => None,
        }
    }

    pub fn omega_mut(&mut self) -> Option<&mut Omega> {
        match &mut self.kernel {
            Kernel::Performer(_, omega) => Some(omega),
            _ => None,
        }
    }

    pub fn forward(&self, x: &Tensor, batch: Batch<'_>) -> Result<Tensor> {
        let [q, k, v] = self.project(x, &[(0, x.dim(1)?)], Products::Joint)?;
        let (key_mask, sequences) = (batch.key_mask.cloned(), batch.sequences.cloned());
        let out = match &self.kernel {
            Kernel::Softmax(options) => {
                softmax_attention(&q, &k, &v, &SoftmaxOptions { key_mask, sequences, ..options.clone() })
            }
            Kernel::Diag(options) => {
                diag_attention(&q, &k, &v, &DiagOptions { key_mask, sequences, ..options.clone() })
            }
            Kernel::Linear(options) => {
                let options = LinearOptions { key_mask, sequences, ..options.clone() };
                match &self.rotary {
                    Some(rotary) => rotary_linear_attention(&q, &k, &v, rotary, &options),
                    None => linear_attention(&q, &k, &v, &options),
                }
            }
            Kernel::Norm(options) => {
                let options = NormOptions { key_mask, sequences, ..options.clone() };
                match &self.rotary {
                    Some(rotary) => rotary_norm_attention(&q, &k, &v, rotary, &options),
                    None => norm_attention(&q, &k, &v, &options),
                }
            }
            Kernel::Performer(options, omega) => {
                let options = PerformerOptions { key_mask, sequences, ..options.clone() };
                match &self.rotary {
                    Some(rotary) => rotary_performer_attention(&q, &k, &v, &omega.tensor(), rotary, &options),
                    None => performer_attention(&q, &k, &v, &omega.tensor(), &options),
                }
            }
        }?;
        self.finish(x, &out, Products::Joint)
    }

    /// The rows after those of the caches, which take them in.
    pub fn forward_cached(&self, x: &Tensor, pieces: &mut [Piece<&mut Cache>]) -> Result<Tensor> {
        let [q, k, v] = self.project(x, &positions(pieces), Products::Alone)?;
        let out = side_by_side(&[&q, &k, &v], pieces, |operands, cache| {
            let [q, k, v] = operands else { candle_core::bail!("another number of operands") };
            self.kernel.next([q, k, v], self.rotary.as_ref(), cache)
        })?;
        self.finish(x, &out, Products::Alone)
    }

    /// q, k, v `[B, H, N, D]` of rows in pieces of so many from a position on; q and k rotated where there is no φ.
    fn project(&self, x: &Tensor, pieces: &[(usize, usize)], products: Products) -> Result<[Tensor; 3]> {
        let (batch, rows, _) = x.dims3()?;
        let split = |layer: &Projection, heads: usize| {
            layer.forward(x, products)?.reshape((batch, rows, heads, ()))?.transpose(1, 2)
        };
        let rotate = |rows: Tensor| match (&self.kernel, &self.rotary) {
            (Kernel::Softmax(_) | Kernel::Diag(_), Some(rotary)) => rotary.apply_to_pieces(&rows, pieces),
            _ => Ok(rows),
        };
        let q = rotate(split(&self.q, self.query_heads)?)?;
        let k = rotate(split(&self.k, self.key_heads)?)?;
        Ok([q, k, split(&self.v, self.key_heads)?])
    }

    /// Joins the heads of `out` `[B, H, N, D]`, applies the gate and projects.
    fn finish(&self, x: &Tensor, out: &Tensor, products: Products) -> Result<Tensor> {
        let joined = out.transpose(1, 2)?.flatten_from(2)?;
        let joined = match &self.gate {
            Some(gate) => Activation::Silu.gate(&gate.forward(x, products)?, &joined)?,
            None => joined,
        };
        self.o.forward(&joined, products)
    }
}

impl Kernel {
    fn new(config: &AttentionConfig, weights: &VarBuilder) -> Result<Self> {
        let causal = config.causal;
        Ok(match &config.mechanism {
            Mechanism::Softmax { window, soft_cap } => {
                let mask = match window {
                    Some(window) => {
                        Mask::Window { left: Some(window - 1), right: Some(if causal { 0 } else { window - 1 }) }
                    }
                    None if causal => Mask::Causal,
                    None => Mask::Full,
                };
                Self::Softmax(SoftmaxOptions { mask, soft_cap: *soft_cap, ..Default::default() })
            }
            Mechanism::Diag { block, weight } => {
                Self::Diag(DiagOptions { block_size: *block, causal, weight: *weight, ..Default::default() })
            }
            Mechanism::Linear { map, normalized } => {
                let normalizer = normalized.then_some(NORMALIZER);
                Self::Linear(LinearOptions { map: *map, causal, normalizer, ..Default::default() })
            }
            Mechanism::Norm { map, epsilon, scope } => {
                Self::Norm(NormOptions { map: *map, causal, epsilon: *epsilon, norm: *scope, ..Default::default() })
            }
            Mechanism::Retention { log_decay, epsilon, .. } => Self::Norm(NormOptions {
                map: FeatureMap::Identity,
                causal,
                epsilon: *epsilon,
                norm: NormScope::Head,
                log_decay: Some(retention_decay(config, log_decay.as_deref(), weights)?),
                ..Default::default()
            }),
            Mechanism::Performer { features, directions, seed, map, epsilon } => {
                let omega = Omega::new(*directions, *features, config.head_width(), *seed, weights)?;
                Self::Performer(PerformerOptions { map: *map, causal, epsilon: *epsilon, ..Default::default() }, omega)
            }
            other => candle_core::bail!("{} is no layer of heads", other.name()),
        })
    }

    /// Attention of the next rows of the sequences of a cache, which takes them in.
    fn next(&self, [q, k, v]: [&Tensor; 3], rotary: Option<&Rotary>, cache: &mut Cache) -> Result<Tensor> {
        match &mut cache.contents {
            Contents::Rows(rows) => {
                let seen = rows.append(&[k, v])?;
                let out = self.attend(q, &seen[0], &seen[1])?;
                if let Some(kept) = kept_rows(&cache.config, cache.position + q.dim(2)?) {
                    rows.keep_last(kept)?;
                }
                Ok(out)
            }
            Contents::Sums(state) => {
                let (out, next) = self.advance([q, k, v], rotary, state.as_ref())?;
                *state = Some(next.detach());
                Ok(out)
            }
            Contents::Chunk(..) | Contents::Recurrent(_) => candle_core::bail!("the cache is one of another layer"),
        }
    }

    /// Quadratic attention over keys that end where the queries do.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        match self {
            Self::Softmax(options) => softmax_attention(q, k, v, options),
            Self::Diag(options) => diag_attention(q, k, v, options),
            _ => candle_core::bail!("the cache is one of quadratic attention"),
        }
    }

    /// Linear attention after a state.
    fn advance(
        &self,
        [q, k, v]: [&Tensor; 3],
        rotary: Option<&Rotary>,
        state: Option<&LinearState>,
    ) -> Result<(Tensor, LinearState)> {
        match (self, rotary) {
            (Self::Linear(options), None) => linear_attention_with_state(q, k, v, options, state),
            (Self::Linear(options), Some(rotary)) => {
                rotary_linear_attention_with_state(q, k, v, rotary, options, state)
            }
            (Self::Norm(options), None) => norm_attention_with_state(q, k, v, options, state),
            (Self::Norm(options), Some(rotary)) => rotary_norm_attention_with_state(q, k, v, rotary, options, state),
            (Self::Performer(options, omega), None) => {
                performer_attention_with_state(q, k, v, &omega.tensor(), options, state)
            }
            (Self::Performer(options, omega), Some(rotary)) => {
                rotary_performer_attention_with_state(q, k, v, &omega.tensor(), rotary, options, state)
            }
            _ => candle_core::bail!("the cache is one of linear attention"),
        }
    }
}

/// g `[Hk]`: as given, or ln(1 − 2^{−5−h}) for head h.
fn retention_decay(config: &AttentionConfig, given: Option<&[f64]>, weights: &VarBuilder) -> Result<Tensor> {
    let heads = config.key_heads();
    let decay = match given {
        Some(given) => given.to_vec(),
        None => (0..heads).map(|head| (-(2f64.powi(-5 - head as i32))).ln_1p()).collect(),
    };
    let decay = Tensor::from_vec(decay, heads, &Device::Cpu)?;
    decay.to_dtype(accumulator(weights.dtype()))?.to_device(weights.device())
}
