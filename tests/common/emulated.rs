//! Cases of an engine on its kernels under the emulator.

use std::io::Write;
use std::time::Instant;

use attn_kernels::problem::DType;

use super::backends::{Emulated, Pass};
use super::cases::Case;
use super::compare::Judge;
use super::cover;
use super::data::Data;
use super::{emulator, extent};

/// Runs the cases whose reason contains one of `reasons`, in `dtypes` of those that they name; if not everything is tested,
/// as few as have every choice.
pub fn check(backend: &dyn Emulated, cases: &[Case], reasons: &[&str], dtypes: &[DType], pass: Pass) {
    check_of(backend, cases, reasons, dtypes, pass, extent::is_all());
}

/// The same with all of them, whatever is tested.
pub fn check_all(backend: &dyn Emulated, cases: &[Case], reasons: &[&str], dtypes: &[DType], pass: Pass) {
    check_of(backend, cases, reasons, dtypes, pass, true);
}

fn check_of(backend: &dyn Emulated, cases: &[Case], reasons: &[&str], dtypes: &[DType], pass: Pass, takes_all: bool) {
    let operation = cases[0].operation.name();
    if !emulator::is_available() {
        return emulator::skip(operation);
    }
    let mut complaints = Vec::new();
    let mut times = Vec::new();
    let is_asked = |case: &&Case| backend.takes(case) && reasons.iter().any(|reason| case.why.contains(reason));
    let of = |case: &Case| {
        let case = case.clone();
        case.dtypes.iter().filter(|dtype| dtypes.contains(dtype)).map(move |&dtype| (case.clone(), dtype))
    };
    let mut chosen: Vec<_> = cases.iter().filter(is_asked).flat_map(of).collect();
    let count = chosen.len();
    if !takes_all {
        chosen = cover::of_choices(chosen, backend, pass);
    }
    let runner = backend.on(backend.executor().clone(), extent::seeds(backend.seeds()));
    for (case, dtype) in &chosen {
        let data = Data::new(case, *dtype);
        let judge = Judge::new(case, &data, *dtype);
        let start = Instant::now();
        let found = match runner.run(case, &data, *dtype, pass) {
            Ok(results) => judge.complaints(&results),
            Err(error) => vec![error],
        };
        times.push((start.elapsed().as_secs_f64(), *dtype, case.why));
        complaints.extend(found.iter().map(|found| format!("{dtype} {case}: {found}")));
    }
    let longest = times.iter().copied().max_by(|x, y| x.0.total_cmp(&y.0));
    let (longest, dtype, why) = longest.unwrap_or_else(|| panic!("no case of {operation} matches {reasons:?}"));
    let total: f64 = times.iter().map(|(time, ..)| time).sum();
    let of = |dtype| times.iter().filter(|(_, other, _)| *other == dtype).map(|(time, ..)| time).sum::<f64>();
    let _ = writeln!(
        std::io::stderr(),
        "{operation} emulated: {} runs of {count} in {total:.1} s ({}); longest {longest:.1} s: {dtype} {why}",
        times.len(),
        dtypes.iter().map(|&dtype| format!("{dtype} {:.1}", of(dtype))).collect::<Vec<_>>().join(", ")
    );
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}
