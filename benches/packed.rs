//! Sequences that differ in length, forward and backward: packed into one call, one call each, and padded to the longest
//! with a key mask: `cargo bench --bench packed`.
//!
//! Causal softmax and linear attention, 8 heads of width 64, f32: 8 sequences of 3 to 512 tokens, and 32 of 16 384 together.

use std::time::Duration;

use attn_kernels::{LinearOptions, Mask, Sequences, SoftmaxOptions, linear_attention, softmax_attention};
use candle_core::{Device, Result, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Tensors are large: the system's allocator maps and clears their memory anew each time, this one keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HEADS: usize = 8;
const WIDTH: usize = 64;

/// Which tokens there are beside those of a rectangle.
#[derive(Default)]
struct Tokens {
    key_mask: Option<Tensor>,
    sequences: Option<Sequences>,
}

type Attention = fn(&[Var; 3], Tokens) -> Result<Tensor>;

const MECHANISMS: [(&str, Attention); 2] = [
    ("softmax", |[q, k, v], Tokens { key_mask, sequences }| {
        let options = SoftmaxOptions { mask: Mask::Causal, key_mask, sequences, ..Default::default() };
        softmax_attention(q, k, v, &options)
    }),
    ("linear", |[q, k, v], Tokens { key_mask, sequences }| {
        linear_attention(q, k, v, &LinearOptions { causal: true, key_mask, sequences, ..Default::default() })
    }),
];

fn lengths() -> [(&'static str, Vec<u32>); 2] {
    // Of 32 sequences the n-th has a share of 1 + n mod 8: 512 on average.
    let many = (0..32u32).map(|n| (1 + n % 8) * 16_384 / 144).collect::<Vec<_>>();
    let rest = 16_384 - many.iter().sum::<u32>();
    [
        ("8 of 3 to 512", vec![3, 512, 17, 250, 64, 400, 128, 33]),
        ("32 of 16384", [&many[1..], &[many[0] + rest]].concat()),
    ]
}

fn variables(batch: usize, tokens: usize) -> Result<[Var; 3]> {
    let wave = |seed: f64| -> Result<Var> {
        let x = Tensor::arange(0f32, (batch * HEADS * tokens * WIDTH) as f32, &Device::Cpu)?.affine(0.37, seed)?;
        Var::from_tensor(&x.sin()?.reshape((batch, HEADS, tokens, WIDTH))?)
    };
    Ok([wave(0.1)?, wave(0.2)?, wave(0.3)?])
}

fn both_passes(out: Tensor) -> Result<()> {
    out.sum_all()?.backward().map(|_| ())
}

fn bench(criterion: &mut Criterion) {
    for (name, attention) in MECHANISMS {
        for (what, lengths) in lengths() {
            let tokens: u32 = lengths.iter().sum();
            let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
            let mut group = criterion.benchmark_group(format!("{name}, {what}"));
            group.throughput(Throughput::Elements(tokens.into()));
            let packed = variables(1, tokens as usize).expect("packed");
            group.bench_function(BenchmarkId::from_parameter("packed"), |bencher| {
                let sequences = || Some(Sequences::of_lengths(lengths.iter().copied()));
                bencher.iter(|| {
                    let tokens = Tokens { sequences: sequences(), ..Default::default() };
                    both_passes(attention(&packed, tokens).expect("a call")).expect("gradients");
                });
            });
            let alone: Vec<_> = lengths.iter().map(|&n| variables(1, n as usize).expect("sequences")).collect();
            group.bench_function(BenchmarkId::from_parameter("a call each"), |bencher| {
                bencher.iter(|| {
                    for sequence in &alone {
                        both_passes(attention(sequence, Tokens::default()).expect("a call")).expect("gradients");
                    }
                });
            });
            let padded = variables(lengths.len(), longest).expect("padded");
            let key_mask = || -> Result<Tensor> {
                let lengths = Tensor::new(&lengths[..], &Device::Cpu)?.unsqueeze(1)?;
                Tensor::arange(0u32, longest as u32, &Device::Cpu)?.unsqueeze(0)?.broadcast_lt(&lengths)
            };
            let key_mask = key_mask().expect("a mask");
            group.bench_function(BenchmarkId::from_parameter("padded"), |bencher| {
                bencher.iter(|| {
                    let tokens = Tokens { key_mask: Some(key_mask.clone()), ..Default::default() };
                    both_passes(attention(&padded, tokens).expect("a call")).expect("gradients");
                });
            });
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    targets = bench
}
criterion_main!(benches);
