//! The delta engine on slices, forward and with gradients: `cargo bench --bench delta`.
//!
//! One batch entry, 8 heads, 2048 tokens, f32, widths 64 and 128. Elements are multiply-adds with the state, the least that
//! the recurrence needs: 3 D E a token and head forward (2 D E without a rank-one part, 4 D E for the general form), and
//! three times as many with gradients. Then one token after a state, whose bytes are read and written once at least, and one
//! head with gradients, which all threads share.

use std::time::Duration;

use attn_kernels::problem::View;
use attn_kernels::{DeltaOptions, Result, cpu};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const HEADS: usize = 8;
const TOKENS: usize = 2048;

/// Numbers of all operands; of each the first few that it has.
struct Numbers {
    rows: [Vec<f32>; 5],
    beta: Vec<f32>,
    log_decay: Vec<f32>,
    width: usize,
}

impl Numbers {
    fn new(width: usize) -> Self {
        let wave = |step: f32| (0..HEADS * TOKENS * width).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
        Self {
            rows: [0.37, 0.61, 0.83, 0.29, 0.17].map(wave),
            beta: (0..HEADS * TOKENS).map(|i| 0.5 + 0.4 * (i as f32 * 0.7).sin()).collect(),
            log_decay: (0..HEADS * TOKENS * width).map(|i| -0.05 - 0.05 * (i as f32 * 0.3).sin()).collect(),
            width,
        }
    }

    fn rows(&self, index: usize) -> Result<View<'_>> {
        View::contiguous(&self.rows[index][..], &[1, HEADS, TOKENS, self.width])
    }

    /// The log-decay: none, per token or per channel, by its rank.
    fn options(&self, rank: usize) -> Result<DeltaOptions<View<'_>>> {
        let dims = [1, HEADS, TOKENS, self.width];
        let dims = dims.get(..rank).filter(|dims| !dims.is_empty());
        let log_decay =
            dims.map(|dims| View::contiguous(&self.log_decay[..dims.iter().product()], dims)).transpose()?;
        Ok(DeltaOptions { log_decay, normalize: Some(1e-6), ..Default::default() })
    }

    fn call(&self, form: &str) -> Result<cpu::DeltaAttention<'_, f32>> {
        let (q, k, v) = (self.rows(0)?, self.rows(1)?, self.rows(2)?);
        let beta = View::contiguous(&self.beta[..], &[1, HEADS, TOKENS])?;
        match form {
            "GLA" => cpu::gated_linear(q, k, v, &self.options(4)?, None),
            "DeltaNet" => cpu::delta(q, k, v, beta, &self.options(0)?, None),
            "Gated DeltaNet" => cpu::delta(q, k, v, beta, &self.options(3)?, None),
            "Kimi Delta Attention" => cpu::delta(q, k, v, beta, &self.options(4)?, None),
            _ => {
                // a is taken small: the state must not grow.
                cpu::generalized_delta(q, k, v, [self.rows(3)?, self.rows(4)?], &self.options(4)?, None)
            }
        }
    }
}

fn bench(criterion: &mut Criterion) {
    for width in [64, 128] {
        let mut numbers = Numbers::new(width);
        numbers.rows[3].iter_mut().for_each(|x| *x *= 0.02);
        for (form, products) in
            [("GLA", 2), ("DeltaNet", 3), ("Gated DeltaNet", 3), ("Kimi Delta Attention", 3), ("RWKV-7", 4)]
        {
            let least = (products * HEADS * TOKENS * width * width) as u64;
            let mut group = criterion.benchmark_group(format!("{form}, {width} wide"));
            group.throughput(Throughput::Elements(least));
            group.bench_function(BenchmarkId::from_parameter("forward"), |bencher| {
                bencher.iter(|| numbers.call(form).expect("a call").out);
            });
            group.throughput(Throughput::Elements(3 * least));
            group.bench_function(BenchmarkId::from_parameter("with gradients"), |bencher| {
                bencher.iter(|| {
                    let attention = numbers.call(form).expect("a call");
                    attention.backward(&attention.out, None).expect("gradients")
                });
            });
            group.finish();
        }
    }
}

/// One token by the delta rule, with a decay per channel.
fn token(criterion: &mut Criterion) {
    for (heads, width) in [(8, 64), (32, 64), (8, 128), (32, 128)] {
        let numbers = Numbers::new(width);
        let dims = [1, heads, 1, width];
        let state = vec![0.5f32; heads * width * width];
        let rows = |index: usize| View::contiguous(&numbers.rows[index][..heads * width], &dims);
        let call = || {
            let beta = View::contiguous(&numbers.beta[..heads], &dims[..3])?;
            let log_decay = Some(View::contiguous(&numbers.log_decay[..heads * width], &dims)?);
            let options = DeltaOptions { log_decay, normalize: Some(1e-6), ..Default::default() };
            Ok::<_, attn_kernels::Error>(
                cpu::delta::<f32>(rows(0)?, rows(1)?, rows(2)?, beta, &options, Some(&state))?.state,
            )
        };
        let mut group = criterion.benchmark_group("Kimi Delta Attention, one token");
        group.throughput(Throughput::Bytes(2 * 4 * state.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{heads} heads, {width} wide")), |bencher| {
            bencher.iter(|| call().expect("a call"));
        });
        group.finish();
    }
}

/// One head, forward and with gradients.
fn one_head(criterion: &mut Criterion) {
    for width in [64, 128] {
        let numbers = Numbers::new(width);
        let dims = [1, 1, TOKENS, width];
        let rows = |index: usize| View::contiguous(&numbers.rows[index][..TOKENS * width], &dims);
        let call = || {
            let beta = View::contiguous(&numbers.beta[..TOKENS], &dims[..3])?;
            let log_decay = Some(View::contiguous(&numbers.log_decay[..TOKENS * width], &dims)?);
            let options = DeltaOptions { log_decay, normalize: Some(1e-6), ..Default::default() };
            cpu::delta::<f32>(rows(0)?, rows(1)?, rows(2)?, beta, &options, None)
        };
        let mut group = criterion.benchmark_group(format!("Kimi Delta Attention, one head, {width} wide"));
        group.throughput(Throughput::Elements((3 * TOKENS * width * width) as u64));
        group.bench_function(BenchmarkId::from_parameter("forward"), |bencher| {
            bencher.iter(|| call().expect("a call").out);
        });
        group.throughput(Throughput::Elements((9 * TOKENS * width * width) as u64));
        group.bench_function(BenchmarkId::from_parameter("with gradients"), |bencher| {
            bencher.iter(|| {
                let attention = call().expect("a call");
                attention.backward(&attention.out, None).expect("gradients")
            });
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = bench, token, one_head
}
criterion_main!(benches);
