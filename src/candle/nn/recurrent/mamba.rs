//! Mamba: a selective scan behind a short convolution. Names of the weights are those of transformers.

use std::ops::Range;

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::kinds::Reader;
use super::scanned::{by_sequence, check_key_mask};
use super::short_convolution::{Place, ShortConvolution};
use super::sizes;
use crate::activation::Activation;
use crate::candle::nn::batch::Batch;
use crate::candle::nn::cache::{Cache, Recurrence};
use crate::candle::nn::config::AttentionConfig;
use crate::candle::nn::mechanism::Mechanism;
use crate::candle::nn::pieces::{Piece, side_by_side};
use crate::candle::nn::projection::{Products, Projection};
use crate::candle::{selective_scan, selective_scan_with_state};
use crate::scan::SelectiveScanOptions;

#[derive(Debug, Clone)]
pub(in crate::candle::nn) struct Mamba {
    /// Rows u and z.
    inward: [Projection; 2],
    convolution: ShortConvolution,
    /// Rows that Δ is made of, B and C, from convolved rows.
    choices: Projection,
    /// Their widths.
    parts: [usize; 3],
    /// Δ is the softplus of this.
    steps: Projection,
    /// A = −e^this, `[channels, states]`
    a_log: Tensor,
    options: SelectiveScanOptions<Tensor>,
    outward: Projection,
}

/// The operands of the scan.
struct Operands {
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
}

impl Mamba {
    pub fn new(config: &AttentionConfig, weights: &VarBuilder) -> Result<Self> {
        let Mechanism::Mamba { states, convolution, convolution_bias, .. } = config.mechanism else {
            candle_core::bail!("{} is not mamba", config.mechanism.name())
        };
        let (inner, rank) = (config.head_width(), config.mechanism.rank(config.width));
        let read = Reader { config, weights, sizes: sizes(config) };
        let joined = read.projection("in_proj", 2 * inner)?;
        // Steps between 0.001 and 0.1, evenly on the logarithmic scale, and rates between 1 and the number of states.
        let bias = Init::Uniform { lo: 0.001f64.ln(), up: 0.1f64.ln() };
        let rates = Init::Uniform { lo: 0.0, up: (states as f64).ln().max(1e-3) };
        Ok(Self {
            inward: [joined.part(0, inner)?, joined.part(inner, inner)?],
            convolution: read.convolution("conv1d", [inner, convolution], convolution_bias)?,
            choices: Projection::new(inner, rank + 2 * states, false, weights.pp("x_proj"))?,
            parts: [rank, states, states],
            steps: Projection::with_bias(rank, inner, bias, weights.pp("dt_proj"))?,
            a_log: read.numbers("A_log", (inner, states), rates)?,
            options: SelectiveScanOptions { skip: Some(read.numbers("D", inner, Init::Const(1.0))?) },
            outward: read.outward("out_proj", inner)?,
        })
    }

    /// Removed tokens stand behind the others, which do not see them.
    pub fn forward(&self, x: &Tensor, batch: Batch<'_>) -> Result<Tensor> {
        check_key_mask(x, batch)?;
        let rows = self.inward[0].forward(x, Products::Joint)?;
        let (Operands { u, delta, a, b, c }, _) =
            self.operands(&rows, Place::Whole(batch.sequences), Products::Joint)?;
        let scan = |tokens: Range<usize>| {
            let [u, delta, b, c] = [&u, &delta, &b, &c].map(|rows| rows.narrow(1, tokens.start, tokens.len()));
            selective_scan(&u?, &delta?, &a, &b?, &c?, &self.options)
        };
        let y = by_sequence(&u, batch, scan)?;
        self.outward(x, &y, Products::Joint)
    }

    /// The rows after those of the caches, which take them in.
    pub fn forward_cached(&self, x: &Tensor, pieces: &mut [Piece<&mut Cache>]) -> Result<Tensor> {
        let rows = self.inward[0].forward(x, Products::Alone)?.unsqueeze(1)?;
        let y = side_by_side(&[&rows], pieces, |rows, cache| {
            let before = cache.recurrence()?;
            let place = Place::After(before.as_ref());
            let (Operands { u, delta, a, b, c }, last) = self.operands(&rows[0].squeeze(1)?, place, Products::Alone)?;
            let state = before.as_ref().map(|before| &before.s);
            let (y, s) = selective_scan_with_state(&u, &delta, &a, &b, &c, &self.options, state)?;
            *before = Some(Recurrence { s: s.detach(), inputs: last.iter().map(Tensor::detach).collect() });
            y.unsqueeze(1)
        })?;
        self.outward(x, &y.squeeze(1)?, Products::Alone)
    }

    /// The operands of rows `[B, N, channels]`, and the last of these where they go on from a state.
    fn operands(&self, rows: &Tensor, place: Place<'_>, products: Products) -> Result<(Operands, Option<Tensor>)> {
        let (u, last) = self.convolution.forward(rows, place, 0)?;
        let all = self.choices.forward(&u, products)?;
        let [rank, states, _] = self.parts;
        let part = |first: usize, count: usize| all.narrow(2, first, count);
        let steps = self.steps.forward(&part(0, rank)?, products)?;
        let a = self.a_log.exp()?.neg()?;
        let delta = Activation::Softplus.forward(&steps)?;
        Ok((Operands { u, delta, a, b: part(rank, states)?, c: part(rank + states, states)? }, last))
    }

    /// The rows of the layer, from its input x and those of the scan.
    fn outward(&self, x: &Tensor, y: &Tensor, products: Products) -> Result<Tensor> {
        let z = self.inward[1].forward(x, products)?;
        self.outward.forward(&Activation::Silu.gate(&z, y)?, products)
    }
}
