//! Softmax attention as operations of candle tensors, with the N×M matrix: the form of candle-transformers' language models.

use candle_core::{D, Result, Tensor};

/// q, k, v `[B, H, N, D]`.
pub fn softmax(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
    let (_, _, length, width) = q.dims4()?;
    let mut scores = (q.matmul(&k.t()?)? / (width as f64).sqrt())?;
    if causal {
        let hidden: Vec<u8> = (0..length).flat_map(|i| (0..length).map(move |j| u8::from(j > i))).collect();
        let hidden = Tensor::from_vec(hidden, (length, length), q.device())?.broadcast_as(scores.shape())?;
        let lowest = Tensor::new(f32::NEG_INFINITY, q.device())?.to_dtype(q.dtype())?.broadcast_as(scores.shape())?;
        scores = hidden.where_cond(&lowest, &scores)?;
    }
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v.contiguous()?)
}

/// Without a mask and gradients: `softmax_last_dim` is the fastest that candle has.
pub fn softmax_without_gradients(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scores = (q.matmul(&k.t()?)? / (q.dim(D::Minus1)? as f64).sqrt())?;
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(v)
}
