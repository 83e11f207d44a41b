//! The selective scan beside the loop over tokens in candle's operations: `cargo bench --bench scan`.
//!
//! One batch entry, 1536 channels of 16 states, 4096 tokens, f32. Elements are states passed: channels · states · tokens.
//! Before the times the most memory that a call has in use is printed, beside that of operands and results.

#[path = "../examples/common/measure.rs"]
#[allow(dead_code)] // of what others measure
mod measure;

use std::time::Duration;

use attn_kernels::{SelectiveScanOptions, selective_scan};
use candle_core::{DType, Device, Result, Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use measure::{CountingAllocator, peak_bytes};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const TOKENS: usize = 4096;
const CHANNELS: usize = 1536;
const STATES: usize = 16;

struct Operands {
    u: Var,
    delta: Var,
    a: Var,
    b: Var,
    c: Var,
    options: SelectiveScanOptions<Tensor>,
}

impl Operands {
    fn new() -> Result<Self> {
        let (rows, by_state, dev) = ((1, TOKENS, CHANNELS), (1, TOKENS, STATES), &Device::Cpu);
        let var = |x: Tensor| Var::from_tensor(&x);
        Ok(Self {
            u: var(Tensor::randn(0f32, 1.0, rows, dev)?)?,
            delta: var(Tensor::rand(0.001f32, 0.1, rows, dev)?)?,
            a: var(Tensor::rand(-16f32, -1.0, (CHANNELS, STATES), dev)?)?,
            b: var(Tensor::randn(0f32, 1.0, by_state, dev)?)?,
            c: var(Tensor::randn(0f32, 1.0, by_state, dev)?)?,
            options: SelectiveScanOptions { skip: Some(Tensor::ones(CHANNELS, DType::F32, dev)?) },
        })
    }

    fn scan(&self) -> Result<Tensor> {
        selective_scan(&self.u, &self.delta, &self.a, &self.b, &self.c, &self.options)
    }

    fn forward(&self) -> Result<Tensor> {
        let [u, delta, a, b, c] = [&self.u, &self.delta, &self.a, &self.b, &self.c].map(Var::as_detached_tensor);
        selective_scan(&u, &delta, &a, &b, &c, &self.options)
    }

    fn with_gradients(&self) -> Result<usize> {
        Ok(self.scan()?.sqr()?.sum_all()?.backward()?.get_ids().count())
    }

    /// Token by token, without a graph.
    fn tokens(&self) -> Result<Tensor> {
        let [u, delta, a, b, c] = [&self.u, &self.delta, &self.a, &self.b, &self.c].map(Var::as_detached_tensor);
        let mut h = Tensor::zeros((1, CHANNELS, STATES), DType::F32, &Device::Cpu)?;
        let mut rows = Vec::with_capacity(TOKENS);
        for t in 0..TOKENS {
            let row = |x: &Tensor| x.narrow(1, t, 1)?.squeeze(1);
            let (u, delta) = (row(&u)?, row(&delta)?);
            let kept = (delta.unsqueeze(2)?.broadcast_mul(&a.unsqueeze(0)?)?.exp()? * h)?;
            h = (kept + (&delta * &u)?.unsqueeze(2)?.broadcast_mul(&row(&b)?.unsqueeze(1)?)?)?;
            let read = h.matmul(&row(&c)?.unsqueeze(2)?)?.squeeze(2)?;
            rows.push((read + &u)?);
        }
        Tensor::stack(&rows, 1)
    }
}

fn bench(criterion: &mut Criterion) {
    let operands = Operands::new().expect("operands");
    let (ours, plain) = (operands.forward().expect("a scan"), operands.tokens().expect("a loop"));
    let error = (&ours - plain).and_then(|x| x.abs()?.max_all()?.to_scalar::<f32>()).expect("a difference");
    assert!(error < 1e-3, "{error}");
    drop(ours);
    let given = 4 * (2 * TOKENS * CHANNELS + CHANNELS * STATES + 2 * TOKENS * STATES + CHANNELS);
    let y = 4 * TOKENS * CHANNELS;
    let print = |what: &str, peak: usize, results: usize| {
        let share = (given + peak) as f64 / (given + results) as f64;
        println!("{what}: operands and the most beside them {share:.2} times operands and results");
    };
    print("forward", peak_bytes(|| operands.forward().map(drop)).1, y);
    print("with gradients", peak_bytes(|| operands.with_gradients()).1, given + 3 * y);

    let mut group = criterion.benchmark_group("selective scan");
    group.throughput(Throughput::Elements((TOKENS * CHANNELS * STATES) as u64));
    group.bench_function("forward", |bencher| bencher.iter(|| operands.forward().expect("a scan")));
    group.bench_function("with gradients", |bencher| bencher.iter(|| operands.with_gradients().expect("gradients")));
    group.bench_function("forward, token by token", |bencher| bencher.iter(|| operands.tokens().expect("a loop")));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    targets = bench
}
criterion_main!(benches);
