use super::array::{add_scaled, assert_shape, dot};
use super::pairs::{is_kept, position, shared_head};
use super::quadratic::{Scores, kept_keys, relu_squared, relu_squared_backward, rows};
use super::{Array, Gradients};
use crate::gau::{GlobalNorm, MixedChunkOptions};
use crate::problem::Mask;

/// Derivatives of a loss by the inputs of [`mixed_chunk_attention`], each in the shape of its input.
#[derive(Debug, Clone, PartialEq)]
pub struct MixedChunkGradients {
    /// By the queries of the local branch.
    pub q_quad: Array,
    /// By the keys of the local branch; 0 for masked keys.
    pub k_quad: Array,
    /// By the queries of the global branch.
    pub q_lin: Array,
    /// By the keys of the global branch; 0 for masked keys.
    pub k_lin: Array,
    /// By the values, through both branches; 0 for masked keys.
    pub v: Array,
    /// By the bias of the local branch, when one was given.
    pub bias: Option<Array>,
}

/// The mixed chunk attention of FLASH, of q_quad `[B, H, N, D]`, k_quad `[B, Hv, M, D]`, q_lin `[B, Hq', N, D']`,
/// k_lin `[B, Hk', M, D']`, v `[B, Hv, M, E]`, in its dense form: with chunks of C positions,
///
/// ```text
/// A_ij = relu(c ⟨q_i, k_j⟩ + bias[R + j − p_i])²     for j in the chunk of p_i, and j ≤ p_i when causal, else 0
/// G_ij = norm_i ⟨q'_i, k'_j⟩                         for j in an earlier chunk when causal (all j when not), else 0
/// o_i  = Σ_j (A_ij + G_ij) v_j
/// ```
///
/// c is 1/C by default. With h chunks before that of p_i, causal norm_i is 1/(h·C) (mean), 1/C (chunk) or 1/n
/// (length); not causal it is 1/n, 1/C or 1/n. n counts the keys that the key mask leaves in the batch entry, at least 1.
///
/// # Panics
/// If shapes do not fit together (causal needs M = N), the chunk size is 0, or a visible distance is outside the bias.
pub fn mixed_chunk_attention(
    q_quad: &Array,
    k_quad: &Array,
    q_lin: &Array,
    k_lin: &Array,
    v: &Array,
    options: &MixedChunkOptions<Array>,
) -> Array {
    let mut out = local_scores(q_quad, k_quad, v, options).output(|_, row| relu_squared(&row.scores));
    let global = GlobalBranch { q: q_lin, k: k_lin, v, options, heads: out.shape[1] };
    global.check(&out);
    for [b, h, i] in rows(&out) {
        for (j, norm) in global.visible(b, i) {
            let weight = norm * dot(global.query(b, h, i), global.key(b, h, j));
            add_scaled(out.row_mut(b, h, i), weight, global.value(b, h, j));
        }
    }
    out
}

/// Gradients of ⟨d_out, o⟩ for [`mixed_chunk_attention`]; `d_out` is `[B, H, N, E]`. With x = relu(s) of the local
/// branch:
///
/// ```text
/// dv_j = Σ_i (A_ij + G_ij) do_i,   ds_ij = 2 x_ij ⟨do_i, v_j⟩,   dbias_d = Σ_{j − p_i = d} ds_ij
/// dq_i = c Σ_j ds_ij k_j,   dk_j = c Σ_i ds_ij q_i
/// dq'_i = Σ_j norm_i ⟨do_i, v_j⟩ k'_j,   dk'_j = Σ_i norm_i ⟨do_i, v_j⟩ q'_i
/// ```
///
/// # Panics
/// As [`mixed_chunk_attention`].
pub fn mixed_chunk_attention_backward(
    q_quad: &Array,
    k_quad: &Array,
    q_lin: &Array,
    k_lin: &Array,
    v: &Array,
    options: &MixedChunkOptions<Array>,
    d_out: &Array,
) -> MixedChunkGradients {
    let Gradients { q, k, v: mut d_v, bias, .. } = local_scores(q_quad, k_quad, v, options).backward(
        d_out,
        |_, row| relu_squared(&row.scores),
        |_, row, d| relu_squared_backward(&row.scores, d),
    );
    let global = GlobalBranch { q: q_lin, k: k_lin, v, options, heads: d_out.shape[1] };
    global.check(d_out);
    let (mut d_q, mut d_k) = (Array::zeros(q_lin.shape), Array::zeros(k_lin.shape));
    for [b, h, i] in rows(d_out) {
        let (d_o, q) = (d_out.row(b, h, i), global.query(b, h, i));
        for (j, norm) in global.visible(b, i) {
            let k = global.key(b, h, j);
            let d_weight = norm * dot(d_o, global.value(b, h, j));
            add_scaled(d_v.row_mut(b, global.head(h, v), j), norm * dot(q, k), d_o);
            add_scaled(d_q.row_mut(b, global.head(h, q_lin), i), d_weight, k);
            add_scaled(d_k.row_mut(b, global.head(h, k_lin), j), d_weight, q);
        }
    }
    MixedChunkGradients { q_quad: q, k_quad: k, q_lin: d_q, k_lin: d_k, v: d_v, bias }
}

