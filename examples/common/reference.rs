//! The f64 reference on a part of a call's operands.

use attn_kernels::gau::{GauNorm, GauOptions, MixedChunkOptions};
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::problem::Mask;
use attn_kernels::reference::{self, Array, Gradients, MixedChunkGradients};

use super::call::Call;
use super::inputs::{Part, Window};
use super::mechanism::{self, DIRECTIONS, Mechanism, Pass};
use super::tensor::Tensor;

/// Keys up to which the materialised form is affordable for every row of a head.
pub const DENSE: usize = 512;

/// What a tensor of results has one row per.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    Query,
    Key,
}

/// Names of the tensors that a pass results in, in the order of all lists of results.
pub fn results(call: &Call<'_>, pass: Pass) -> Vec<(&'static str, Rows)> {
    if pass == Pass::Fwd {
        return vec![("out", Rows::Query)];
    }
    let mut results = vec![("dq", Rows::Query), ("dk", Rows::Key), ("dv", Rows::Key)];
    if call.mechanism == Mechanism::Flash {
        results.extend([("dq global", Rows::Query), ("dk global", Rows::Key)]);
    }
    results
}

/// The part of a tensor of results that a window determines.
pub fn part(call: &Call<'_>, tensor: &Tensor, rows: Rows, window: &Window) -> Array {
    let key_heads = window.key_heads(&call.inputs.shape);
    match rows {
        Rows::Query => tensor.part([window.batches.clone(), window.heads.clone(), window.queries.clone()]),
        Rows::Key => tensor.part([window.batches.clone(), key_heads, 0..window.keys]),
    }
}

/// The results for a window: the dense form, or the recurrent one for heads too long for it.
pub fn compute(call: &Call<'_>, window: &Window, part: &Part, pass: Pass) -> Vec<Array> {
    let is_complete = window.is_complete(&call.inputs.shape);
    match (call.mechanism, pass) {
        (Mechanism::Flash, Pass::Fwd) => vec![flash(call, part)],
        (Mechanism::Flash, Pass::Bwd) => flash_backward(call, part),
        (_, Pass::Fwd) if call.mechanism.is_recurrent() && is_complete && window.keys > DENSE => {
            vec![recurrent(call, window, part)]
        }
        (_, Pass::Fwd) => vec![dense(call, window, part)],
        (_, Pass::Bwd) => dense_backward(call, window, part),
    }
}

fn dense(call: &Call<'_>, window: &Window, part: &Part) -> Array {
    let (Part { q, k, v, .. }, mask, causal) = (part, part.key_mask.clone(), call.causal);
    match call.mechanism {
        Mechanism::Softmax => reference::softmax_attention(q, k, v, &mechanism::softmax(causal, mask)).out,
        Mechanism::Diag => reference::diag_attention(q, k, v, &mechanism::diag(causal, mask)),
        Mechanism::Gau => reference::gau_attention(q, k, v, &gau(call, mask)),
        Mechanism::Linear => reference::linear_attention(q, k, v, &mechanism::linear(causal, mask)),
        Mechanism::Retention => reference::linear_attention(q, k, v, &retention(call, window, mask)),
        Mechanism::Performer => {
            reference::performer_attention(q, k, v, &omega(call), &mechanism::performer(causal, mask))
        }
        Mechanism::Norm => reference::norm_attention(q, k, v, &mechanism::norm(causal, mask)),
        Mechanism::Flash => flash(call, part),
    }
}

fn dense_backward(call: &Call<'_>, window: &Window, part: &Part) -> Vec<Array> {
    let (Part { q, k, v, d_out, .. }, mask, causal) = (part, part.key_mask.clone(), call.causal);
    let gradients = match call.mechanism {
        Mechanism::Softmax => {
            reference::softmax_attention_backward(q, k, v, &mechanism::softmax(causal, mask), d_out, None)
        }
        Mechanism::Diag => reference::diag_attention_backward(q, k, v, &mechanism::diag(causal, mask), d_out),
        Mechanism::Gau => reference::gau_attention_backward(q, k, v, &gau(call, mask), d_out),
        Mechanism::Linear => reference::linear_attention_backward(q, k, v, &mechanism::linear(causal, mask), d_out),
        Mechanism::Retention => reference::linear_attention_backward(q, k, v, &retention(call, window, mask), d_out),
        Mechanism::Performer => {
            let options = mechanism::performer(causal, mask);
            reference::performer_attention_backward(q, k, v, &omega(call), &options, d_out)
        }
        Mechanism::Norm => reference::norm_attention_backward(q, k, v, &mechanism::norm(causal, mask), d_out),
        Mechanism::Flash => return flash_backward(call, part),
    };
    let Gradients { q, k, v, .. } = gradients;
    vec![q, k, v]
}

