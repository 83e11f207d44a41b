//! What this crate has as one call, beside the same as operations of candle tensors, forward and backward:
//! `cargo bench --bench tensor_operations`.
//!
//! Causal softmax attention with an N×M matrix (the form of candle-transformers' language models): batch 1, 8 heads of
//! width 64. Activations, a gate and the loss: 512 rows of 256 columns. All f32, the sum of all outputs as the loss; the two
//! are compared before they are timed.

#[path = "../examples/common/mod.rs"]
mod common;

use std::time::Duration;

use attn_kernels::nn::{Activation, cross_entropy};
use attn_kernels::{Mask, SoftmaxOptions, softmax_attention};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use common::tensor_operations;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Tensors are large: the system's allocator maps and clears their memory anew each time, this one keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LENGTHS: [usize; 3] = [256, 512, 1024];

type Attention = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

fn as_one_call(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let options = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
    softmax_attention(q, k, v, &options)
}

fn as_tensor_operations(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    tensor_operations::softmax(q, k, v, true)
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

/// Refuses gradients that differ by more than roundings.
fn compare(ours: Vec<Tensor>, theirs: Vec<Tensor>) -> Result<()> {
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let difference = (ours - theirs)?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let largest = theirs.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if difference.is_nan() || difference > 1e-4 * largest.max(1.0) {
            candle_core::bail!("gradients differ by {difference}, the largest is {largest}");
        }
    }
    Ok(())
}

/// A function of two matrices `[512, 256]`.
type Elements = fn(&Tensor, &Tensor) -> Result<Tensor>;

/// Name, as one call, as tensor operations.
const ELEMENTS: [(&str, Elements, Elements); 5] = [
    ("gelu", |x, _| Activation::Gelu.forward(x), |x, _| x.gelu_erf()),
    ("gelu by tanh", |x, _| Activation::GeluTanh.forward(x), |x, _| x.gelu()),
    ("silu", |x, _| Activation::Silu.forward(x), |x, _| x.silu()),
    ("swiglu", |gate, x| Activation::Silu.gate(gate, x), |gate, x| gate.silu()? * x),
    ("cross entropy", |x, _| cross_entropy(x, &classes()?), |x, _| candle_nn::loss::cross_entropy(x, &classes()?)),
];

fn classes() -> Result<Tensor> {
    Tensor::from_vec((0..512u32).map(|row| row * 37 % 256).collect(), 512, &Device::Cpu)
}

/// The gradients of both matrices, as far as they have one, of the sum of all outputs.
fn gradients_of(function: Elements, [x, y]: &[Var; 2]) -> Result<Vec<Tensor>> {
    let gradients = function(x, y)?.backward()?;
    Ok([x, y].into_iter().filter_map(|x| gradients.get(x).cloned()).collect())
}

fn elements(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("around attention, forward and backward");
    group.sample_size(20).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));
    let [x, y, _] = variables(256).expect("variables in memory");
    let matrix = |x: Var| x.affine(4.0, 0.0).and_then(|x| Var::from_tensor(&x.reshape((512, 256))?));
    let matrices = [x, y].map(|x| matrix(x).expect("matrices in memory"));
    for (name, one_call, operations) in ELEMENTS {
        let both = [one_call, operations].map(|function| gradients_of(function, &matrices).expect("both passes"));
        let [ours, theirs] = both;
        compare(ours, theirs).expect("the same gradients");
        for (form, function) in [("one call", one_call), ("tensor operations", operations)] {
            group.bench_function(BenchmarkId::new(name, form), |bencher| {
                bencher.iter(|| gradients_of(function, &matrices).expect("both passes"));
            });
        }
    }
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("causal softmax, forward and backward");
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));
    for length in LENGTHS {
        let variables = variables(length).expect("variables in memory");
        let both = [as_one_call, as_tensor_operations]
            .map(|attention| both_passes(attention, &variables).expect("both passes"));
        let [ours, theirs] = both;
        compare(ours, theirs).expect("the same gradients");
        group.throughput(Throughput::Elements(length as u64));
        for (name, attention) in [("one call", as_one_call as Attention), ("tensor operations", as_tensor_operations)] {
            group.bench_function(BenchmarkId::new(name, length), |bencher| {
                bencher.iter(|| both_passes(attention, &variables).expect("both passes"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, attention, elements);
criterion_main!(benches);
