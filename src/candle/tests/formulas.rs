//! The operations as candle would compute them, with N×M matrices.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::problem::Mask;

/// Every head of the result as often as its readers need it: [B, Hk, …] → [B, H, …].
pub fn repeat_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let [batch, own, rows, width] = *x.dims() else { unreachable!("rank 4") };
    let shape = (batch, own, heads / own, rows, width);
    x.unsqueeze(2)?.broadcast_as(shape)?.reshape((batch, heads, rows, width))
}

/// 1 where query i sees key j, [N, M].
pub fn visible(mask: Mask, queries: usize, keys: usize) -> Result<Tensor> {
    let row = |i: usize| {
        let position = i as i64 + keys as i64 - queries as i64;
        (0..keys).map(move |j| f64::from(mask.sees(position, j)))
    };
    Tensor::from_vec((0..queries).flat_map(row).collect(), (queries, keys), &Device::Cpu)
}

/// ⟨q_i, k_j⟩, [B, H, N, M].
pub fn scores(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let k = repeat_heads(k, q.dim(1)?)?;
    q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)
}

/// Σ_j w_ij v_j.
pub fn mix(weights: &Tensor, v: &Tensor) -> Result<Tensor> {
    weights.matmul(&repeat_heads(v, weights.dim(1)?)?.contiguous()?)
}

/// bias[j − i] as [1, 1 or H, N, M].
pub fn bias_matrix(bias: &Tensor, queries: usize, keys: usize) -> Result<Tensor> {
    let (heads, len) = bias.dims2()?;
    let (radius, offset) = ((len / 2) as i64, keys as i64 - queries as i64);
    let entry = |i: usize, j: usize| (j as i64 - i as i64 - offset + radius).clamp(0, len as i64 - 1) as u32;
    let entries: Vec<u32> = (0..queries).flat_map(|i| (0..keys).map(move |j| entry(i, j))).collect();
    let entries = Tensor::from_vec(entries, queries * keys, &Device::Cpu)?;
    bias.index_select(&entries, 1)?.reshape((1, heads, queries, keys))
}

/// Softmax attention and its log-sum-exp over scores with −10⁹ where nothing is seen.
pub fn softmax(scores: &Tensor, visible: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    let hidden = ((visible - 1.0)? * 1e9)?;
    let weights = scores.broadcast_mul(visible)?.broadcast_add(&hidden)?.exp()?;
    let sums = weights.sum_keepdim(D::Minus1)?;
    Ok((mix(&weights.broadcast_div(&sums)?, v)?, sums.log()?.squeeze(D::Minus1)?))
}

/// x/√(mean x² + ε) over the last dimension.
pub fn rms_norm(x: &Tensor, epsilon: f64) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?)
}

/// exp(G_i − G_j) for j ≤ i, else 0: [B, H, N, N] from the log-decay [B, H, N].
pub fn decays(log_decay: &Tensor) -> Result<Tensor> {
    let (_, _, len) = log_decay.dims3()?;
    let causal = visible(Mask::Causal, len, len)?;
    let sums = log_decay.unsqueeze(2)?.broadcast_mul(&causal.reshape((1, 1, len, len))?)?.sum(3)?;
    sums.unsqueeze(3)?.broadcast_sub(&sums.unsqueeze(2)?)?.exp()?.broadcast_mul(&causal)
}

/// elu(x) + 1
pub fn elu_plus_one(x: &Tensor) -> Result<Tensor> {
    x.elu(1.0)? + 1.0
}

/// Positive FAVOR+ features.
pub fn favor(x: &Tensor, omega: &Tensor) -> Result<Tensor> {
    let (directions, width) = omega.dims2()?;
    let x = (x / (width as f64).sqrt().sqrt())?;
    let exponents = x.contiguous()?.broadcast_matmul(&omega.t()?)?;
    let squares = (x.sqr()?.sum_keepdim(D::Minus1)? / 2.0)?;
    exponents.broadcast_sub(&squares)?.exp()? / (directions as f64).sqrt()
}

/// Weights of positions in earlier chunks, scaled by the mean: [N, N].
pub fn earlier_chunks(len: usize, chunk: usize) -> Result<Tensor> {
    let weight = |i: usize, j: usize| {
        let start = i / chunk * chunk;
        if j < start { 1.0 / start as f64 } else { 0.0 }
    };
    let weights: Vec<f64> = (0..len).flat_map(|i| (0..len).map(move |j| weight(i, j))).collect();
    Tensor::from_vec(weights, (len, len), &Device::Cpu)?.to_dtype(DType::F64)
}
