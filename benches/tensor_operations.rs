//! Causal softmax attention of candle tensors, forward and backward, as operations on tensors with an N×M matrix (the form of
//! candle-transformers' language models) and as one call: `cargo bench --bench tensor_operations`.
//!
//! Batch 1, 8 heads of width 64, f32, the sum of all outputs as the loss; the two are compared before they are timed.

use std::time::Duration;

use attn_kernels::{Mask, SoftmaxOptions, softmax_attention};
use candle_core::{D, DType, Device, Result, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const LENGTHS: [usize; 3] = [256, 512, 1024];

type Attention = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

fn as_one_call(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let options = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
    softmax_attention(q, k, v, &options)
}

fn as_tensor_operations(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (_, _, length, width) = q.dims4()?;
    let hidden: Vec<u8> = (0..length).flat_map(|i| (0..length).map(move |j| u8::from(j > i))).collect();
    let scores = (q.matmul(&k.t()?)? / (width as f64).sqrt())?;
    let hidden = Tensor::from_vec(hidden, (length, length), q.device())?.broadcast_as(scores.shape())?;
    let lowest = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(scores.shape())?;
    let weights = candle_nn::ops::softmax(&hidden.where_cond(&lowest, &scores)?, D::Minus1)?;
    weights.matmul(&v.contiguous()?)
}

/// q, k and v.
fn variables(length: usize) -> Result<[Var; 3]> {
    let wave = |seed: f64| -> Result<Var> {
        let x = Tensor::arange(0f32, (length * 512) as f32, &Device::Cpu)?.affine(0.37, seed)?;
        Var::from_tensor(&x.sin()?.reshape((1, 8, length, 64))?)
    };
    Ok([wave(0.1)?, wave(0.2)?, wave(0.3)?])
}

/// The gradients of q, k and v.
fn both_passes(attention: Attention, [q, k, v]: &[Var; 3]) -> Result<Vec<Tensor>> {
    let gradients = attention(q, k, v)?.sum_all()?.backward()?;
    let of = |x: &Var| gradients.get(x).cloned().ok_or_else(|| candle_core::Error::msg("no gradient"));
    [q, k, v].into_iter().map(of).collect()
}

/// Refuses results that differ by more than roundings.
fn compare(variables: &[Var; 3]) -> Result<()> {
    let (ours, theirs) = (both_passes(as_one_call, variables)?, both_passes(as_tensor_operations, variables)?);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let difference = (ours - theirs)?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let largest = theirs.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if difference.is_nan() || difference > 1e-4 * largest.max(1.0) {
            candle_core::bail!("gradients differ by {difference}, the largest is {largest}");
        }
    }
    Ok(())
}

fn tensor_operations(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("causal softmax, forward and backward");
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));
    for length in LENGTHS {
        let variables = variables(length).expect("variables in memory");
        compare(&variables).expect("the same gradients");
        group.throughput(Throughput::Elements(length as u64));
        for (name, attention) in [("one call", as_one_call as Attention), ("tensor operations", as_tensor_operations)] {
            group.bench_function(BenchmarkId::new(name, length), |bencher| {
                bencher.iter(|| both_passes(attention, &variables).expect("both passes"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, tensor_operations);
criterion_main!(benches);
