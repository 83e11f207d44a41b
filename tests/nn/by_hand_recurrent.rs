//! Recurrent layers in plain f64 loops around the reference operations.

use attn_kernels::ConvolutionOptions;
use attn_kernels::delta::DeltaOptions;
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::nn::{Mechanism, Slopes};
use attn_kernels::problem::RankOne;
use attn_kernels::reference::{self, Array, ConvolutionInputs, SelectiveScan};

use super::by_hand::{ByHand, join, silu, split, times};

/// Columns of [1, B, N, width].
pub fn columns(x: &Array, first: usize, count: usize) -> Array {
    let [_, batch, rows, _] = x.shape;
    Array::from_fn([1, batch, rows, count], |[_, b, i, c]| x.row(0, b, i)[first + c])
}

pub fn map(mut x: Array, f: impl Fn(f64) -> f64) -> Array {
    x.data.iter_mut().for_each(|x| *x = f(*x));
    x
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    x.exp().ln_1p()
}

/// [1, B, N, H] → [1, B, H, N]
fn heads_first(x: &Array) -> Array {
    let [_, batch, rows, heads] = x.shape;
    Array::from_fn([1, batch, heads, rows], |[_, b, h, i]| x.row(0, b, i)[h])
}

impl ByHand<'_> {
    /// x [1, B, N, width], visible tokens first.
    pub fn recurrent(&self, x: &Array, key_mask: Array) -> Array {
        let (heads, key_heads) = (self.config.heads, self.config.key_heads());
        let inner = heads * self.config.head_width();
        let apart = |has_convolution: bool| {
            ["q", "k", "v"].map(|name| {
                let rows = self.project(x, &format!("{name}_proj"));
                if has_convolution { self.convolved(rows, &format!("{name}_conv1d")) } else { rows }
            })
        };
        match self.config.mechanism {
            Mechanism::Gla { gate_divisor, convolution, epsilon, .. } => {
                let [q, k, v] = apart(convolution.is_some());
                let gate = self.linear(&self.linear(x, "gk_proj.0"), "gk_proj.1");
                let log_decay = map(gate, |x| -softplus(-x) / gate_divisor);
                let options = DeltaOptions {
                    log_decay: Some(split(&log_decay, key_heads)),
                    key_mask: Some(key_mask),
                    ..Default::default()
                };
                let operands = [&split(&q, heads), &split(&k, key_heads), &split(&v, key_heads)];
                let out = reference::delta_attention(operands, RankOne::None, &options, None).0;
                let normed = self.normed_heads(&out, "g_norm_swish_gate", epsilon);
                self.project(&times(normed, &silu(self.project(x, "g_proj"))), "o_proj")
            }
            Mechanism::Deltanet { gate, negative_eigenvalues, epsilon, .. } => {
                let [q, k, v] = apart(true);
                let factor = if negative_eigenvalues { 2.0 } else { 1.0 };
                let beta = map(self.project(x, "b_proj"), |x| factor * sigmoid(x));
                let out = rule([split(&q, heads), split(&k, heads), split(&v, heads)], &beta, None, key_mask);
                let normed = self.normed_heads(&out, "o_norm", epsilon);
                let gated = if gate { times(normed, &silu(self.project(x, "g_proj"))) } else { normed };
                self.project(&gated, "o_proj")
            }
            Mechanism::GatedDeltanet { epsilon, .. } => {
                let rows = self.convolved(self.project(x, "in_proj_qkv"), "conv1d");
                let keys = (rows.shape[3] - inner) / 2;
                let [q, k] = [0, keys].map(|first| split(&columns(&rows, first, keys), key_heads));
                let v = split(&columns(&rows, 2 * keys, inner), heads);
                let beta = map(self.project(x, "in_proj_b"), sigmoid);
                let log_decay = heads_first(&self.steps(self.project(x, "in_proj_a"), true));
                let out = rule([q, k, v], &beta, Some(log_decay), key_mask);
                let normed = self.normed_heads(&out, "norm", epsilon);
                self.project(&times(normed, &silu(self.project(x, "in_proj_z"))), "out_proj")
            }
            Mechanism::Kda { epsilon, .. } => {
                let [q, k, v] = apart(true);
                let beta = map(self.project(x, "b_proj"), sigmoid);
                let log_decay = self.steps(self.project(&self.project(x, "f_a_proj"), "f_b_proj"), true);
                let log_decay = Some(split(&log_decay, heads));
                let out = rule([split(&q, heads), split(&k, heads), split(&v, heads)], &beta, log_decay, key_mask);
                let normed = self.normed_heads(&out, "o_norm", epsilon);
                let gate = map(self.project(&self.project(x, "g_a_proj"), "g_b_proj"), sigmoid);
                self.project(&times(normed, &gate), "o_proj")
            }
            Mechanism::Mamba2 { key_width, epsilon, .. } => {
                let (all, groups) = (self.project(x, "in_proj"), key_heads * key_width);
                let z = columns(&all, 0, inner);
                let rows = self.convolved(columns(&all, inner, inner + 2 * groups), "conv1d");
                let values = columns(&rows, 0, inner);
                let [k, q] = [inner, inner + groups].map(|first| split(&columns(&rows, first, groups), key_heads));
                let steps = columns(&all, 2 * inner + 2 * groups, heads);
                let (steps, log_decay) = (self.steps(steps.clone(), false), heads_first(&self.steps(steps, true)));
                let head = self.config.head_width();
                let scaled =
                    Array::from_fn(values.shape, |[_, b, i, c]| values.row(0, b, i)[c] * steps.row(0, b, i)[c / head]);
                let out = join(&sums([q, k, split(&scaled, heads)], log_decay, key_mask));
                let skip = self.weight("D").unwrap();
                let skipped = Array::from_fn(out.shape, |[_, b, i, c]| {
                    out.row(0, b, i)[c] + skip.data[c / head] * values.row(0, b, i)[c]
                });
                self.project(&self.normed(&times(skipped, &silu(z)), "norm", epsilon), "out_proj")
            }
            Mechanism::Mamba { states, .. } => {
                let all = self.project(x, "in_proj");
                let (u, z) = (self.convolved(columns(&all, 0, inner), "conv1d"), columns(&all, inner, inner));
                let choices = self.linear(&u, "x_proj");
                let rank = choices.shape[3] - 2 * states;
                let a_log = self.weight("A_log").unwrap();
                let operands = SelectiveScan {
                    delta: map(self.linear(&columns(&choices, 0, rank), "dt_proj"), softplus),
                    a: map(Array { shape: [1, 1, inner, states], ..a_log }, |x| -x.exp()),
                    b: columns(&choices, rank, states),
                    c: columns(&choices, rank + states, states),
                    skip: Array { shape: [1, 1, 1, inner], ..self.weight("D").unwrap() },
                    state: Array::zeros([1, x.shape[1], inner, states]),
                    u,
                };
                let [y, _] = reference::selective_scan(&operands);
                self.project(&times(y, &silu(z)), "out_proj")
            }
            Mechanism::Lightning { slopes, place, epsilon } => {
                let (all, head) = (silu(self.project(x, "qkv_proj")), self.config.head_width());
                let [q, k, v] = [0, 1, 2].map(|part| {
                    let [_, batch, rows, _] = all.shape;
                    Array::from_fn([batch, heads, rows, head], |[b, h, i, d]| {
                        all.row(0, b, i)[(3 * h + part) * head + d]
                    })
                });
                let [layer, layers] = place.unwrap_or([0, 1]).map(|number| number as f64);
                let count = heads as f64;
                let slope = |head: usize| match slopes {
                    Slopes::Geometric => {
                        let base: f64 = 1.0 / 2f64.powf(8.0 / count);
                        base.powf(head as f64 + 1.0) * (1.0 - layer / (layers - 1.0 + 1e-5) + 1e-5)
                    }
                    Slopes::Linear => 8.0 / count * (1.0 - layer / layers) * head as f64,
                };
                let log_decay = Array { data: (0..heads).map(|h| -slope(h)).collect(), shape: [1, 1, 1, heads] };
                let out = join(&sums([q, k, v], log_decay, key_mask));
                let gate = map(self.project(x, "output_gate"), sigmoid);
                self.project(&times(self.normed(&out, "norm", epsilon), &gate), "out_proj")
            }
            Mechanism::Rwkv7 { .. } => self.rwkv7(x, key_mask),
            Mechanism::S4d { .. } => self.s4d(x),
            Mechanism::Lru { .. } => self.lru(x),
            _ => panic!("not a recurrent layer"),
        }
    }

    /// silu of the convolution.
    fn convolved(&self, x: Array, name: &str) -> Array {
        let mut weight = self.weight(&format!("{name}.weight")).unwrap();
        let [_, channels, one, taps] = weight.shape;
        assert_eq!(one, 1);
        weight.shape = [1, 1, channels, taps];
        let bias = self.weight(&format!("{name}.bias"));
        let inputs = ConvolutionInputs { x, weight, bias, state: None };
        reference::causal_convolution(&inputs, &ConvolutionOptions { silu: true, ..Default::default() })
    }

    /// softplus(x + b), or −e^A times that.
    fn steps(&self, x: Array, is_decay: bool) -> Array {
        let (bias, rates) = (self.weight("dt_bias").unwrap(), self.weight("A_log").unwrap());
        let width = x.shape[3] / self.config.heads;
        Array::from_fn(x.shape, |[_, b, i, c]| {
            let step = softplus(x.row(0, b, i)[c] + bias.data[c]);
            if is_decay { -rates.data[c / width].exp() * step } else { step }
        })
    }

    /// RMS norm of rows [1, B, N, width].
    fn normed(&self, x: &Array, name: &str, epsilon: f64) -> Array {
        let weight = self.weight(&format!("{name}.weight")).unwrap();
        let width = weight.data.len();
        Array::from_fn(x.shape, |[_, b, i, c]| {
            let row = &x.row(0, b, i)[c / width * width..][..width];
            let squares = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
            x.row(0, b, i)[c] / (squares + epsilon).sqrt() * weight.data[c % width]
        })
    }

    /// The same of every head of [B, H, N, E], as [1, B, N, H·E].
    fn normed_heads(&self, out: &Array, name: &str, epsilon: f64) -> Array {
        assert_eq!(self.weight(&format!("{name}.weight")).unwrap().data.len(), out.shape[3]);
        self.normed(&join(out), name, epsilon)
    }
}

/// The delta rule with β [1, B, N, H].
fn rule([q, k, v]: [Array; 3], beta: &Array, log_decay: Option<Array>, key_mask: Array) -> Array {
    let options = DeltaOptions { log_decay, normalize: Some(1e-6), key_mask: Some(key_mask), ..Default::default() };
    let beta = heads_first(beta);
    reference::delta_attention([&q, &k, &v], RankOne::Rule { beta: &beta }, &options, None).0
}

/// Decayed sums without a divisor.
fn sums([q, k, v]: [Array; 3], log_decay: Array, key_mask: Array) -> Array {
    let (log_decay, key_mask) = (Some(log_decay), Some(key_mask));
    let (map, normalizer) = (FeatureMap::Identity, None);
    let options = LinearOptions { map, causal: true, normalizer, log_decay, key_mask, sequences: None };
    reference::linear_attention(&q, &k, &v, &options)
}
