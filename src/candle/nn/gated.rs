//! The gated units GAU and FLASH.

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::batch::Batch;
use super::cache::{Cache, Contents, Rows};
use super::config::AttentionConfig;
use super::mechanism::Mechanism;
use super::pieces::{Piece, positions, side_by_side};
use super::projection::{Products, Projection};
use crate::activation::Activation;
use crate::candle::engine::accumulator;
use crate::candle::rotary::Rotary;
use crate::candle::{
    LinearState, gau_attention, mixed_chunk_attention, mixed_chunk_attention_with_state, mixed_chunk_local,
};
use crate::gau::{GauNorm, GauOptions, GlobalNorm, MixedChunkOptions};
use crate::problem::{Mask, ensure_value};

#[derive(Debug, Clone)]
pub(super) struct GatedUnit {
    z: Projection,
    u: Projection,
    v: Projection,
    o: Projection,
    /// [heads, s]: q, k of GAU; local q, k and global q, k of FLASH
    gamma: Tensor,
    beta: Tensor,
    rotary: Option<Rotary>,
    bias: Option<RelativeBias>,
    kernel: Kernel,
}

#[derive(Debug, Clone)]
enum Kernel {
    Gau(GauOptions<Tensor>),
    Flash(MixedChunkOptions<Tensor>),
}

