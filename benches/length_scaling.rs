//! The cases of `examples/length_scaling.rs` under criterion: `cargo bench --bench length_scaling [-- FILTER]`.
//!
//! Causal, batch 1, 8 heads of width 64, f32 on the CPU; with the feature `gpu` and a GPU also bf16 on it, as `gpu/…`,
//! timed on the device. Each case is checked against the f64 reference before it is timed.

#[path = "../examples/common/mod.rs"]
mod common;

use std::time::Duration;

use common::check::{Expected, Scope};
use common::device::DeviceKind;
use common::inputs::Shape;
use common::{Call, Device, Float, Inputs, Mechanism, Pass};
use criterion::measurement::WallTime;
use criterion::{
    AxisScale, BenchmarkGroup, BenchmarkId, Criterion, PlotConfiguration, Throughput, criterion_group, criterion_main,
};

fn length_scaling(criterion: &mut Criterion) {
    bench_device(criterion, "", &Device::Cpu, Float::F32, &[256, 512, 1024, 2048]);
    if let Ok(gpu) = Device::open(DeviceKind::Gpu) {
        bench_device(criterion, "gpu/", &gpu, Float::Bf16, &[1024, 4096, 16384]);
    }
}

fn bench_device(criterion: &mut Criterion, prefix: &str, device: &Device, float: Float, lengths: &[usize]) {
    let random = |&len| Inputs::random(float, Shape::square(1, 8, len, 64)).expect("inputs in memory");
    let inputs: Vec<_> = lengths.iter().map(random).collect();
    for pass in Pass::ALL {
        for mechanism in Mechanism::ALL {
            let mut group = criterion.benchmark_group(format!("{prefix}{}/{}", mechanism.name(), pass.name()));
            group
                .plot_config(PlotConfiguration::default().summary_scale(AxisScale::Logarithmic))
                .sample_size(10)
                .warm_up_time(Duration::from_millis(100))
                .measurement_time(Duration::from_millis(500));
            for inputs in &inputs {
                bench(&mut group, device, mechanism, pass, inputs);
            }
            group.finish();
        }
    }
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, device: &Device, mechanism: Mechanism, pass: Pass, inputs: &Inputs) {
    let len = inputs.shape.queries;
    group.throughput(Throughput::Elements(len as u64));
    group.bench_function(BenchmarkId::from_parameter(len), |bencher| {
        let call = Call::new(mechanism, true, inputs).expect("operands that fit");
        let check = Expected::new(&call, pass, Scope::Sample).check(device).expect("a call that succeeds");
        check.into_result().expect("a result that agrees with the reference");
        let mut timed = device.timed(&call, pass).expect("memory for the results");
        bencher.iter_custom(|runs| {
            let seconds = timed.sample(runs as usize, Duration::MAX).expect("a call that succeeds").seconds;
            Duration::from_secs_f64(seconds.iter().sum::<f64>() / seconds.len() as f64 * runs as f64)
        });
    });
}

criterion_group!(benches, length_scaling);
criterion_main!(benches);
