//! RWKV-7: the generalised delta rule between a shift of tokens and a norm per head. Names of the weights are those of
//! flash-linear-attention, fresh ones begin as in RWKV-LM.

use candle_core::{D, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::kinds::Reader;
use super::short_convolution::Place;
use super::{sizes, split, visible};
use crate::activation::Activation;
use crate::candle::engine::accumulator;
use crate::candle::nn::batch::Batch;
use crate::candle::nn::cache::{Cache, Recurrence};
use crate::candle::nn::config::AttentionConfig;
use crate::candle::nn::first_values::FirstValues;
use crate::candle::nn::fresh::begun;
use crate::candle::nn::mechanism::Mechanism;
use crate::candle::nn::norm::{Norm, NormConfig, NormKind};
use crate::candle::nn::pieces::{Piece, side_by_side};
use crate::candle::nn::projection::{Products, Projection};
use crate::candle::{
    causal_convolution, causal_convolution_with_state, generalized_delta_attention,
    generalized_delta_attention_with_state,
};
use crate::convolution::ConvolutionOptions;
use crate::delta::DeltaOptions;

/// ε² of the l2 norm of κ.
const NORMALIZE: f64 = 1e-24;

#[derive(Debug, Clone)]
pub(in crate::candle::nn) struct Rwkv7 {
    heads: usize,
    /// μ `[1, 1, width]` of what r, w, k, v, a and g are made of.
    shares: Vec<Tensor>,
    receptance: Projection,
    key: Projection,
    value: Projection,
    decay: LowRank,
    rate: LowRank,
    /// Of a layer behind the first.
    residual: Option<LowRank>,
    gate: LowRank,
    /// `[heads · width]`
    k_k: Tensor,
    k_a: Tensor,
    /// `[heads, width]`
    r_k: Tensor,
    norm: Norm,
    outward: Projection,
}

/// b + f(x W) W′
#[derive(Debug, Clone)]
struct LowRank {
    down: Projection,
    between: Between,
    up: Projection,
}

#[derive(Debug, Clone, Copy)]
enum Between {
    Nothing,
    Tanh,
    Sigmoid,
}

/// What rows give on their own.
struct Rows {
    /// r, k, v, −(a ⊙ κ), κ and ln w, `[B, heads, N, width]` each.
    operands: Vec<Tensor>,
    /// ⟨r, r_k ⊙ k⟩ v `[B, N, heads, width]`
    bonus: Tensor,
    /// `[B, N, heads, width]`
    gate: Tensor,
}

impl Rwkv7 {
    pub fn new(config: &AttentionConfig, weights: &VarBuilder) -> Result<Self> {
        let Mechanism::Rwkv7 { place, epsilon, .. } = config.mechanism else {
            candle_core::bail!("{} is not rwkv7", config.mechanism.name())
        };
        let read = Reader { config, weights, sizes: sizes(config) };
        let (heads, width) = (config.heads, config.head_width());
        let inner = heads * width;
        let beginning = Beginning { place: place.unwrap_or([0, 1]), width, inner };
        let norm = NormConfig { kind: NormKind::Layer, epsilon, ..Default::default() };
        let vector = |name: &str, first: &dyn Fn(usize) -> f64| beginning.vector(weights, name, &[inner], first);
        let rows = config.width as f64;
        let mut shares = Vec::new();
        for (name, power) in [("x_r", 0.2), ("x_w", 0.9), ("x_k", 0.7), ("x_v", 0.7), ("x_a", 0.9), ("x_g", 0.2)] {
            let power = power * beginning.rest();
            let share = |channel: usize| 1.0 - (channel as f64 / rows).powf(power);
            shares.push(beginning.vector(weights, name, &[1, 1, config.width], &share)?);
        }
        let [of_w, of_a, of_v, of_g] = config.mechanism.ranks(config.width);
        let low_rank = |name: &str, rank: usize, between, bias: Option<&dyn Fn(usize) -> f64>| {
            let weights = weights.pp(name).pp("lora");
            if let Some(first) = bias {
                beginning.vector(&weights.pp("2"), "bias", &[inner], first)?;
            }
            LowRank::new([config.width, rank, inner], between, bias.is_some(), &weights)
        };
        vector("g_norm.weight", &|_| beginning.scale())?;
        Ok(Self {
            heads,
            shares,
            receptance: read.projection("r_proj", inner)?,
            key: read.projection("k_proj", inner)?,
            value: read.projection("v_proj", inner)?,
            decay: low_rank("w_lora", of_w, Between::Tanh, Some(&|channel| beginning.decay(channel)))?,
            rate: low_rank("a_lora", of_a, Between::Nothing, Some(&|channel| beginning.rate(channel)))?,
            residual: match beginning.place {
                [0, _] => None,
                _ => {
                    let bias = |channel| 0.73 - 0.4 * beginning.line(channel);
                    Some(low_rank("v_lora", of_v, Between::Nothing, Some(&bias))?)
                }
            },
            gate: low_rank("g_lora", of_g, Between::Sigmoid, None)?,
            k_k: vector("k_k", &|channel| 0.71 - 0.1 * beginning.line(channel))?,
            k_a: vector("k_a", &|_| 1.02)?,
            r_k: weights.get_with_hints((heads, width), "r_k", Init::Const(-0.04))?,
            norm: Norm::by_head([heads, width], &norm, weights.pp("g_norm"))?,
            outward: read.outward("o_proj", inner)?,
        })
    }

    pub fn forward(&self, x: &Tensor, batch: Batch<'_>, first: &mut FirstValues) -> Result<Tensor> {
        let rows = self.rows(&self.shifted(x, Place::Whole(batch.sequences))?, first, Products::Joint)?;
        let [r, k, v, a, b, log_decay] = &rows.operands[..] else { candle_core::bail!("another number of operands") };
        let (key_mask, sequences) = (batch.key_mask.cloned(), batch.sequences.cloned());
        let log_decay = match &key_mask {
            Some(key_mask) => visible(log_decay, key_mask)?,
            None => log_decay.clone(),
        };
        let options = DeltaOptions { key_mask, sequences, ..decayed(log_decay) };
        let out = generalized_delta_attention(r, k, v, [a, b], &options)?;
        self.finish(&out, &rows, Products::Joint)
    }

    /// The rows after those of the caches, which take them in.
    pub fn forward_cached(
        &self,
        x: &Tensor,
        pieces: &mut [Piece<&mut Cache>],
        first: &mut FirstValues,
    ) -> Result<Tensor> {
        let x = x.unsqueeze(1)?;
        let shifted = side_by_side(&[&x], pieces, |rows, cache| {
            let before = cache.recurrence()?.as_ref();
            Tensor::cat(&self.shifted(&rows[0].squeeze(1)?, Place::After(before))?, 2)?.unsqueeze(1)
        })?;
        let shifted = shifted.squeeze(1)?.chunk(self.shares.len(), 2)?;
        let shifted: Vec<Tensor> = shifted.iter().map(Tensor::contiguous).collect::<Result<_>>()?;
        let rows = self.rows(&shifted, first, Products::Alone)?;
        let operands: Vec<&Tensor> = rows.operands.iter().chain([&x]).collect();
        let out = side_by_side(&operands, pieces, |operands, cache| {
            let [r, k, v, a, b, log_decay, x] = operands else { candle_core::bail!("another number of operands") };
            let before = cache.recurrence()?;
            let (options, state) = (decayed(log_decay.clone()), before.as_ref().map(|before| &before.s));
            let (out, s) = generalized_delta_attention_with_state(r, k, v, [a, b], &options, state)?;
            // A copy: a view would keep all rows alive.
            let last = x.squeeze(1)?.narrow(1, x.dim(2)? - 1, 1)?.detach().force_contiguous()?;
            *before = Some(Recurrence { s: s.detach(), inputs: vec![last] });
            Ok(out)
        })?;
        self.finish(&out, &rows, Products::Alone)
    }

    /// x_t + μ ⊙ (x_{t−1} − x_t) for every μ: two taps.
    fn shifted(&self, x: &Tensor, place: Place<'_>) -> Result<Vec<Tensor>> {
        let shift = |share: &Tensor| {
            let share = share.flatten_all()?;
            let taps = Tensor::stack(&[&share, &share.affine(-1.0, 1.0)?], 1)?;
            match place {
                Place::Whole(sequences) => {
                    let options = ConvolutionOptions { sequences: sequences.cloned(), ..Default::default() };
                    causal_convolution(x, &taps, None, &options)
                }
                Place::After(before) => {
                    let (options, last) = (Default::default(), before.and_then(|before| before.inputs.first()));
                    causal_convolution_with_state(x, &taps, None, &options, last).map(|(rows, _)| rows)
                }
            }
        };
        self.shares.iter().map(shift).collect()
    }

    fn rows(&self, shifted: &[Tensor], first: &mut FirstValues, products: Products) -> Result<Rows> {
        let [for_r, for_w, for_k, for_v, for_a, for_g] = shifted else { candle_core::bail!("another number of rows") };
        let (r, v) = (self.receptance.forward(for_r, products)?, self.value.forward(for_v, products)?);
        let v = match &self.residual {
            None => {
                first.offer(&v);
                v
            }
            Some(logits) => {
                let share = logits.forward(for_v, products)?;
                (&v + Activation::Sigmoid.gate(&share, &(first.get()? - &v)?)?)?
            }
        };
        let (dtype, sums) = (v.dtype(), accumulator(v.dtype()));
        let k = self.key.forward(for_k, products)?.to_dtype(sums)?;
        let rate = self.rate.forward(for_a, products)?.to_dtype(sums)?;
        let by_head = |rows: &Tensor| {
            let (batch, count, _) = rows.dims3()?;
            rows.reshape((batch, count, self.heads, ()))
        };
        let kappa = by_head(&k.broadcast_mul(&self.k_k.to_dtype(sums)?)?)?;
        let norm = (kappa.sqr()?.sum_keepdim(D::Minus1)? + NORMALIZE)?.sqrt()?;
        let kappa = kappa.broadcast_div(&norm)?.flatten_from(2)?;
        let written = Activation::Sigmoid.gate(&rate, &kappa)?.neg()?;
        // k ⊙ (1 + (a − 1) ⊙ k_a)
        let weighed = k.broadcast_mul(&self.k_a.to_dtype(sums)?)?;
        let k = ((k - &weighed)? + Activation::Sigmoid.gate(&rate, &weighed)?)?;
        let own = by_head(&(r.to_dtype(sums)? * &k)?)?.broadcast_mul(&self.r_k.to_dtype(sums)?)?;
        let own = own.sum_keepdim(D::Minus1)?.to_dtype(dtype)?;
        let logits = self.decay.forward(for_w, products)?.to_dtype(sums)?;
        let log_decay = (Activation::Sigmoid.forward(&logits)? * -(-0.5f64).exp())?;
        let operands = [r, k.to_dtype(dtype)?, v.clone(), written.to_dtype(dtype)?, kappa.to_dtype(dtype)?, log_decay];
        Ok(Rows {
            operands: operands.iter().map(|rows| split(rows, self.heads)).collect::<Result<_>>()?,
            bonus: by_head(&v)?.broadcast_mul(&own)?,
            gate: by_head(&self.gate.forward(for_g, products)?)?,
        })
    }

    /// The rows of the layer, from `out` `[B, heads, N, width]`.
    fn finish(&self, out: &Tensor, rows: &Rows, products: Products) -> Result<Tensor> {
        let normed = self.norm.forward(&out.transpose(1, 2)?.contiguous()?)?;
        let gated = ((normed + &rows.bonus)? * &rows.gate)?;
        self.outward.forward(&gated.flatten_from(2)?, products)
    }
}

fn decayed(log_decay: Tensor) -> DeltaOptions<Tensor> {
    DeltaOptions { log_decay: Some(log_decay), scale: Some(1.0), ..Default::default() }
}

impl LowRank {
    fn new([input, rank, output]: [usize; 3], between: Between, bias: bool, weights: &VarBuilder) -> Result<Self> {
        let down = Projection::new(input, rank, false, weights.pp("0"))?;
        // Little beside the bias at first.
        let init = Init::Randn { mean: 0.0, stdev: 0.1 / (rank as f64).sqrt() };
        weights.pp("2").get_with_hints((output, rank), "weight", init)?;
        Ok(Self { down, between, up: Projection::new(rank, output, bias, weights.pp("2"))? })
    }

    fn forward(&self, x: &Tensor, products: Products) -> Result<Tensor> {
        let narrow = self.down.forward(x, products)?;
        let narrow = match self.between {
            Between::Nothing => narrow,
            Between::Tanh => narrow.tanh()?,
            Between::Sigmoid => Activation::Sigmoid.forward(&narrow)?,
        };
        self.up.forward(&narrow, products)
    }
}

/// How fresh weights of a layer begin.
struct Beginning {
    /// The layer's number, and how many there are.
    place: [usize; 2],
    /// Of a head, and of all.
    width: usize,
    inner: usize,
}

impl Beginning {
    /// A weight that begins with a function of the channel.
    fn vector(
        &self,
        weights: &VarBuilder,
        name: &str,
        shape: &[usize],
        first: &dyn Fn(usize) -> f64,
    ) -> Result<Tensor> {
        let init = (Init::Const(0.0), weights.dtype());
        begun(weights, name, shape, init, |drawn| Ok((0..drawn.len()).map(first).collect()))
    }

    /// From 1 in the first layer to nearly 0.
    fn rest(&self) -> f64 {
        1.0 - self.place[0] as f64 / self.place[1] as f64
    }

    /// Of the norm.
    fn scale(&self) -> f64 {
        ((self.place[0] + 1) as f64 / self.place[1] as f64).powf(0.7)
    }

    /// From 0 to 1 over all channels.
    fn share(&self, channel: usize) -> f64 {
        channel as f64 / (self.inner - 1).max(1) as f64
    }

    /// From −½ to ½ over all channels.
    fn line(&self, channel: usize) -> f64 {
        self.share(channel) - 0.5
    }

    /// From −1 to 1 over the channels of every head, flat in the middle.
    fn wave(&self, channel: usize) -> f64 {
        let half = (self.width as f64 - 1.0) / 2.0;
        let place = ((channel % self.width) as f64 - half) / half.max(0.5);
        place * place.abs()
    }

    fn decay(&self, channel: usize) -> f64 {
        let depth = self.place[0] as f64 / (self.place[1] - 1).max(1) as f64;
        -5.5 + 6.0 * self.share(channel).powf(1.0 + depth.powf(0.3)) + 2.5 * self.wave(channel)
    }

    fn rate(&self, channel: usize) -> f64 {
        -0.19 + 0.3 * self.wave(channel) + 0.4 * self.line(channel)
    }
}