fn recurrent(call: &Call<'_>, window: &Window, part: &Part) -> Array {
    let (Part { q, k, v, .. }, mask, causal) = (part, part.key_mask.clone(), call.causal);
    let (out, _) = match call.mechanism {
        Mechanism::Performer => {
            let options = mechanism::performer(causal, mask);
            reference::performer_attention_with_state(q, k, v, &omega(call), &options, None)
        }
        Mechanism::Norm => reference::norm_attention_with_state(q, k, v, &mechanism::norm(causal, mask), None),
        Mechanism::Retention => reference::linear_attention_with_state(q, k, v, &retention(call, window, mask), None),
        _ => reference::linear_attention_with_state(q, k, v, &mechanism::linear(causal, mask), None),
    };
    out
}

fn flash(call: &Call<'_>, part: &Part) -> Array {
    let (Part { q, k, v, .. }, options) = (part, mechanism::flash(call.causal, part.key_mask.clone()));
    if k.shape[2] > DENSE {
        reference::mixed_chunk_attention_recurrent(q, k, q, k, v, &options)
    } else {
        reference::mixed_chunk_attention(q, k, q, k, v, &options)
    }
}

fn flash_backward(call: &Call<'_>, part: &Part) -> Vec<Array> {
    let (Part { q, k, v, d_out, .. }, options) = (part, mechanism::flash(call.causal, part.key_mask.clone()));
    if call.causal && q.shape[2] < k.shape[2] {
        return flash_rows_backward(part, &options);
    }
    let MixedChunkGradients { q_quad, k_quad, q_lin, k_lin, v, .. } =
        reference::mixed_chunk_attention_backward(q, k, q, k, v, &options, d_out);
    vec![q_quad, k_quad, v, q_lin, k_lin]
}

/// Causal mixed chunk attention of rows in one chunk, branch by branch: squared-ReLU attention in the chunk, and
/// linear attention to the keys before it.
fn flash_rows_backward(part: &Part, options: &MixedChunkOptions<Array>) -> Vec<Array> {
    let Part { q, k, v, d_out, key_mask } = part;
    let chunk = options.chunk_size;
    let finished = (k.shape[2] - q.shape[2]) / chunk * chunk;
    let mask = Mask::Blocks { size: chunk, causal: true };
    let norm = GauNorm::Fixed { length: chunk as f64 };
    let local = GauOptions { mask, norm, key_mask: key_mask.clone(), ..Default::default() };
    let mut local = reference::gau_attention_backward(q, k, v, &local, d_out);
    if finished == 0 {
        return vec![local.q, local.k, local.v, Array::zeros(q.shape), Array::zeros(k.shape)];
    }
    let first_rows =
        |x: &Array| Array::from_fn([x.shape[0], x.shape[1], finished, x.shape[3]], |[b, h, j, d]| x.row(b, h, j)[d]);
    let key_mask = key_mask
        .as_ref()
        .map(|mask| Array::from_fn([1, 1, mask.shape[2], finished], |[_, _, b, j]| mask.row(0, 0, b)[j]));
    let global = LinearOptions { map: FeatureMap::Identity, normalizer: None, key_mask, ..Default::default() };
    let mut d_sum = d_out.clone();
    d_sum.data.iter_mut().for_each(|d| *d /= finished as f64);
    let global = reference::linear_attention_backward(q, &first_rows(k), &first_rows(v), &global, &d_sum);
    let mut d_k = Array::zeros(k.shape);
    for b in 0..k.shape[0] {
        for (h, j) in (0..k.shape[1]).flat_map(|h| (0..finished).map(move |j| (h, j))) {
            d_k.row_mut(b, h, j).copy_from_slice(global.k.row(b, h, j));
            local.v.row_mut(b, h, j).iter_mut().zip(global.v.row(b, h, j)).for_each(|(d, x)| *d += x);
        }
    }
    vec![local.q, local.k, local.v, global.q, d_k]
}

fn gau(call: &Call<'_>, key_mask: Option<Array>) -> GauOptions<Array> {
    mechanism::gau(call.causal, key_mask, call.inputs.shape.keys)
}

fn retention(call: &Call<'_>, window: &Window, key_mask: Option<Array>) -> LinearOptions<Array> {
    let heads = window.key_heads(&call.inputs.shape);
    let numbers =
        |tensor: &Tensor| Array::from_fn([1, 1, 1, heads.len()], |[_, _, _, h]| tensor.data.get(heads.start + h));
    let log_decay = call.log_decay.as_ref().map(numbers);
    mechanism::retention(key_mask, log_decay)
}

/// ω `[1, 1, m, D]`
pub fn omega(call: &Call<'_>) -> Array {
    let data = call.omega.as_ref().map_or(Vec::new(), |omega| omega.data.to_f64());
    Array { data, shape: [1, 1, DIRECTIONS, call.inputs.shape.width] }
}
