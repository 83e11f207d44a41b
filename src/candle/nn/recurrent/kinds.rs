//! Which parts every kind has, and what they are called among its weights: GLA and DeltaNet as in flash-linear-attention,
//! Gated DeltaNet as in Qwen3.5, KDA as in Kimi Linear, Mamba-2 and lightning attention (MiniMax) as in transformers.

use candle_core::{Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::decay::Decay;
use super::logits::Logits;
use super::output::{Gate, Output};
use super::short_convolution::ShortConvolution;
use super::{Inward, Recurrent, Sizes, Stream};
use crate::activation::Activation;
use crate::candle::engine::accumulator;
use crate::candle::nn::config::AttentionConfig;
use crate::candle::nn::mechanism::Mechanism;
use crate::candle::nn::norm::{Norm, NormConfig, NormKind};
use crate::candle::nn::projection::Projection;

/// Weights beside projections that some kind of the chain has.
const CHAINS: [&str; 22] = [
    "gk_proj.0.weight",
    "gk_proj.0.bias",
    "gk_proj.1.weight",
    "gk_proj.1.bias",
    "q_conv1d.weight",
    "k_conv1d.weight",
    "v_conv1d.weight",
    "q_conv1d.bias",
    "k_conv1d.bias",
    "v_conv1d.bias",
    "conv1d.weight",
    "conv1d.bias",
    "A_log",
    "dt_bias",
    "D",
    "g_norm_swish_gate.weight",
    "o_norm.weight",
    "norm.weight",
    "norm.bias",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
];
/// Those of RWKV-7, at the end of layers behind the first.
const RWKV7: [&str; 22] = [
    "x_r",
    "x_w",
    "x_k",
    "x_v",
    "x_a",
    "x_g",
    "k_k",
    "k_a",
    "r_k",
    "w_lora.lora.0.weight",
    "w_lora.lora.2.weight",
    "w_lora.lora.2.bias",
    "a_lora.lora.0.weight",
    "a_lora.lora.2.weight",
    "a_lora.lora.2.bias",
    "g_lora.lora.0.weight",
    "g_lora.lora.2.weight",
    "g_norm.weight",
    "g_norm.bias",
    "v_lora.lora.0.weight",
    "v_lora.lora.2.weight",
    "v_lora.lora.2.bias",
];
const S4D: [&str; 5] = ["D", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag"];
const LRU: [&str; 8] = ["D", "nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im"];

/// Weights beside projections that some kind has.
pub(in crate::candle::nn) fn all_others<'a>() -> impl Iterator<Item = &'a str> {
    [&CHAINS[..], &RWKV7, &S4D, &LRU].concat().into_iter()
}

/// Those that a kind has; none of other mechanisms.
pub(in crate::candle::nn) fn other_weights(mechanism: &Mechanism) -> &'static [&'static str] {
    const CONVOLUTIONS: [&str; 3] = ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"];
    const GLA: [&str; 7] = [
        "gk_proj.0.weight",
        "gk_proj.1.weight",
        "gk_proj.1.bias",
        "g_norm_swish_gate.weight",
        CONVOLUTIONS[0],
        CONVOLUTIONS[1],
        CONVOLUTIONS[2],
    ];
    const DELTA: [&str; 6] = [CONVOLUTIONS[0], CONVOLUTIONS[1], CONVOLUTIONS[2], "o_norm.weight", "A_log", "dt_bias"];
    const JOINED: [&str; 6] = ["conv1d.weight", "A_log", "dt_bias", "norm.weight", "D", "conv1d.bias"];
    const MAMBA: [&str; 7] =
        ["conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D", "conv1d.bias"];
    match mechanism {
        Mechanism::Gla { convolution: None, .. } => &GLA[..4],
        Mechanism::Gla { .. } => &GLA,
        Mechanism::Deltanet { .. } => &DELTA[..4],
        Mechanism::Kda { .. } => &DELTA,
        Mechanism::GatedDeltanet { .. } => &JOINED[..4],
        Mechanism::Mamba2 { convolution_bias: false, .. } => &JOINED[..5],
        Mechanism::Mamba2 { .. } => &JOINED,
        Mechanism::Lightning { .. } => &["norm.weight"],
        Mechanism::Mamba { convolution_bias: false, .. } => &MAMBA[..6],
        Mechanism::Mamba { .. } => &MAMBA,
        Mechanism::Rwkv7 { place: None | Some([0, _]), .. } => &RWKV7[..RWKV7.len() - 3],
        Mechanism::Rwkv7 { .. } => &RWKV7,
        Mechanism::S4d { .. } => &S4D,
        Mechanism::Lru { .. } => &LRU,
        _ => &[],
    }
}

/// Heads and widths of a layer that [is recurrent](Mechanism::is_recurrent).
pub(in crate::candle::nn) fn sizes(config: &AttentionConfig) -> Sizes {
    let (heads, key_heads, value_width) = (config.heads, config.key_heads(), config.head_width());
    let equal = |key_width| Sizes { query_heads: heads, key_heads, value_heads: key_heads, key_width, value_width };
    let more_values =
        |key_width| Sizes { query_heads: key_heads, key_heads, value_heads: heads, key_width, value_width };
    match config.mechanism {
        Mechanism::Gla { key_width, .. } => equal(key_width.unwrap_or((value_width / 2).max(1))),
        Mechanism::Deltanet { key_width, .. } => equal(key_width.unwrap_or(value_width)),
        Mechanism::GatedDeltanet { key_width, .. } => more_values(key_width.unwrap_or(value_width)),
        Mechanism::Mamba2 { key_width, .. } => more_values(key_width),
        _ => equal(value_width),
    }
}

/// Reads weights by their names.
pub(super) struct Reader<'a, 'w> {
    pub config: &'a AttentionConfig,
    pub weights: &'a VarBuilder<'w>,
    pub sizes: Sizes,
}

impl Recurrent {
    pub fn new(config: &AttentionConfig, weights: &VarBuilder) -> Result<Self> {
        let sizes = sizes(config);
        let read = Reader { config, weights, sizes };
        let [queries, keys, values] = sizes.widths();
        let inner = sizes.heads() * sizes.value_width;
        let silu = |logits, is_first| Some(Gate { logits, activation: Activation::Silu, is_first });
        let (inward, decay, beta, output) = match &config.mechanism {
            Mechanism::Gla { low_rank, gate_divisor, convolution, epsilon, .. } => {
                let down = read.unbiased("gk_proj.0", [config.width, *low_rank])?;
                let up = Projection::new(*low_rank, keys, true, weights.pp("gk_proj.1"))?;
                let decay = Decay::LogSigmoid { logits: Logits::LowRank([down, up]), divisor: *gate_divisor };
                let gate = silu(Logits::Plain(read.projection("g_proj", inner)?), false);
                let output = read.output(["g_norm_swish_gate", "o_proj"], *epsilon, false, gate)?;
                (read.apart(*convolution)?, decay, None, output)
            }
            Mechanism::Deltanet { convolution, gate, negative_eigenvalues, epsilon, .. } => {
                let gate = gate.then(|| read.projection("g_proj", inner)).transpose()?;
                let gate = gate.and_then(|gate| silu(Logits::Plain(gate), false));
                let factor = if *negative_eigenvalues { 2.0 } else { 1.0 };
                let beta = (read.projection("b_proj", sizes.value_heads)?, factor);
                let output = read.output(["o_norm", "o_proj"], *epsilon, false, gate)?;
                (read.apart(Some(*convolution))?, Decay::None, Some(beta), output)
            }
            Mechanism::GatedDeltanet { convolution, epsilon, .. } => {
                let joined = read.projection("in_proj_qkv", queries + keys + values)?;
                let convolution = read.convolution("conv1d", [queries + keys + values, *convolution], false)?;
                let inward = Inward::Apart([
                    Stream::part(&joined, &convolution, 0, 0, queries)?,
                    Stream::part(&joined, &convolution, 0, queries, keys)?,
                    Stream::part(&joined, &convolution, 0, queries + keys, values)?,
                ]);
                let decay = read.softplus(Logits::Plain(read.projection("in_proj_a", sizes.value_heads)?), false)?;
                let beta = (read.projection("in_proj_b", sizes.value_heads)?, 1.0);
                let gate = silu(Logits::Plain(read.projection("in_proj_z", inner)?), false);
                (inward, decay, Some(beta), read.output(["norm", "out_proj"], *epsilon, false, gate)?)
            }
            Mechanism::Kda { convolution, epsilon } => {
                let width = sizes.value_width;
                let low_rank = |[down, up]: [&str; 2], output| -> Result<_> {
                    let up = Projection::new(width, output, config.has_bias(up), weights.pp(up))?;
                    Ok(Logits::LowRank([read.projection(down, width)?, up]))
                };
                let decay = read.softplus(low_rank(["f_a_proj", "f_b_proj"], keys)?, true)?;
                let beta = (read.projection("b_proj", sizes.value_heads)?, 1.0);
                let logits = low_rank(["g_a_proj", "g_b_proj"], inner)?;
                let gate = Some(Gate { logits, activation: Activation::Sigmoid, is_first: false });
                let output = read.output(["o_norm", "o_proj"], *epsilon, false, gate)?;
                (read.apart(Some(*convolution))?, decay, Some(beta), output)
            }
            Mechanism::Mamba2 { convolution, convolution_bias, epsilon, .. } => {
                // Rows z, x, B, C, Δ.
                let joined = read.projection("in_proj", 2 * inner + keys + queries + sizes.heads())?;
                let taps = *convolution;
                let convolution = read.convolution("conv1d", [inner + keys + queries, taps], *convolution_bias)?;
                let stream = |first, count| Stream::part(&joined, &convolution, inner, first, count);
                let inward = Inward::Apart([stream(inner + keys, queries)?, stream(inner, keys)?, stream(0, inner)?]);
                let steps = joined.part(2 * inner + keys + queries, sizes.heads())?;
                let decay = read.softplus(Logits::Plain(steps), false)?;
                let gate = silu(Logits::Plain(joined.part(0, inner)?), true);
                let output = read.output(["norm", "out_proj"], *epsilon, true, gate)?;
                let skip = Some(read.numbers("D", sizes.heads(), Init::Const(1.0))?);
                (inward, decay, None, Output { skip, ..output })
            }
            Mechanism::Lightning { slopes, place, epsilon } => {
                let inward = Inward::ByHead(read.projection("qkv_proj", 3 * inner)?);
                let log_decay = slopes.log_decay(config.heads, place.unwrap_or([0, 1]));
                let log_decay = Tensor::from_vec(log_decay, config.heads, &Device::Cpu)?;
                let sums = accumulator(weights.dtype());
                let decay = Decay::Fixed(log_decay.to_dtype(sums)?.to_device(weights.device())?);
                let logits = Logits::Plain(read.projection("output_gate", inner)?);
                let gate = Some(Gate { logits, activation: Activation::Sigmoid, is_first: false });
                (inward, decay, None, read.output(["norm", "out_proj"], *epsilon, true, gate)?)
            }
            _ => candle_core::bail!("{} is no recurrent layer", config.mechanism.name()),
        };
        Ok(Self { sizes, inward, decay, beta, output })
    }
}

impl Stream {
    /// Channels of joined weights, those of the projection `before` further on.
    fn part(
        projection: &Projection,
        convolution: &ShortConvolution,
        before: usize,
        first: usize,
        count: usize,
    ) -> Result<Self> {
        let projection = projection.part(before + first, count)?;
        Ok(Self { projection, convolution: Some(convolution.part(first, count)?) })
    }
}

impl Reader<'_, '_> {
    /// From rows of the layer's width, with a bias if the configuration says so.
    pub fn projection(&self, name: &str, output: usize) -> Result<Projection> {
        Projection::new(self.config.width, output, self.config.has_bias(name), self.weights.pp(name))
    }

    /// To rows of the layer's width.
    pub fn outward(&self, name: &str, input: usize) -> Result<Projection> {
        Projection::new(input, self.config.width, self.config.has_bias(name), self.weights.pp(name))
    }

    fn unbiased(&self, name: &str, [input, output]: [usize; 2]) -> Result<Projection> {
        Projection::new(input, output, false, self.weights.pp(name))
    }

    pub fn convolution(&self, name: &str, shape: [usize; 2], bias: bool) -> Result<ShortConvolution> {
        ShortConvolution::new(shape, bias, self.weights.pp(name))
    }

    /// q, k and v with weights of their own.
    fn apart(&self, taps: Option<usize>) -> Result<Inward> {
        let [q, k, v] = self.sizes.widths();
        let stream = |name: &str, width: usize| -> Result<_> {
            let convolution = taps.map(|taps| self.convolution(&format!("{name}_conv1d"), [width, taps], false));
            let projection = self.projection(&format!("{name}_proj"), width)?;
            Ok(Stream { projection, convolution: convolution.transpose()? })
        };
        Ok(Inward::Apart([stream("q", q)?, stream("k", k)?, stream("v", v)?]))
    }

    /// Numbers in the dtype of sums.
    pub fn numbers(&self, name: &str, shape: impl Into<candle_core::Shape>, init: Init) -> Result<Tensor> {
        self.weights.get_with_hints_dtype(shape, name, init, accumulator(self.weights.dtype()))
    }

    /// Fresh ones have e^A between 1 and 16 and steps between 0.001 and 0.1, evenly on the logarithmic scale.
    fn softplus(&self, logits: Logits, by_channel: bool) -> Result<Decay> {
        let heads = self.sizes.heads();
        let rates = Init::Uniform { lo: 0.0, up: 16f64.ln() };
        let steps = Init::Uniform { lo: 0.001f64.ln(), up: 0.1f64.ln() };
        let has_steps = matches!(self.config.mechanism, Mechanism::Mamba2 { .. });
        let (a_log, count) = match by_channel {
            true => (self.numbers("A_log", (1, 1, heads, 1), rates)?, heads * self.sizes.key_width),
            false => (self.numbers("A_log", heads, rates)?, heads),
        };
        Ok(Decay::Softplus { logits, bias: self.numbers("dt_bias", count, steps)?, a_log, by_channel, has_steps })
    }

    fn output(
        &self,
        [norm, projection]: [&str; 2],
        epsilon: f64,
        is_whole: bool,
        gate: Option<Gate>,
    ) -> Result<Output> {
        let inner = self.sizes.heads() * self.sizes.value_width;
        let width = if is_whole { inner } else { self.sizes.value_width };
        let norm = Norm::new(
            width,
            &NormConfig { kind: NormKind::Rms, epsilon, ..Default::default() },
            self.weights.pp(norm),
        )?;
        let projection = self.outward(projection, inner)?;
        Ok(Output { skip: None, norm, is_whole, gate, projection })
    }
}