impl GatedUnit {
    pub fn new(config: &AttentionConfig, weights: &VarBuilder) -> Result<Self> {
        let (width, causal) = (config.width, config.causal);
        let (key_width, expansion, heads, reach, kernel) = match config.mechanism {
            Mechanism::Gau { key_width, expansion, norm, bias_reach } => {
                let mask = if causal { Mask::Causal } else { Mask::Full };
                let options = GauOptions { mask, norm, ..Default::default() };
                (key_width, expansion, 2, bias_reach, Kernel::Gau(options))
            }
            Mechanism::Flash { chunk, key_width, expansion, global_norm } => {
                let options = MixedChunkOptions { chunk_size: chunk, causal, global_norm, ..Default::default() };
                (key_width, expansion, 4, Some(chunk - 1), Kernel::Flash(options))
            }
            _ => candle_core::bail!("{} is no gated unit", config.mechanism.name()),
        };
        let values = expansion * width;
        let inward = |name: &str, output| Projection::new(width, output, config.has_bias(name), weights.pp(name));
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Self {
            z: inward("z_proj", key_width)?,
            u: inward("u_proj", values)?,
            v: inward("v_proj", values)?,
            o: Projection::new(values, width, config.has_bias("o_proj"), weights.pp("o_proj"))?,
            gamma: weights.get_with_hints((heads, key_width), "gamma", init)?,
            beta: weights.get_with_hints((heads, key_width), "beta", Init::Const(0.0))?,
            rotary: config.rotary.map(|rotary| Rotary::new(key_width, rotary)).transpose()?,
            bias: reach.map(|reach| RelativeBias::new(reach, causal, weights)).transpose()?,
            kernel,
        })
    }

    pub fn forward(&self, x: &Tensor, batch: Batch<'_>) -> Result<Tensor> {
        let rows = x.dim(1)?;
        let (affine, v) = self.project(x, &[(0, rows)], Products::Joint)?;
        let (key_mask, sequences) = (batch.key_mask.cloned(), batch.sequences.cloned());
        let out = match (&self.kernel, &affine[..]) {
            (Kernel::Gau(options), [q, k]) => {
                let options = GauOptions { key_mask, sequences, bias: self.bias(rows)?, ..options.clone() };
                gau_attention(q, k, &v, &options)?
            }
            (Kernel::Flash(options), [q, k, q_global, k_global]) => {
                let bias = self.bias(options.chunk_size)?;
                let options = MixedChunkOptions { key_mask, sequences, bias, ..options.clone() };
                mixed_chunk_attention(q, k, q_global, k_global, &v, &options)?
            }
            _ => candle_core::bail!("another number of affine heads"),
        };
        self.finish(x, &out, Products::Joint)
    }

    /// The rows after those of the caches, which take them in.
    pub fn forward_cached(&self, x: &Tensor, pieces: &mut [Piece<&mut Cache>]) -> Result<Tensor> {
        self.ensure_streamable()?;
        let (affine, v) = self.project(x, &positions(pieces), Products::Alone)?;
        let operands: Vec<&Tensor> = affine.iter().chain([&v]).collect();
        let out = side_by_side(&operands, pieces, |operands, cache| self.next(operands, cache))?;
        self.finish(x, &out, Products::Alone)
    }

    /// Attention of the next rows, affine heads and values, of the sequences of a cache, which takes them in.
    fn next(&self, operands: &[Tensor], cache: &mut Cache) -> Result<Tensor> {
        match (&self.kernel, operands, &mut cache.contents) {
            (Kernel::Gau(options), [q, k, v], Contents::Rows(rows)) => {
                let options = GauOptions { bias: self.bias(rows.len() + v.dim(2)?)?, ..options.clone() };
                let seen = rows.append(&[k, v])?;
                gau_attention(q, &seen[0], &seen[1], &options)
            }
            (Kernel::Flash(options), [q, k, q_global, k_global, v], Contents::Chunk(rows, state)) => {
                let options = MixedChunkOptions { bias: self.bias(options.chunk_size)?, ..options.clone() };
                Stream { options: &options, rows, state }.advance([q, k, q_global, k_global, v])
            }
            _ => candle_core::bail!("the cache is not one of this kind of layer"),
        }
    }

    /// Refuses weights that change with the length of the sequence.
    fn ensure_streamable(&self) -> Result<()> {
        let (argument, norm, holds) = match &self.kernel {
            Kernel::Gau(options) => {
                let holds = matches!(options.norm, GauNorm::RowSum { .. } | GauNorm::Fixed { .. });
                ("norm", format!("{:?}", options.norm), holds)
            }
            Kernel::Flash(options) => {
                ("global_norm", format!("{:?}", options.global_norm), options.global_norm != GlobalNorm::Length)
            }
        };
        let needs = "a norm that does not depend on the length of the whole sequence, to decode with a cache";
        Ok(ensure_value(holds, "Attention::forward_cached", argument, norm, needs)?)
    }

    fn bias(&self, rows: usize) -> Result<Option<Tensor>> {
        self.bias.as_ref().map(|bias| bias.table(rows.saturating_sub(1))).transpose()
    }

    /// The affine heads and the values, each `[B, 1, N, ·]`, of rows in pieces of so many from a position on.
    fn project(&self, x: &Tensor, pieces: &[(usize, usize)], products: Products) -> Result<(Vec<Tensor>, Tensor)> {
        let z = Activation::Silu.forward(&self.z.forward(x, products)?)?;
        let affine = (0..self.gamma.dim(0)?).map(|head| {
            let rows = z.broadcast_mul(&self.gamma.get(head)?)?.broadcast_add(&self.beta.get(head)?)?.unsqueeze(1)?;
            match &self.rotary {
                Some(rotary) => rotary.apply_to_pieces(&rows, pieces),
                None => Ok(rows),
            }
        });
        let v = Activation::Silu.forward(&self.v.forward(x, products)?)?.unsqueeze(1)?;
        Ok((affine.collect::<Result<_>>()?, v))
    }

    /// Passes `out` `[B, 1, N, e]` through the gate and projects.
    fn finish(&self, x: &Tensor, out: &Tensor, products: Products) -> Result<Tensor> {
        self.o.forward(&Activation::Silu.gate(&self.u.forward(x, products)?, &out.squeeze(1)?)?, products)
    }
}

/// A number per distance j − i, those beyond R equal to the one at R.
#[derive(Debug, Clone)]
struct RelativeBias {
    /// [2R + 1] from −R to R; [R + 1] from −R to 0 when causal
    numbers: Tensor,
    reach: usize,
    causal: bool,
}

impl RelativeBias {
    fn new(reach: usize, causal: bool, weights: &VarBuilder) -> Result<Self> {
        let count = if causal { reach + 1 } else { 2 * reach + 1 };
        let numbers = weights.get_with_hints(count, "relative_bias", Init::Randn { mean: 0.0, stdev: 0.02 })?;
        Ok(Self { numbers, reach, causal })
    }

