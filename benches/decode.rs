//! A step of decoding after 2⁹ … 2¹⁶ tokens under criterion: `cargo bench --bench decode [-- FILTER]`.
//!
//! The model of `examples/decode.rs`: 2 layers of width 128, 2 heads, f32; on the CPU, and with the feature `cuda` and a
//! GPU also on it, as `gpu/…`. Caches of softmax are cut back after every step, so that it always reads the same length;
//! states do not know how long they are.

#[path = "../examples/common/mod.rs"]
mod common;
#[path = "../examples/decode/decoding.rs"]
mod decoding;

use std::time::{Duration, Instant};

use candle_core::Device;
use common::candle_device;
use common::device::DeviceKind;
use criterion::{AxisScale, BenchmarkId, Criterion, PlotConfiguration, Throughput, criterion_group, criterion_main};
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
        let model = model(mechanism, 128, 2, 2, device).expect("a model in memory");
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

criterion_group!(benches, decode);
criterion_main!(benches);
