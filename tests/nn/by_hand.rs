//! Attention layers in plain f64 loops around the reference operations.

use attn_kernels::gau::{GauOptions, MixedChunkOptions};
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::nn::{AttentionConfig, Mechanism, NormKind};
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::Mask;
use attn_kernels::random_features::random_features;
use attn_kernels::reference::{self, Array};
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{DiagOptions, NormOptions, NormScope};
use candle_core::{Result, Tensor};
use candle_nn::VarMap;

use super::positions;

/// A layer's configuration and weights.
pub struct ByHand<'a> {
    pub config: &'a AttentionConfig,
    pub variables: &'a VarMap,
}

pub fn array(tensor: &Tensor) -> Result<Array> {
    let dims = tensor.dims();
    let mut shape = [1; 4];
    shape[4 - dims.len()..].copy_from_slice(dims);
    Ok(Array { data: tensor.flatten_all()?.to_vec1()?, shape })
}

pub fn silu(mut x: Array) -> Array {
    x.data.iter_mut().for_each(|x| *x /= 1.0 + (-*x).exp());
    x
}

pub fn times(mut x: Array, y: &Array) -> Array {
    assert_eq!(x.shape, y.shape);
    x.data.iter_mut().zip(&y.data).for_each(|(x, y)| *x *= y);
    x
}

/// [1, B, N, H·D] → [B, H, N, D]
pub fn split(x: &Array, heads: usize) -> Array {
    let [_, batch, rows, width] = x.shape;
    let head = width / heads;
    Array::from_fn([batch, heads, rows, head], |[b, h, i, d]| x.row(0, b, i)[h * head + d])
}

/// [B, H, N, D] → [1, B, N, H·D]
pub fn join(x: &Array) -> Array {
    let [batch, heads, rows, head] = x.shape;
    Array::from_fn([1, batch, rows, heads * head], |[_, b, i, c]| x.row(b, c / head, i)[c % head])
}

