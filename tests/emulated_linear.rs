//! Every case of the linear engine on its kernels under the emulator.

use std::io::Write;
use std::time::Instant;

use attn_kernels::gpu::plan::DeviceFacts;
use attn_kernels::problem::DType;

use crate::common::backends::emulator_linear::EmulatedLinear;
use crate::common::backends::{Backend, Pass};
use crate::common::cases::{self, Case};
use crate::common::compare::Judge;
use crate::common::data::Data;
use crate::common::emulator::{self, SEEDS, Sanitizer};
use crate::common::executor::Executor;

const PLAIN: EmulatedLinear = EmulatedLinear {
    facts: DeviceFacts::H200,
    executor: Executor::Emulator(Sanitizer::None),
    seeds: &SEEDS,
    wide_out: false,
};

/// Little shared memory, so that most pieces of a block's memory lie in global memory.
const SMALL: DeviceFacts = DeviceFacts { shared_bytes_per_block: 16 * 1024, ..DeviceFacts::H200 };

/// Runs the cases whose reason contains one of `reasons`, in `dtypes` of those that they name.
fn check(backend: &EmulatedLinear, cases: &[Case], reasons: &[&str], dtypes: &[DType], pass: Pass) {
    let operation = cases[0].operation.name();
    if !emulator::is_available() {
        return emulator::skip(operation);
    }
    let mut complaints = Vec::new();
    let mut times = Vec::new();
    for case in cases.iter().filter(|case| reasons.iter().any(|reason| case.why.contains(reason))) {
        for &dtype in case.dtypes.iter().filter(|dtype| dtypes.contains(dtype)) {
            let data = Data::new(case, dtype);
            let judge = Judge::new(case, &data, dtype);
            let start = Instant::now();
            let found = match backend.run(case, &data, dtype, pass) {
                Ok(results) => judge.complaints(&results),
                Err(error) => vec![error],
            };
            times.push((start.elapsed().as_secs_f64(), dtype, case.why));
            complaints.extend(found.iter().map(|found| format!("{dtype} {case}: {found}")));
        }
    }
    let longest = times.iter().copied().max_by(|x, y| x.0.total_cmp(&y.0));
    let (longest, dtype, why) = longest.unwrap_or_else(|| panic!("no case of {operation} matches {reasons:?}"));
    let total: f64 = times.iter().map(|(time, ..)| time).sum();
    let of = |dtype| times.iter().filter(|(_, other, _)| *other == dtype).map(|(time, ..)| time).sum::<f64>();
    let _ = writeln!(
        std::io::stderr(),
        "{operation} emulated: {} runs in {total:.1} s ({}); longest {longest:.1} s: {dtype} {why}",
        times.len(),
        dtypes.iter().map(|&dtype| format!("{dtype} {:.1}", of(dtype))).collect::<Vec<_>>().join(", ")
    );
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn linear() {
    check(&PLAIN, &cases::linear(), &[""], &cases::FLOATS, Pass::Both);
}

#[test]
fn performer() {
    check(&PLAIN, &cases::performer(), &[""], &cases::FLOATS, Pass::Both);
}

#[test]
fn norm() {
    check(&PLAIN, &cases::norm(), &[""], &cases::FLOATS, Pass::Both);
}

#[test]
fn mixed_chunk() {
    check(&PLAIN, &cases::mixed_chunk(), &[""], &cases::FLOATS, Pass::Both);
}

#[test]
fn pieces_in_global_memory() {
    let backend = EmulatedLinear { facts: SMALL, ..PLAIN };
    let dtypes = [DType::F64, DType::BF16];
    check(&backend, &cases::linear(), &["Taylor", "decay per token, in seg", "widths 111"], &dtypes, Pass::Both);
    check(&backend, &cases::performer(), &["hyperbolic", "segments, after a state"], &dtypes, Pass::Both);
    check(&backend, &cases::norm(), &["widths 40 and 59", "full, in segments"], &dtypes, Pass::Both);
    check(&backend, &cases::mixed_chunk(), &["larger than a tile"], &dtypes, Pass::Both);
}

#[test]
fn outputs_in_the_type_of_sums() {
    let backend = EmulatedLinear { wide_out: true, ..PLAIN };
    let dtypes = [DType::F16, DType::BF16];
    check(&backend, &cases::linear(), &["several tiles"], &dtypes, Pass::Both);
    check(&backend, &cases::norm(), &["several tiles"], &dtypes, Pass::Both);
    check(&backend, &cases::mixed_chunk(), &["several"], &dtypes, Pass::Both);
}

/// One case for each kernel and each way through it.
fn sanitized(sanitizer: Sanitizer) {
    let backend = EmulatedLinear { executor: Executor::Emulator(sanitizer), seeds: &SEEDS[1..3], ..PLAIN };
    let dtypes = [DType::F32];
    check(&backend, &cases::linear(), &["decay per token, in seg", "SSD", "softmax over"], &dtypes, Pass::Both);
    check(&backend, &cases::performer(), &["causal, in segments", "ReLU features, full"], &dtypes, Pass::Both);
    check(&backend, &cases::norm(), &["full, in segments", "one token, all heads"], &dtypes, Pass::Both);
    check(&backend, &cases::mixed_chunk(), &["chunks of 7"], &dtypes, Pass::Both);
}

#[test]
fn addresses_are_sane() {
    sanitized(Sanitizer::Address);
}

#[test]
fn threads_do_not_race() {
    sanitized(Sanitizer::Thread);
}
