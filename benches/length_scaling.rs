//! The cases of `examples/length_scaling.rs` under criterion: `cargo bench --bench length_scaling [-- FILTER]`.
//!
//! Causal, f32, batch 1, 8 heads of width 64, each case checked against the f64 reference before it is timed.

#[path = "../examples/common/mod.rs"]
mod common;

use std::time::Duration;

use common::check::{Expected, Scope};
use common::inputs::Shape;
use common::{Call, Float, Inputs, Mechanism, Pass};
use criterion::measurement::WallTime;
use criterion::{
    AxisScale, BenchmarkGroup, BenchmarkId, Criterion, PlotConfiguration, Throughput, criterion_group, criterion_main,
};

const LENGTHS: [usize; 4] = [256, 512, 1024, 2048];

fn length_scaling(criterion: &mut Criterion) {
    let inputs = LENGTHS.map(|len| Inputs::random(Float::F32, Shape::square(1, 8, len, 64)).expect("inputs in memory"));
    for pass in Pass::ALL {
        for mechanism in Mechanism::ALL {
            let mut group = criterion.benchmark_group(format!("{}/{}", mechanism.name(), pass.name()));
            group
                .plot_config(PlotConfiguration::default().summary_scale(AxisScale::Logarithmic))
                .sample_size(10)
                .warm_up_time(Duration::from_millis(100))
                .measurement_time(Duration::from_millis(500));
            for inputs in &inputs {
                bench(&mut group, mechanism, pass, inputs);
            }
            group.finish();
        }
    }
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, mechanism: Mechanism, pass: Pass, inputs: &Inputs) {
    let len = inputs.shape.queries;
    group.throughput(Throughput::Elements(len as u64));
    group.bench_function(BenchmarkId::from_parameter(len), |bencher| {
        let call = Call::new(mechanism, true, inputs).expect("operands that fit");
        let check = Expected::new(&call, pass, Scope::Sample).check().expect("a call that succeeds");
        check.into_result().expect("a result that agrees with the reference");
        let (mut outputs, mut gradients) = (call.outputs(pass), call.gradients());
        call.forward(&mut outputs).expect("a call that succeeds");
        bencher.iter(|| match pass {
            Pass::Fwd => call.forward(&mut outputs),
            Pass::Bwd => call.backward(&outputs, &inputs.d_out, &mut gradients),
        });
    });
}

criterion_group!(benches, length_scaling);
criterion_main!(benches);