/// [`mixed_chunk_attention`] in O(N·C): the local branch visits its chunk only, and the global branch reads
/// S = Σ k'_j v_jᵀ over the finished chunks (all keys when not causal).
///
/// # Panics
/// As [`mixed_chunk_attention`].
pub fn mixed_chunk_attention_recurrent(
    q_quad: &Array,
    k_quad: &Array,
    q_lin: &Array,
    k_lin: &Array,
    v: &Array,
    options: &MixedChunkOptions<Array>,
) -> Array {
    let local = local_scores(q_quad, k_quad, v, options);
    local.check();
    let [batch, heads, queries, _] = q_quad.shape;
    let mut out = Array::zeros([batch, heads, queries, v.shape[3]]);
    let global = GlobalBranch { q: q_lin, k: k_lin, v, options, heads };
    global.check(&out);
    for b in 0..batch {
        for h in 0..heads {
            let mut s = Array::zeros([1, 1, q_lin.shape[3], v.shape[3]]);
            let mut absorbed = 0;
            for i in 0..queries {
                let chunk = chunk_range(options, position(i, queries, v.shape[2]), v.shape[2]);
                let finished = if options.causal { chunk.start } else { v.shape[2] };
                for j in (absorbed..finished).filter(|&j| is_kept(options.key_mask.as_ref(), b, j)) {
                    for (f, &k) in global.key(b, h, j).iter().enumerate() {
                        add_scaled(s.row_mut(0, 0, f), k, global.value(b, h, j));
                    }
                }
                absorbed = finished;
                let norm = global.norm(b, i);
                for (f, q) in global.query(b, h, i).iter().enumerate() {
                    add_scaled(out.row_mut(b, h, i), norm * q, s.row(0, 0, f));
                }
                let row = local.row_within(b, h, i, chunk);
                let sum = local.weighted_sum(b, h, &row, &relu_squared(&row.scores));
                add_scaled(out.row_mut(b, h, i), 1.0, &sum);
            }
        }
    }
    out
}

fn local_scores<'a>(q: &'a Array, k: &'a Array, v: &'a Array, options: &'a MixedChunkOptions<Array>) -> Scores<'a> {
    assert!(options.sequences.is_none(), "packed sequences are defined by the calls of each");
    Scores {
        q,
        k,
        v,
        mask: Mask::Blocks { size: options.chunk_size, causal: options.causal },
        scales: vec![options.scale.unwrap_or(1.0 / options.chunk_size as f64); q.shape[0]],
        soft_cap: None,
        key_mask: options.key_mask.as_ref(),
        bias: options.bias.as_ref(),
        attention_bias: None,
    }
}

/// The keys in the chunk of `position`.
fn chunk_range(options: &MixedChunkOptions<Array>, position: i128, keys: usize) -> std::ops::Range<usize> {
    let size = options.chunk_size as i128;
    let start = position.div_euclid(size) * size;
    let clip = |j: i128| j.clamp(0, keys as i128) as usize;
    clip(start)..clip(start + size)
}

struct GlobalBranch<'a> {
    q: &'a Array,
    k: &'a Array,
    v: &'a Array,
    options: &'a MixedChunkOptions<Array>,
    heads: usize,
}

impl GlobalBranch<'_> {
    fn check(&self, out: &Array) {
        let [batch, heads, queries, _] = out.shape;
        let [_, query_heads, _, width] = self.q.shape;
        let (key_heads, keys) = (self.k.shape[1], self.v.shape[2]);
        assert_shape("q_lin", self.q, [batch, query_heads, queries, width]);
        assert_shape("k_lin", self.k, [batch, key_heads, keys, width]);
        for of in [query_heads, key_heads] {
            assert!(of > 0 && heads % of == 0, "{of} heads of the global branch for {heads} heads");
        }
        assert!(!self.options.causal || queries == keys, "causal: {queries} queries, {keys} keys");
    }

    fn head(&self, h: usize, x: &Array) -> usize {
        shared_head(h, self.heads, x.shape[1])
    }

    fn query(&self, b: usize, h: usize, i: usize) -> &[f64] {
        self.q.row(b, self.head(h, self.q), i)
    }

    fn key(&self, b: usize, h: usize, j: usize) -> &[f64] {
        self.k.row(b, self.head(h, self.k), j)
    }

    fn value(&self, b: usize, h: usize, j: usize) -> &[f64] {
        self.v.row(b, self.head(h, self.v), j)
    }

    /// The keys that query `i` sees in this branch, each with norm_i.
    fn visible(&self, b: usize, i: usize) -> impl Iterator<Item = (usize, f64)> {
        let (chunk, norm) = (self.options.chunk_size, self.norm(b, i));
        (0..self.v.shape[2])
            .filter(move |&j| !self.options.causal || j / chunk < i / chunk)
            .filter(move |&j| is_kept(self.options.key_mask.as_ref(), b, j))
            .map(move |j| (j, norm))
    }

    /// norm_i; 0 in the first chunk, whose sum is empty.
    fn norm(&self, b: usize, i: usize) -> f64 {
        let chunk = self.options.chunk_size;
        let count = match self.options.global_norm {
            GlobalNorm::Mean if self.options.causal => (i / chunk * chunk) as f64,
            GlobalNorm::Mean | GlobalNorm::Length => kept_keys(self.options.key_mask.as_ref(), b, self.v.shape[2]),
            GlobalNorm::Chunk => chunk as f64,
        };
        if count == 0.0 { 0.0 } else { 1.0 / count }
    }
}
