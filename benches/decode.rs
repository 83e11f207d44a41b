//! A step of decoding after 2⁹ … 2¹⁶ tokens under criterion: `cargo bench --bench decode [-- FILTER]`.
//!
//! `keys/…` is attention alone: one query per head, the rate at which keys and values are read, beside that of a copy (bytes
//! read and written) on the same threads, and beside operations on candle's tensors. `decode/…` is a whole model.
//!
//! The model of `examples/decode.rs`: 2 layers of width 128, 2 heads, f32; on the CPU, and with the feature `cuda` and a
//! GPU also on it, as `gpu/…`. Caches of softmax are cut back after every step, so that it always reads the same length;
//! states do not know how long they are.

#[path = "../examples/common/mod.rs"]
mod common;
#[path = "../examples/decode/decoding.rs"]
mod decoding;

use std::time::{Duration, Instant};

use attn_kernels::{Mask, SoftmaxOptions, softmax_attention};
use candle_core::{DType, Device, Result, Tensor};
use common::candle_device;
use common::device::DeviceKind;
use common::tensor_operations::softmax_without_gradients;
use criterion::measurement::WallTime;
use criterion::{
    AxisScale, BenchmarkGroup, BenchmarkId, Criterion, PlotConfiguration, Throughput, criterion_group, criterion_main,
};
use decoding::{Decoding, model};

const MECHANISMS: [&str; 5] = ["softmax", "linear", "performer", "norm", "retention"];
const LENGTHS: [usize; 4] = [512, 4096, 16384, 65536];

fn decode(criterion: &mut Criterion) {
    bench_device(criterion, "", &Device::Cpu);
    if let Ok(gpu) = candle_device::open(DeviceKind::Gpu) {
        bench_device(criterion, "gpu/", &gpu);
    }
}

fn bench_device(criterion: &mut Criterion, prefix: &str, device: &Device) {
    for mechanism in MECHANISMS {
        let (model, _) = model(mechanism, 128, 2, 2, device).expect("a model in memory");
        for batch in [1, 32] {
            let mut group = criterion.benchmark_group(format!("{prefix}decode/{mechanism}/batch {batch}"));
            group
                .plot_config(PlotConfiguration::default().summary_scale(AxisScale::Logarithmic))
                .sample_size(10)
                .throughput(Throughput::Elements(batch as u64))
                .warm_up_time(Duration::from_millis(100))
                .measurement_time(Duration::from_millis(500));
            for length in LENGTHS.into_iter().filter(|length| length * batch <= 1 << 19) {
                let mut prepared = None;
                group.bench_function(BenchmarkId::from_parameter(length), |bencher| {
                    let decoding = prepared.get_or_insert_with(|| {
                        let mut single = Decoding::new(&model, device).expect("an empty cache");
                        single.read_to(length).expect("tokens that are read");
                        single.repeated(batch).expect("memory for the batch")
                    });
                    bencher.iter_custom(|steps| (0..steps).map(|_| step(decoding, length)).sum());
                });
            }
            group.finish();
        }
    }
}

/// The time of one step after `length` tokens.
fn step(decoding: &mut Decoding<'_>, length: usize) -> Duration {
    let started = Instant::now();
    decoding.step().expect("a step");
    let duration = started.elapsed();
    // States cannot be cut back and need not be.
    let _ = decoding.cache.truncate(length);
    duration
}

fn keys(criterion: &mut Criterion) {
    copy(&mut group(criterion, "keys/copy"));
    for (heads, key_heads) in [(8, 8), (32, 8)] {
        for dtype in [DType::F32, DType::BF16] {
            let name = format!("keys/{heads} heads on {key_heads}, width 128, {}", dtype.as_str());
            let mut group = group(criterion, &name);
            for length in [512, 4096, 16384] {
                let operands = operands(heads, key_heads, length, 128, dtype).expect("tensors in memory");
                reads(&mut group, "attention", length, &operands, as_one_call);
            }
        }
    }
    let mut group = group(criterion, "keys/8 heads, width 64, f32");
    for length in [16, 64, 256, 1024, 4096] {
        let operands = operands(8, 8, length, 64, DType::F32).expect("tensors in memory");
        reads(&mut group, "attention", length, &operands, as_one_call);
        reads(&mut group, "tensor operations", length, &operands, as_tensor_operations);
    }
}

fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(500)).sample_size(30);
    group
}

/// 64 MB from one place to another, a part on every thread.
fn copy(group: &mut BenchmarkGroup<'_, WallTime>) {
    const BYTES: usize = 64 << 20;
    let (from, mut to) = (vec![1u8; BYTES], vec![0u8; BYTES]);
    let part = BYTES.div_ceil(rayon::current_num_threads());
    group.throughput(Throughput::Bytes(2 * BYTES as u64)).bench_function("64 MB", |bencher| {
        bencher.iter(|| {
            rayon::scope(|scope| {
                for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
                    scope.spawn(|_| to.copy_from_slice(from));
                }
            });
        });
    });
}

/// q of one token, k and v.
fn operands(heads: usize, key_heads: usize, length: usize, width: usize, dtype: DType) -> Result<[Tensor; 3]> {
    let wave = |heads: usize, rows: usize, seed: f64| -> Result<Tensor> {
        let x = Tensor::arange(0f32, (heads * rows * width) as f32, &Device::Cpu)?.affine(0.37, seed)?;
        x.sin()?.reshape((1, heads, rows, width))?.to_dtype(dtype)
    };
    Ok([wave(heads, 1, 0.1)?, wave(key_heads, length, 0.2)?, wave(key_heads, length, 0.3)?])
}

fn as_one_call([q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
    softmax_attention(q, k, v, &SoftmaxOptions { mask: Mask::Causal, ..Default::default() })
}

fn as_tensor_operations([q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
    softmax_without_gradients(q, k, v)
}

fn reads(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    length: usize,
    operands: &[Tensor; 3],
    attention: fn(&[Tensor; 3]) -> Result<Tensor>,
) {
    let [_, k, v] = operands;
    let bytes = (k.elem_count() + v.elem_count()) * k.dtype().size_in_bytes();
    group.throughput(Throughput::Bytes(bytes as u64)).bench_function(BenchmarkId::new(name, length), |bencher| {
        bencher.iter(|| attention(operands).expect("one step"));
    });
}

criterion_group!(benches, keys, decode);
criterion_main!(benches);
