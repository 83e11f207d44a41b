//! Operands of a call, random or given, and the parts of them that a check looks at.

use std::ops::Range;

use attn_kernels::random_features::{FeatureKind, random_features};
use attn_kernels::reference::Array;
use rayon::prelude::*;

use super::tensor::{Float, Tensor};

/// Sizes of the operands.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    pub key_heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub width: usize,
    pub value_width: usize,
}

impl Shape {
    /// Self-attention with as many key heads as heads.
    pub fn square(batch: usize, heads: usize, len: usize, width: usize) -> Self {
        Self { batch, heads, key_heads: heads, queries: len, keys: len, width, value_width: width }
    }
}

/// Operands that every mechanism can be run on.
pub struct Inputs {
    pub float: Float,
    pub shape: Shape,
    /// [B, H, N, D]
    pub q: Tensor,
    /// [B, Hk, M, D]
    pub k: Tensor,
    /// [B, Hk, M, E]
    pub v: Tensor,
    /// [B, H, N, E]: gradient of the output
    pub d_out: Tensor,
    /// [B, M], 0 removes a key
    pub key_mask: Option<Vec<u8>>,
    pub given: Given,
}

/// Further operands, of mechanisms that would make their own, in the type of sums.
#[derive(Default)]
pub struct Given {
    /// [Hk] or [B, Hk, M]
    pub log_decay: Option<Tensor>,
    /// [m, D]
    pub omega: Option<Tensor>,
    /// S [B, Hk, D', E] and z [B, Hk, D'] of earlier tokens; the sums after the last token are then a result.
    pub state: Option<[Tensor; 2]>,
}

impl Inputs {
    /// Standard normal q, k, v and d_out.
    ///
    /// # Errors
    /// Sizes of 0 or beyond memory.
    pub fn random(float: Float, shape: Shape) -> attn_kernels::Result<Self> {
        let Shape { batch, heads, key_heads, queries, keys, width, value_width } = shape;
        let dims = [
            [batch, heads, queries, width],
            [batch, key_heads, keys, width],
            [batch, key_heads, keys, value_width],
            [batch, heads, queries, value_width],
        ];
        let normal = |(seed, dims): (usize, &[usize; 4])| {
            let rows = dims[0] * dims[1] * dims[2];
            let data = random_features(FeatureKind::Iid, rows, dims[3], seed as u64)?;
            Ok(Tensor::from_f64(float, &data, dims))
        };
        let tensors: attn_kernels::Result<Vec<_>> =
            dims.par_iter().enumerate().map(|(i, dims)| normal((i, dims))).collect();
        let mut tensors = tensors?.into_iter();
        let mut next = || tensors.next().expect("a tensor for each shape");
        Ok(Self {
            float,
            shape,
            q: next(),
            k: next(),
            v: next(),
            d_out: next(),
            key_mask: None,
            given: Given::default(),
        })
    }

    /// The part of the operands that `window` describes.
    pub fn part(&self, window: &Window) -> Part {
        let keys = [window.batches.clone(), window.key_heads(&self.shape), 0..window.keys];
        let queries = [window.batches.clone(), window.heads.clone(), window.queries.clone()];
        let key_mask = self.key_mask.as_ref().map(|mask| {
            let all = self.shape.keys;
            Array::from_fn([1, 1, window.batches.len(), window.keys], |[_, _, b, j]| {
                mask[(window.batches.start + b) * all + j].into()
            })
        });
        Part {
            q: self.q.part(queries.clone()),
            k: self.k.part(keys.clone()),
            v: self.v.part(keys),
            d_out: self.d_out.part(queries),
            key_mask,
        }
    }
}

/// Some rows of the output, and the keys that they see: those before `keys`, the last query standing at the last of
/// them.
#[derive(Debug, Clone)]
pub struct Window {
    pub batches: Range<usize>,
    pub heads: Range<usize>,
    pub queries: Range<usize>,
    pub keys: usize,
}

impl Window {
    /// Everything.
    pub fn whole(shape: &Shape) -> Self {
        Self { batches: 0..shape.batch, heads: 0..shape.heads, queries: 0..shape.queries, keys: shape.keys }
    }

    /// The key heads that the heads read.
    pub fn key_heads(&self, shape: &Shape) -> Range<usize> {
        let group = shape.heads / shape.key_heads;
        self.heads.start / group..self.heads.end.div_ceil(group)
    }

    /// Whether these rows of the output are all there are for their heads.
    pub fn is_complete(&self, shape: &Shape) -> bool {
        self.queries.len() == shape.queries
    }
}

/// Operands in f64.
#[derive(Clone)]
pub struct Part {
    pub q: Array,
    pub k: Array,
    pub v: Array,
    pub d_out: Array,
    /// [1, 1, B, M]
    pub key_mask: Option<Array>,
}
