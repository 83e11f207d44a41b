//! Every case on every backend against the f64 reference, forward and backward.

use std::io::Write;

use attn_kernels::problem::DType;

use crate::common::backends::{self, Backend, Pass};
use crate::common::cases::{self, Case};
use crate::common::compare::Judge;
use crate::common::data::Data;
use crate::common::extent::every_second;

/// Runs `cases` in the dtypes that they name on those of the backends that are there. Unless everything is tested, a case is
/// run in every second of them, and the next case in the others.
pub fn check(cases: &[Case], backends: &[Box<dyn Backend>]) {
    let (present, absent): (Vec<_>, Vec<_>) = backends.iter().partition(|backend| backend.is_available());
    let mut complaints = Vec::new();
    let (mut runs, mut not_taken) = (0, 0);
    for (number, case) in cases.iter().enumerate().filter(|_| !present.is_empty()) {
        for dtype in every_second(case.dtypes, number) {
            let data = Data::new(case, dtype);
            let judge = Judge::new(case, &data, dtype);
            for backend in &present {
                if !backend.takes(case) {
                    not_taken += 1;
                    continue;
                }
                runs += 1;
                let found = judged(backend.as_ref(), case, &data, dtype, &judge);
                complaints.extend(found.iter().map(|found| format!("{} {dtype} {case}: {found}", backend.name())));
            }
        }
    }
    let operation = cases.first().map_or("", |case| case.operation.name());
    let skipped: Vec<String> = absent.iter().map(|backend| backend.name()).collect();
    // Past the harness's capture, which hides the output of tests that pass.
    let _ = writeln!(
        std::io::stderr(),
        "{operation}: {} cases, {runs} runs, {not_taken} in a form that the backend refuses; {} backends absent: {}",
        cases.len(),
        skipped.len(),
        skipped.join(", ")
    );
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

/// Runs twice: results must be right, and the same bits.
fn judged(backend: &dyn Backend, case: &Case, data: &Data, dtype: DType, judge: &Judge) -> Vec<String> {
    let run = || backend.run(case, data, dtype, Pass::Both);
    let (first, second) = match (run(), run()) {
        (Ok(first), Ok(second)) => (first, second),
        (Err(error), _) | (_, Err(error)) => return vec![error],
    };
    let mut complaints = judge.complaints(&first);
    for ((name, x), (_, y)) in first.0.iter().zip(&second.0) {
        let differs = |(x, y): (&f64, &f64)| x.to_bits() != y.to_bits();
        if x.data.iter().zip(&y.data).any(differs) {
            complaints.push(format!("{name} differs on repeat"));
        }
    }
    complaints
}

macro_rules! agreement {
    ($($operation:ident)*) => { $(
        #[test]
        fn $operation() {
            check(&cases::$operation(), &backends::all());
        }
    )* };
}

agreement!(softmax diag gau linear performer norm mixed_chunk);

#[test]
fn gradients_of_states() {
    for cases in cases::state_gradients() {
        assert!(cases.len() >= 25, "{} cases", cases.len());
        let judged = |case: Case| Case { dtypes: cases::judged(&case), ..case };
        let cases: Vec<Case> = cases.into_iter().map(judged).collect();
        check(&cases, &backends::all());
    }
}

#[test]
fn lists_are_complete() {
    for cases in cases::lists() {
        let name = cases[0].operation.name();
        assert!(cases.len() >= 25, "{name}: {} cases", cases.len());
        for length in [0, 1, 63, 64, 65, 200, 1000] {
            assert!(cases.iter().any(|case| case.queries == length), "{name}: no case of length {length}");
        }
        for width in [1, 3, 40, 111] {
            assert!(cases.iter().any(|case| case.width == width), "{name}: no case of width {width}");
        }
        let mut reasons: Vec<_> = cases.iter().map(|case| case.why).collect();
        reasons.sort_unstable();
        reasons.dedup();
        assert_eq!(reasons.len(), cases.len(), "{name}: two cases with the same reason");
    }
}
