//! What this CPU does at most, measured on all threads of the current pool: multiply-adds in registers, and copies.
//!
//! Multiply-adds are those of the widest vectors that the processor has, whatever instruction set the crate is told to use.
//! Tiles of AMX, which no stable Rust reaches, are not among them.

use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

use rayon::BroadcastContext;

use super::chains::{self, Chains};
use super::tensor::Float;

/// Operations a second, and what they are.
pub struct Product {
    pub flops: f64,
    pub operations: &'static str,
}

/// Samples of each rate, of which the fastest counts: other work on the machine makes a limit look lower, never higher.
const SAMPLES: usize = 9;
/// Steps and bytes of a sample: some milliseconds.
const STEPS: usize = 1 << 20;
const COPIED: usize = 1 << 26;
/// Larger copies run at the same rate.
const LARGEST_COPY: usize = 1 << 29;

/// The fastest multiply-adds that serve products of `float`, whose sums are f32 (f64 for f64).
pub fn product(float: Float) -> Product {
    let candidates = match float {
        Float::F32 | Float::F16 => vec![chains::f32()],
        Float::F64 => vec![chains::f64()],
        Float::Bf16 => [Some(chains::f32()), chains::bf16()].into_iter().flatten().collect(),
    };
    let rate = |chains: Chains| Product { flops: flops_per_second(&chains), operations: chains.operations };
    let fastest = candidates.into_iter().map(rate).max_by(|a, b| a.flops.total_cmp(&b.flops));
    fastest.expect("one candidate at least")
}

fn flops_per_second(chains: &Chains) -> f64 {
    let flops = (rayon::current_num_threads() * STEPS) as f64 * chains.flops;
    flops / fastest(|| drop(rayon::broadcast(|_| (chains.run)(STEPS))))
}

/// Bytes a second, read and written, of a copy that reads and writes `bytes` together, over and over, in as many parts as
/// threads.
pub fn copy(bytes: usize) -> f64 {
    let threads = rayon::current_num_threads();
    let half = (bytes.min(LARGEST_COPY) / 2 / threads).max(1);
    let count = (COPIED / (2 * half * threads)).max(1);
    let part = || Mutex::new((vec![1u8; half], vec![0u8; half]));
    let parts: Vec<_> = std::iter::repeat_with(part).take(threads).collect();
    let copies = |context: BroadcastContext<'_>| {
        let (from, to) = &mut *parts[context.index()].lock().expect("a part that one thread copies");
        (0..count).for_each(|_| black_box(&mut *to).copy_from_slice(black_box(from)));
    };
    (2 * half * threads * count) as f64 / fastest(|| drop(rayon::broadcast(copies)))
}

/// Seconds of the fastest sample.
fn fastest(mut sample: impl FnMut()) -> f64 {
    let mut seconds = || {
        let started = Instant::now();
        sample();
        started.elapsed().as_secs_f64()
    };
    (0..SAMPLES).map(|_| seconds()).fold(f64::INFINITY, f64::min)
}
