//! The linear recurrent unit. Names of the weights are those of the paper's program.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::kinds::Reader;
use super::scanned::{GatedOutput, by_sequence, check_key_mask};
use super::sizes;
use crate::candle::engine::accumulator;
use crate::candle::nn::batch::Batch;
use crate::candle::nn::cache::{Cache, Recurrence};
use crate::candle::nn::config::AttentionConfig;
use crate::candle::nn::fresh::begun;
use crate::candle::nn::mechanism::Mechanism;
use crate::candle::nn::pieces::{Piece, side_by_side};
use crate::candle::nn::projection::{Products, Projection};
use crate::candle::{complex_diagonal_scan, complex_diagonal_scan_with_state};
use crate::scan::ScanOptions;

#[derive(Debug, Clone)]
pub(in crate::candle::nn) struct Lru {
    /// |λ| = exp(−e^ν) and arg λ = e^θ, `[states]`
    nu_log: Tensor,
    theta_log: Tensor,
    /// ln γ `[states]`
    gamma_log: Tensor,
    /// Real and imaginary part of B `[states, width]`, and of C `[width, states]`.
    inward: [Projection; 2],
    outward: [Projection; 2],
    /// D `[width]`
    skip: Tensor,
    output: GatedOutput,
}

impl Lru {
    pub fn new(config: &AttentionConfig, weights: &VarBuilder) -> Result<Self> {
        let Mechanism::Lru { states, radii: [inner, outer], phase } = config.mechanism else {
            candle_core::bail!("{} is not lru", config.mechanism.name())
        };
        let (width, states) = (config.width, states.unwrap_or(config.width));
        let read = Reader { config, weights, sizes: sizes(config) };
        let uniform = (Init::Uniform { lo: 0.0, up: 1.0 }, accumulator(weights.dtype()));
        let drawn = |name: &str, number: &dyn Fn(f64) -> f64| {
            begun(weights, name, states, uniform, |drawn| Ok(drawn.into_iter().map(number).collect()))
        };
        // Even on the ring between the radii: |λ|² is.
        let square = |share: f64| inner * inner + share * (outer * outer - inner * inner);
        // An |λ| of 0 or 1 would have no logarithm.
        let nu_log = drawn("nu_log", &|share| (-0.5 * square(share).clamp(1e-12, 1.0 - 1e-12).ln()).ln())?;
        let theta_log = drawn("theta_log", &|share| (phase * share).max(1e-12).ln())?;
        let gamma_log = begun(weights, "gamma_log", states, uniform, |_| {
            let nu: Vec<f64> = nu_log.to_dtype(DType::F64)?.to_vec1()?;
            // ln √(1 − |λ|²)
            Ok(nu.into_iter().map(|nu| 0.5 * (-(-2.0 * nu.exp()).exp_m1()).ln()).collect())
        })?;
        let matrix = |name: &str, shape: (usize, usize), variance: f64| {
            let init = Init::Randn { mean: 0.0, stdev: variance.sqrt() };
            weights.get_with_hints(shape, name, init).map(Projection::of)
        };
        let [spread_in, spread_out] = [2.0 * width as f64, states as f64].map(f64::recip);
        Ok(Self {
            nu_log,
            theta_log,
            gamma_log,
            inward: [matrix("B_re", (states, width), spread_in)?, matrix("B_im", (states, width), spread_in)?],
            outward: [matrix("C_re", (width, states), spread_out)?, matrix("C_im", (width, states), spread_out)?],
            skip: read.numbers("D", width, Init::Randn { mean: 0.0, stdev: 1.0 })?,
            output: GatedOutput { value: read.projection("out1", width)?, gate: read.projection("out2", width)? },
        })
    }

    pub fn forward(&self, x: &Tensor, batch: Batch<'_>) -> Result<Tensor> {
        check_key_mask(x, batch)?;
        let added = self.added(x, Products::Joint)?;
        let [a_re, a_im] = self.eigenvalues()?;
        let states = by_sequence(&Tensor::cat(&added, 2)?, batch, |tokens| {
            let [re, im] = added.each_ref().map(|part| part.narrow(1, tokens.start, tokens.len()));
            let h = complex_diagonal_scan([&a_re, &a_im], [&re?, &im?], &ScanOptions::default())?;
            Tensor::cat(&h, 2)
        })?;
        self.finish(x, &states, Products::Joint)
    }

    /// The rows after those of the caches, which take them in.
    pub fn forward_cached(&self, x: &Tensor, pieces: &mut [Piece<&mut Cache>]) -> Result<Tensor> {
        let [re, im] = self.added(x, Products::Alone)?;
        let [a_re, a_im] = self.eigenvalues()?;
        let states = side_by_side(&[&re.unsqueeze(1)?, &im.unsqueeze(1)?], pieces, |added, cache| {
            let before = cache.recurrence()?;
            let (re, im) = (added[0].squeeze(1)?, added[1].squeeze(1)?);
            let state = before.as_ref().map(|before| before.s.chunk(2, 1)).transpose()?;
            let state = state.as_deref().map(|parts| [&parts[0], &parts[1]]);
            let (h, last) =
                complex_diagonal_scan_with_state([&a_re, &a_im], [&re, &im], &ScanOptions::default(), state)?;
            *before = Some(Recurrence { s: Tensor::cat(&last, 1)?.detach(), inputs: Vec::new() });
            Tensor::cat(&h, 2)?.unsqueeze(1)
        })?;
        self.finish(x, &states.squeeze(1)?, Products::Alone)
    }

    /// λ, real and imaginary part `[1, 1, states]`.
    fn eigenvalues(&self) -> Result<[Tensor; 2]> {
        let (radius, phase) = (self.nu_log.exp()?.neg()?.exp()?, self.theta_log.exp()?);
        let part = |part: Tensor| (&radius * part)?.reshape((1, 1, ()));
        Ok([part(phase.cos()?)?, part(phase.sin()?)?])
    }

    /// γ ⊙ x B, real and imaginary part `[B, N, states]`.
    fn added(&self, x: &Tensor, products: Products) -> Result<[Tensor; 2]> {
        let sums = self.gamma_log.dtype();
        let gamma = self.gamma_log.exp()?;
        let part = |matrix: &Projection| matrix.forward(x, products)?.to_dtype(sums)?.broadcast_mul(&gamma);
        Ok([part(&self.inward[0])?, part(&self.inward[1])?])
    }

    /// The rows of the layer, from its input x and the states, real parts before imaginary ones.
    fn finish(&self, x: &Tensor, states: &Tensor, products: Products) -> Result<Tensor> {
        let parts = states.to_dtype(x.dtype())?.chunk(2, 2)?;
        let part = |index: usize| self.outward[index].forward(&parts[index].contiguous()?, products);
        let skipped = x.to_dtype(self.skip.dtype())?.broadcast_mul(&self.skip)?.to_dtype(x.dtype())?;
        self.output.forward(&((part(0)? - part(1)?)? + skipped)?, products)
    }
}
