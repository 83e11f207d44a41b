//! A plain implementation in the operands' own type, head by head: the materialised formula (a token-by-token loop for
//! forward passes of the linear family), every intermediate stored in the type, sums in f32. Its distance from the
//! reference is what the backend's is measured by. Operands in f64 are computed in f32.

mod features;
mod linear;
mod matrix;
mod quadratic;

use attn_kernels::gau::MixedChunkOptions;
use attn_kernels::problem::{LinearFinish, Mask, Scan};
use attn_kernels::reference::Array;
use attn_kernels::transnormer::{DiagOptions, NormScope};

use super::call::Call;
use super::inputs::{Part, Window};
use super::mechanism::{self, Mechanism, Pass};
use super::reference::{self, Rows};
use super::tensor::Float;
use features::Map;
use linear::Linear;
use matrix::Matrix;
use quadratic::Quadratic;

/// One head's operands: N queries, the last at the last of M keys.
pub struct Head {
    float: Float,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    d_out: Matrix,
    /// Whether a key takes part.
    keep: Vec<bool>,
}

impl Head {
    fn new(float: Float, part: &Part, b: usize, h: usize) -> Self {
        let group = part.q.shape[1] / part.k.shape[1];
        let matrix = |x: &Array, h| Matrix::from_rows((0..x.shape[2]).map(|i| x.row(b, h, i)), x.shape[3]);
        let keys = part.k.shape[2];
        let keep = part
            .key_mask
            .as_ref()
            .map_or(vec![true; keys], |mask| mask.row(0, 0, b).iter().map(|&m| m != 0.0).collect());
        Self {
            float,
            q: matrix(&part.q, h),
            k: matrix(&part.k, h / group),
            v: matrix(&part.v, h / group),
            d_out: matrix(&part.d_out, h),
            keep,
        }
    }

    /// Of a query among the keys.
    fn position(&self, i: usize) -> i64 {
        i as i64 + self.k.rows as i64 - self.q.rows as i64
    }
}

/// The results of a run or two, each in the order of [`reference::results`]. The second run is for three times the
/// gradient of the output: another draw of the rounding errors, which decide by luck where few terms cancel.
pub fn runs(call: &Call<'_>, window: &Window, part: &Part, pass: Pass) -> Vec<Vec<Array>> {
    let first = compute(call, window, part, pass);
    if pass == Pass::Fwd {
        return vec![first];
    }
    let mut tripled = part.clone();
    tripled.d_out.data.iter_mut().for_each(|d| *d *= 3.0);
    let mut second = compute(call, window, &tripled, pass);
    second.iter_mut().flat_map(|array| &mut array.data).for_each(|d| *d /= 3.0);
    vec![first, second]
}

fn compute(call: &Call<'_>, window: &Window, part: &Part, pass: Pass) -> Vec<Array> {
    let float = call.inputs.float;
    let [batch, heads, queries, _] = part.q.shape;
    let [_, key_heads, keys, _] = part.k.shape;
    let mut arrays: Vec<Array> = Vec::new();
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        let head = Head::new(float, part, b, h);
        let key_head = h * key_heads / heads;
        let results = run(call, &head, window.key_heads(&call.inputs.shape).start + key_head, pass);
        for (index, ((_, rows), matrix)) in reference::results(call, pass).into_iter().zip(results).enumerate() {
            if arrays.len() == index {
                arrays.push(Array::zeros(match rows {
                    Rows::Query => [batch, heads, queries, matrix.cols],
                    Rows::Key => [batch, key_heads, keys, matrix.cols],
                }));
            }
            match rows {
                Rows::Query => add(&mut arrays[index], [b, h], &matrix),
                Rows::Key => add(&mut arrays[index], [b, key_head], &matrix),
            }
        }
    }
    arrays
}

fn add(array: &mut Array, [b, h]: [usize; 2], matrix: &Matrix) {
    for i in 0..matrix.rows {
        array.row_mut(b, h, i).iter_mut().zip(matrix.row(i)).for_each(|(sum, &x)| *sum += f64::from(x));
    }
}

fn run(call: &Call<'_>, head: &Head, key_head: usize, pass: Pass) -> Vec<Matrix> {
    let (causal, width) = (call.causal, head.q.cols as f32);
    let scan = Scan::new(causal);
    let normalize = LinearFinish::Normalize { epsilon: 1e-6 };
    let quadratic = |mask, scale, squared_relu| Quadratic { mask, scale, squared_relu };
    let linear = |map, finish| Linear { map, scan, finish, log_decay: 0.0 };
    match call.mechanism {
        Mechanism::Softmax => quadratic(mechanism::visible_keys(causal), width.sqrt().recip(), false).run(head, pass),
        Mechanism::Diag => {
            let size = DiagOptions::<()>::default().block_size;
            quadratic(Mask::Blocks { size, causal }, width.sqrt().recip(), false).run(head, pass)
        }
        Mechanism::Gau => {
            let scale = 1.0 / call.inputs.shape.keys as f32;
            quadratic(mechanism::visible_keys(causal), scale, true).run(head, pass)
        }
        Mechanism::Linear => linear(Map::EluPlusOne, normalize).run(head, pass),
        Mechanism::Retention => {
            let log_decay = call.log_decay.as_ref().map_or(0.0, |log_decay| log_decay.data.get(key_head));
            Linear { log_decay: log_decay as f32, ..linear(Map::Identity, LinearFinish::None) }.run(head, pass)
        }
        Mechanism::Performer => {
            let omega = reference::omega(call);
            let omega = Matrix::from_rows((0..omega.shape[2]).map(|i| omega.row(0, 0, i)), omega.shape[3]);
            linear(Map::Favor(omega), normalize).run(head, pass)
        }
        Mechanism::Norm => {
            let finish = LinearFinish::RmsNorm { epsilon: 1e-6, scope: NormScope::Head };
            linear(Map::EluPlusOne, finish).run(head, pass)
        }
        Mechanism::Flash => flash(causal, head, pass),
    }
}

fn flash(causal: bool, head: &Head, pass: Pass) -> Vec<Matrix> {
    let MixedChunkOptions { chunk_size: chunk, global_norm: norm, .. } = MixedChunkOptions::<()>::default();
    let mask = Mask::Blocks { size: chunk, causal };
    let local = Quadratic { mask, scale: 1.0 / chunk as f32, squared_relu: true }.run(head, pass);
    let scan = if causal { Scan::ChunkExclusive { chunk } } else { Scan::Full };
    let finish = LinearFinish::ChunkNorm { norm, chunk };
    let global = Linear { map: Map::Identity, scan, finish, log_decay: 0.0 }.run(head, pass);
    let mut local = local.into_iter();
    let mut global = global.into_iter();
    let mut next = || (local.next().expect("a local result"), global.next().expect("a global result"));
    if pass == Pass::Fwd {
        let (local, global) = next();
        return vec![local.plus(&global).rounded(head.float)];
    }
    let ((q, q_global), (k, k_global), (v, v_global)) = (next(), next(), next());
    vec![q, k, v.plus(&v_global).rounded(head.float), q_global, k_global]
}