impl ByHand<'_> {
    pub fn weight(&self, name: &str) -> Option<Array> {
        self.variables.data().lock().unwrap().get(name).map(|variable| array(variable).unwrap())
    }

    /// x W, plus the bias if there is one: [1, B, N, in] → [1, B, N, out]
    pub fn project(&self, x: &Array, name: &str) -> Array {
        assert_eq!(self.weight(&format!("{name}.bias")).is_some(), self.config.bias);
        self.linear(x, name)
    }

    pub fn linear(&self, x: &Array, name: &str) -> Array {
        let weight = self.weight(&format!("{name}.weight")).unwrap();
        let bias = self.weight(&format!("{name}.bias"));
        let [_, batch, rows, width] = x.shape;
        assert_eq!(weight.shape[3], width);
        Array::from_fn([1, batch, rows, weight.shape[2]], |[_, b, i, out]| {
            let products = x.row(0, b, i).iter().zip(weight.row(0, 0, out)).map(|(x, w)| x * w);
            products.sum::<f64>() + bias.as_ref().map_or(0.0, |bias| bias.data[out])
        })
    }

    fn rotate(&self, x: Array) -> Array {
        let Some(rotary) = self.config.rotary else { return x };
        let mut y = x.clone();
        for [b, h, i] in positions::rows(&x) {
            y.row_mut(b, h, i).copy_from_slice(&positions::rotated(x.row(b, h, i), &rotary, i as f64));
        }
        y
    }

    /// The base of a rotation behind φ, of which the reference knows the plain one alone.
    fn base(&self) -> Option<f64> {
        self.config.rotary.map(|rotary| {
            assert_eq!(rotary, rotary.base.into());
            rotary.base
        })
    }

    /// The norm of queries or keys, if any, `[1, B, N, H·D]`: of each head's numbers or of all.
    fn normalized(&self, x: Array, name: &str) -> Array {
        let Some(choice) = self.config.query_key_norm else { return x };
        let weight = self.weight(&format!("{name}.weight")).unwrap().data;
        let bias = self.weight(&format!("{name}.bias"));
        assert_eq!(weight.len(), if choice.joint { x.shape[3] } else { self.config.head_width() });
        let is_centred = choice.norm.kind == NormKind::Layer;
        let mean = |row: &[f64]| row.iter().sum::<f64>() / row.len() as f64;
        Array::from_fn(x.shape, |[_, b, i, c]| {
            let at = c % weight.len();
            let row = &x.row(0, b, i)[c - at..][..weight.len()];
            let shift = if is_centred { mean(row) } else { 0.0 };
            let centred: Vec<f64> = row.iter().map(|x| x - shift).collect();
            let square = mean(&centred.iter().map(|x| x * x).collect::<Vec<_>>());
            let gain = weight[at] + f64::from(choice.norm.unit_offset);
            centred[at] / (square + choice.norm.epsilon).sqrt() * gain + bias.as_ref().map_or(0.0, |bias| bias.data[at])
        })
    }

    /// Queries, and the sigmoid of the gate where rows of it follow those of each head.
    fn queries_and_gate(&self, x: &Array) -> (Array, Option<Array>) {
        let both = self.project(x, "q_proj");
        if !self.config.output_gate {
            return (both, None);
        }
        let ([_, batch, rows, _], head) = (both.shape, self.config.head_width());
        let part = |first: usize| {
            let shape = [1, batch, rows, self.config.heads * head];
            Array::from_fn(shape, |[_, b, i, c]| both.row(0, b, i)[c / head * 2 * head + first + c % head])
        };
        let mut gate = part(head);
        gate.data.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp()));
        (part(0), Some(gate))
    }

    /// The layer's output for x [1, B, N, width] and a key mask [1, 1, B, N], of every sequence with its visible tokens
    /// first.
    pub fn forward(&self, x: &Array, key_mask: Array) -> Array {
        let [_, batch, rows, width] = x.shape;
        let order = |b: usize| {
            let is_seen = |i: &usize| key_mask.row(0, 0, b)[*i] != 0.0;
            (0..rows).filter(is_seen).chain((0..rows).filter(|i| !is_seen(i))).collect()
        };
        let order: Vec<Vec<usize>> = (0..batch).map(order).collect();
        let rows_in_order = Array::from_fn(x.shape, |[_, b, i, c]| x.row(0, b, order[b][i])[c]);
        let mask_in_order = Array::from_fn(key_mask.shape, |[.., b, i]| key_mask.row(0, 0, b)[order[b][i]]);
        let out = self.right_padded(&rows_in_order, mask_in_order);
        let place = |b: usize, i: usize| order[b].iter().position(|row| *row == i).unwrap();
        Array::from_fn([1, batch, rows, width], |[_, b, i, c]| out.row(0, b, place(b, i))[c])
    }

    fn right_padded(&self, x: &Array, key_mask: Array) -> Array {
        if self.config.mechanism.is_gated_unit() {
            return self.gated(x, key_mask);
        }
        if self.config.mechanism.is_recurrent() {
            return self.recurrent(x, key_mask);
        }
        let (heads, key_heads) = (self.config.heads, self.config.key_heads());
        let rotate = |rows: Array| match self.config.mechanism {
            Mechanism::Softmax { .. } | Mechanism::Diag { .. } | Mechanism::Retention { .. } => self.rotate(rows),
            // Behind φ.
            _ => rows,
        };
        let (q, gate) = self.queries_and_gate(x);
        let q = rotate(split(&self.normalized(q, "q_norm"), heads));
        let k = rotate(split(&self.normalized(self.project(x, "k_proj"), "k_norm"), key_heads));
        let v = split(&self.project(x, "v_proj"), key_heads);
        let joined = join(&self.attention(&q, &k, &v, Some(key_mask)));
        let joined = match self.config.mechanism {
            Mechanism::Retention { gate: true, .. } => times(joined, &silu(self.project(x, "g_proj"))),
            _ => gate.map_or(joined.clone(), |gate| times(joined, &gate)),
        };
        self.project(&joined, "o_proj")
    }

    fn attention(&self, q: &Array, k: &Array, v: &Array, key_mask: Option<Array>) -> Array {
        let causal = self.config.causal;
        match &self.config.mechanism {
            Mechanism::Softmax { window, soft_cap } => {
                let plain = if causal { Mask::Causal } else { Mask::Full };
                let future = if causal { Some(0) } else { window.map(|w| w - 1) };
                let mask = window.map_or(plain, |w| Mask::Window { left: Some(w - 1), right: future });
                let sinks = self.config.sinks.then(|| self.weight("sinks").unwrap());
                let (scale, soft_cap) = (self.config.scale, *soft_cap);
                let options = SoftmaxOptions { mask, scale, soft_cap, key_mask, sinks, ..Default::default() };
                reference::softmax_attention(q, k, v, &options).out
            }
            Mechanism::Linear { map, normalized } => {
                let normalizer = normalized.then_some(1e-6);
                let options = LinearOptions { map: *map, causal, normalizer, key_mask, ..Default::default() };
                match self.base() {
                    None => reference::linear_attention(q, k, v, &options),
                    Some(base) => reference::rotary_linear_attention(q, k, v, base, &options),
                }
            }
            Mechanism::Performer { features, directions, seed, map, epsilon } => {
                let width = q.shape[3];
                let data = random_features(*directions, *features, width, *seed).unwrap();
                let omega = Array { data, shape: [1, 1, *features, width] };
                let options = PerformerOptions { map: *map, causal, epsilon: *epsilon, key_mask, sequences: None };
                match self.base() {
                    None => reference::performer_attention(q, k, v, &omega, &options),
                    Some(base) => reference::rotary_performer_attention(q, k, v, &omega, base, &options),
                }
            }
            Mechanism::Norm { map, epsilon, scope } => {
                let options = NormOptions {
                    map: *map,
                    causal,
                    epsilon: *epsilon,
                    norm: *scope,
                    log_decay: None,
                    key_mask,
                    sequences: None,
                };
                match self.base() {
                    None => reference::norm_attention(q, k, v, &options),
                    Some(base) => reference::rotary_norm_attention(q, k, v, base, &options),
                }
            }
            Mechanism::Diag { block, weight } => {
                let options =
                    DiagOptions { block_size: *block, causal, weight: *weight, scale: None, key_mask, sequences: None };
                reference::diag_attention(q, k, v, &options)
            }
            Mechanism::Retention { log_decay, epsilon, .. } => {
                let heads = k.shape[1];
                let usual = (0..heads).map(|h| (1.0 - 2f64.powi(-5 - h as i32)).ln()).collect();
                let data = log_decay.clone().unwrap_or(usual);
                let log_decay = Some(Array { data, shape: [1, 1, 1, heads] });
                let (map, epsilon, norm) = (FeatureMap::Identity, *epsilon, NormScope::Head);
                let options = NormOptions { map, causal, epsilon, norm, log_decay, key_mask, sequences: None };
                reference::norm_attention(q, k, v, &options)
            }
            other => panic!("{} is elsewhere", other.name()),
        }
    }

    fn gated(&self, x: &Array, key_mask: Array) -> Array {
        let [z, u, v] = ["z_proj", "u_proj", "v_proj"].map(|name| silu(self.project(x, name)));
        let (gamma, beta) = (self.weight("gamma").unwrap(), self.weight("beta").unwrap());
        let z = split(&z, 1);
        let affine = |head| {
            let element =
                |[b, _, i, d]: [usize; 4]| z.row(b, 0, i)[d] * gamma.row(0, 0, head)[d] + beta.row(0, 0, head)[d];
            self.rotate(Array::from_fn(z.shape, element))
        };
        let (v, rows, causal, key_mask) = (split(&v, 1), x.shape[2], self.config.causal, Some(key_mask));
        let out = match self.config.mechanism {
            Mechanism::Gau { norm, bias_reach, .. } => {
                let bias = bias_reach.map(|reach| self.bias(reach, rows - 1));
                let mask = if causal { Mask::Causal } else { Mask::Full };
                reference::gau_attention(
                    &affine(0),
                    &affine(1),
                    &v,
                    &GauOptions { mask, norm, key_mask, bias, sequences: None },
                )
            }
            Mechanism::Flash { chunk, global_norm, .. } => {
                let bias = Some(self.bias(chunk - 1, chunk - 1));
                let options = MixedChunkOptions {
                    chunk_size: chunk,
                    causal,
                    scale: None,
                    global_norm,
                    key_mask,
                    bias,
                    sequences: None,
                };
                reference::mixed_chunk_attention(&affine(0), &affine(1), &affine(2), &affine(3), &v, &options)
            }
            _ => panic!("not a gated unit"),
        };
        self.project(&times(join(&out), &u), "o_proj")
    }

    /// The table for distances up to `needed` of a layer that has numbers up to `reach`.
    fn bias(&self, reach: usize, needed: usize) -> Array {
        let numbers = self.weight("relative_bias").unwrap().data;
        assert_eq!(numbers.len(), if self.config.causal { reach + 1 } else { 2 * reach + 1 });
        Array::from_fn([1, 1, 1, 2 * needed + 1], |[.., index]| {
            let distance = (index as i64 - needed as i64).clamp(-(reach as i64), reach as i64);
            // Nothing reads the future of a causal layer.
            numbers.get((distance + reach as i64) as usize).copied().unwrap_or(f64::NAN)
        })
    }
}
