//! The delta engine on every CPU path against the recurrence, and what must not matter to it.

mod case;
mod golden;
mod plain;
mod properties;
mod run;

use attn_kernels::cpu::Isa;
use attn_kernels::problem::DType;
use half::{bf16, f16};

use crate::common::buffers::Layout;
use crate::common::compare::Judge;
use crate::common::plain::SAMPLES;
use crate::common::reference::Results;
use case::{Case, Data, Form, cases, chosen, expected};
use run::run;

/// Whether a result is in the dtype of sums whatever that of the inputs.
fn is_sum(name: &str) -> bool {
    matches!(name, "state" | "d_beta" | "d_log_decay" | "d_bonus" | "d_state")
}

fn judge(case: &Case, data: &Data, dtype: DType) -> Judge {
    let numbers = case.batch * case.state_heads() * case.tokens * case.widths[0] * case.widths[1];
    let samples = (1_000_000 / numbers.max(1)).clamp(3, SAMPLES);
    let plain: Vec<Results> = (0..samples).map(|sample| plain::run(case, data, sample)).collect();
    let of_result = |name: &str| if is_sum(name) { dtype.accumulator() } else { dtype };
    Judge::of(expected(case, data), &plain, dtype, of_result)
}

fn run_in(dtype: DType, case: &Case, data: &Data, layout: Layout) -> Results {
    match dtype {
        DType::F16 => run::<f16>(case, data, layout),
        DType::BF16 => run::<bf16>(case, data, layout),
        DType::F32 => run::<f32>(case, data, layout),
        _ => run::<f64>(case, data, layout),
    }
}

fn paths() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

#[test]
fn every_form_has_its_cases() {
    for form in Form::ALL {
        assert!(cases().iter().filter(|case| case.form == form).count() >= 40);
    }
}

/// On every path, in every dtype, without gaps between rows and with them.
#[test]
fn as_the_reference() {
    let mut complaints = Vec::new();
    for case in chosen() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let data = Data::new(&case, dtype);
            let judge = judge(&case, &data, dtype);
            for isa in paths() {
                let layout = if isa == Isa::Portable { Layout::Gaps } else { Layout::Contiguous };
                let results = isa.force(|| run_in(dtype, &case, &data, layout)).expect("an available path");
                let wrong = judge.complaints(&results);
                complaints.extend(wrong.iter().map(|line| format!("{isa:?} {dtype} {case:?}\n    {line}")));
            }
        }
    }
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}
