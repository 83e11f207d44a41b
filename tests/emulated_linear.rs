//! Every case of the linear engine on its kernels under the emulator.

use std::io::Write;
use std::time::Instant;

use attn_kernels::gpu::plan::DeviceFacts;

use crate::common::backends::emulator_linear::EmulatedLinear;
use crate::common::backends::{Backend, Pass};
use crate::common::cases::{self, Case};
use crate::common::compare::Judge;
use crate::common::data::Data;
use crate::common::emulator::{self, SEEDS, Sanitizer};
use crate::common::executor::Executor;

fn check(cases: &[Case]) {
    let operation = cases[0].operation.name();
    if !emulator::is_available() {
        return emulator::skip(operation);
    }
    let backend =
        EmulatedLinear { facts: DeviceFacts::H200, executor: Executor::Emulator(Sanitizer::None), seeds: &SEEDS };
    let only = std::env::var("ONLY").unwrap_or_default();
    let types = std::env::var("TYPES").unwrap_or_default();
    let pass = if std::env::var("FORWARD").is_ok() { Pass::Forward } else { Pass::Both };
    let mut complaints = Vec::new();
    let (mut runs, mut slow) = (0, Vec::new());
    for case in cases.iter().filter(|case| case.to_string().contains(&only)) {
        for &dtype in
            case.dtypes.iter().filter(|dtype| types.is_empty() || types.split(',').any(|t| t == dtype.to_string()))
        {
            let data = Data::new(case, dtype);
            let judge = Judge::new(case, &data, dtype);
            let start = Instant::now();
            let found = match backend.run(case, &data, dtype, pass) {
                Ok(results) => judge.complaints(&results),
                Err(error) => vec![error],
            };
            slow.push((start.elapsed(), dtype, case.to_string()));
            runs += 1;
            complaints.extend(found.iter().map(|found| format!("{dtype} {case}: {found}")));
        }
    }
    slow.sort_by_key(|(time, ..)| std::cmp::Reverse(*time));
    let total: f64 = slow.iter().map(|(time, ..)| time.as_secs_f64()).sum();
    let _ = writeln!(std::io::stderr(), "{operation}: {runs} emulated runs in {total:.1} s");
    for (time, dtype, case) in slow.iter().take(5) {
        let _ = writeln!(std::io::stderr(), "  {:.1} s {dtype} {case}", time.as_secs_f64());
    }
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn linear() {
    check(&cases::linear());
}

#[test]
fn performer() {
    check(&cases::performer());
}

#[test]
fn norm() {
    check(&cases::norm());
}

#[test]
fn mixed_chunk() {
    check(&cases::mixed_chunk());
}