    /// The table `[1, 2·reach + 1]` for an operation.
    fn table(&self, reach: usize) -> Result<Tensor> {
        let near = reach.min(self.reach);
        let far = reach - near;
        let past = self.numbers.narrow(0, self.reach - near, near + 1)?;
        let first = self.numbers.narrow(0, 0, 1)?.broadcast_as(far)?;
        let (future, last) = if self.causal {
            let hidden = Tensor::zeros(reach, self.numbers.dtype(), self.numbers.device())?;
            (hidden, None)
        } else {
            let last = self.numbers.narrow(0, 2 * self.reach, 1)?.broadcast_as(far)?;
            (self.numbers.narrow(0, self.reach + 1, near)?, Some(last))
        };
        let parts: Vec<Tensor> = [Some(first), Some(past), Some(future), last].into_iter().flatten().collect();
        let parts: Vec<Tensor> = parts.into_iter().filter(|part| part.elem_count() > 0).collect();
        Tensor::cat(&parts, 0)?.unsqueeze(0)
    }
}

/// Mixed chunk attention over pieces of any length.
struct Stream<'a> {
    options: &'a MixedChunkOptions<Tensor>,
    rows: &'a mut Rows,
    state: &'a mut Option<LinearState>,
}

impl Stream<'_> {
    /// Local q, k, global q, k and v of the next rows.
    fn advance(&mut self, inputs: [&Tensor; 5]) -> Result<Tensor> {
        let (total, chunk) = (inputs[0].dim(2)?, self.options.chunk_size);
        let (mut done, mut outs) = (0, Vec::new());
        loop {
            let left = total - done;
            let is_whole = self.rows.len() == 0 && left >= chunk;
            let count = if is_whole { left / chunk * chunk } else { left.min(chunk - self.rows.len()) };
            let [q, k, q_global, k_global, v] = inputs.map(|x| x.narrow(2, done, count));
            let piece = [q?, k?, q_global?, k_global?, v?];
            outs.push(if is_whole { self.whole_chunks(&piece)? } else { self.inside_chunk(&piece)? });
            done += count;
            if done == total {
                return Tensor::cat(&outs, 2);
            }
        }
    }

    fn whole_chunks(&mut self, [q, k, q_global, k_global, v]: &[Tensor; 5]) -> Result<Tensor> {
        let state = self.state.as_ref();
        let (out, next) = mixed_chunk_attention_with_state(q, k, q_global, k_global, v, self.options, state)?;
        *self.state = Some(next.detach());
        Ok(out)
    }

    /// Rows that do not go beyond the current chunk.
    fn inside_chunk(&mut self, [q, k, q_global, k_global, v]: &[Tensor; 5]) -> Result<Tensor> {
        let sums = accumulator(v.dtype());
        let seen = self.rows.append(&[k, k_global, v])?;
        let local = mixed_chunk_local(q, &seen[0], &seen[2], self.options)?;
        let out = match self.state.as_ref() {
            None => local,
            Some(state) => {
                let tokens = match self.options.global_norm {
                    GlobalNorm::Mean => state.position(),
                    GlobalNorm::Chunk | GlobalNorm::Length => self.options.chunk_size,
                };
                let global = q_global.to_dtype(sums)?.contiguous()?.matmul(state.s())?;
                (local + (global / tokens as f64)?)?
            }
        };
        if self.rows.len() == self.options.chunk_size {
            *self.state = Some(self.state_after(&seen[1].to_dtype(sums)?, &seen[2].to_dtype(sums)?)?);
            *self.rows = Rows::default();
        }
        out.to_dtype(v.dtype())
    }

    /// The state with a finished chunk of keys and values added.
    fn state_after(&self, k: &Tensor, v: &Tensor) -> Result<LinearState> {
        let (s, z) = (k.transpose(2, 3)?.contiguous()?.matmul(&v.contiguous()?)?, k.sum(2)?);
        Ok(match self.state.as_ref() {
            None => LinearState::new(s, z, None, self.options.chunk_size),
            Some(old) => {
                let position = old.position() + self.options.chunk_size;
                LinearState::new((old.s() + s)?, (old.z() + z)?, None, position)
            }
        })
    }
}
