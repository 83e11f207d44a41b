//! Multi-head attention between projections.

use candle_core::{Device, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::batch::Batch;
use super::cache::{Cache, Contents, kept_rows};
use super::config::{AttentionConfig, QueryKeyNorm};
use super::mechanism::Mechanism;
use super::norm::Norm;
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
    /// Of queries and keys, of each head or of all together.
    norms: Option<[Norm; 2]>,
    has_joint_norms: bool,
    gate: Gate,
    /// Of rows of q and k, or of their features where there is a φ.
    rotary: Option<Rotary>,
    kernel: Kernel,
    query_heads: usize,
    key_heads: usize,
    head_width: usize,
}

/// What the joined heads are multiplied with.
#[derive(Debug, Clone)]
enum Gate {
    None,
    /// silu(x W)
    Silu(Projection),
    /// The sigmoid of rows that follow those of each head in the projection of the queries.
    Sigmoid,
}

/// Rows of a call, `[B, H, N, D]`, and what the gate is made of, `[B, N, H·D]`.
struct Projected {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Option<Tensor>,
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
        let gate = match config.mechanism {
            Mechanism::Retention { gate: true, .. } => Gate::Silu(inward("g_proj", query_heads)?),
            _ if config.output_gate => Gate::Sigmoid,
            _ => Gate::None,
        };
        let norms = config.query_key_norm.map(|QueryKeyNorm { norm, joint }| {
            let of = |name: &str, heads: usize| {
                Norm::new(if joint { heads * head_width } else { head_width }, &norm, weights.pp(name))
            };
            Ok::<_, candle_core::Error>([of("q_norm", query_heads)?, of("k_norm", key_heads)?])
        });
        Ok(Self {
            q: inward("q_proj", if config.output_gate { 2 * query_heads } else { query_heads })?,
            k: inward("k_proj", key_heads)?,
            v: inward("v_proj", key_heads)?,
            o: Projection::new(query_heads * head_width, width, config.has_bias("o_proj"), weights.pp("o_proj"))?,
            norms: norms.transpose()?,
            has_joint_norms: config.query_key_norm.is_some_and(|norm| norm.joint),
            gate,
            rotary: config.rotary.map(|rotary| Rotary::new(config.rotated_width().1, rotary)).transpose()?,
            kernel: Kernel::new(config, weights)?,
            query_heads,
            key_heads,
            head_width,
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
        let Projected { q, k, v, gate } = self.project(x, &[(0, x.dim(1)?)], Products::Joint)?;
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
        self.finish(&out, gate, Products::Joint)
    }

    /// The rows after those of the caches, which take them in.
    pub fn forward_cached(&self, x: &Tensor, pieces: &mut [Piece<&mut Cache>]) -> Result<Tensor> {
        let Projected { q, k, v, gate } = self.project(x, &positions(pieces), Products::Alone)?;
        let out = side_by_side(&[&q, &k, &v], pieces, |operands, cache| {
            let [q, k, v] = operands else { candle_core::bail!("another number of operands") };
            self.kernel.next([q, k, v], self.rotary.as_ref(), cache)
        })?;
        self.finish(&out, gate, Products::Alone)
    }

    /// q, k, v of rows in pieces of so many from a position on; q and k normalised, and rotated where there is no φ.
    fn project(&self, x: &Tensor, pieces: &[(usize, usize)], products: Products) -> Result<Projected> {
        let (batch, rows, _) = x.dims3()?;
        let split = |x: &Tensor, heads: usize| x.reshape((batch, rows, heads, self.head_width));
        let (q, k, v) = (self.q.forward(x, products)?, self.k.forward(x, products)?, self.v.forward(x, products)?);
        let (q, gate) = match &self.gate {
            Gate::None => (q, None),
            Gate::Silu(gate) => (q, Some(gate.forward(x, products)?)),
            Gate::Sigmoid => {
                let pairs = q.reshape((batch, rows, self.query_heads, 2, self.head_width))?;
                let [q, gate] = [0, 1].map(|which| pairs.narrow(3, which, 1)?.contiguous()?.flatten_from(2));
                (q?, Some(gate?))
            }
        };
        let normalized = |rows: Tensor, which: usize, heads: usize| match &self.norms {
            Some(norms) if self.has_joint_norms => split(&norms[which].forward(&rows)?, heads),
            Some(norms) => norms[which].forward(&split(&rows, heads)?),
            None => split(&rows, heads),
        };
        let rotate = |rows: Tensor| match (&self.kernel, &self.rotary) {
            (Kernel::Softmax(_) | Kernel::Diag(_), Some(rotary)) => rotary.apply_to_pieces(&rows, pieces),
            _ => Ok(rows),
        };
        Ok(Projected {
            q: rotate(normalized(q, 0, self.query_heads)?.transpose(1, 2)?)?,
            k: rotate(normalized(k, 1, self.key_heads)?.transpose(1, 2)?)?,
            v: split(&v, self.key_heads)?.transpose(1, 2)?,
            gate,
        })
    }

    /// Joins the heads of `out` `[B, H, N, D]`, applies the gate and projects.
    fn finish(&self, out: &Tensor, gate: Option<Tensor>, products: Products) -> Result<Tensor> {
        let joined = out.transpose(1, 2)?.flatten_from(2)?;
        let joined = match (&self.gate, gate) {
            (Gate::Silu(_), Some(gate)) => Activation::Silu.gate(&gate, &joined)?,
            (_, Some(gate)) => Activation::Sigmoid.gate(&gate, &joined)?,
            (_, None) => joined,
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
                let sinks = || {
                    let scores = weights.get_with_hints(config.heads, "sinks", Init::Const(0.0))?;
                    scores.to_dtype(accumulator(weights.dtype()))
                };
                Self::Softmax(SoftmaxOptions {
                    mask,
                    scale: config.scale,
                    soft_cap: *soft_cap,
                    sinks: config.sinks.then(sinks).transpose()?,
                    ..Default::default()
                })
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
