//! The plans of cases, and few small cases whose plans name every kernel, or have every choice as well.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use attn_kernels::gpu::plan::{DeviceFacts, Plan};
use attn_kernels::problem::DType;

use super::backends::emulator_linear::EmulatedLinear;
use super::backends::emulator_quadratic::EmulatedQuadratic;
use super::backends::{Backend, Emulated, Pass};
use super::cases::{self, Case};
use super::data::Data;
use super::executor::Executor;

/// Both engines' kernels on an executor; each runs the cases that it takes.
pub fn engines(executor: &Executor, facts: DeviceFacts, seeds: &'static [u32]) -> [Box<dyn Backend>; 2] {
    let quadratic = EmulatedQuadratic { facts, executor: executor.clone(), seeds, wide_out: false };
    [
        Box::new(quadratic),
        Box::new(EmulatedLinear { facts, executor: executor.clone(), seeds, wide_out: false, state: true }),
    ]
}

/// What a device would run for a case, forward and backward.
pub fn plans(case: &Case, data: &Data, dtype: DType, facts: DeviceFacts) -> Vec<Plan> {
    let plans = Arc::new(Mutex::default());
    for backend in engines(&Executor::Recorder(Arc::clone(&plans)), facts, &[0]) {
        if backend.takes(case) {
            backend.run(case, data, dtype, Pass::Both).unwrap_or_else(|error| panic!("{dtype} {case}: {error}"));
        }
    }
    std::mem::take(&mut *plans.lock().unwrap())
}

pub fn kernels(plans: &[Plan]) -> BTreeSet<String> {
    plans.iter().flat_map(|plan| &plan.launches).map(|launch| launch.kernel.clone()).collect()
}

/// Cases that together name every kernel that any names.
pub fn smallest(facts: DeviceFacts) -> Vec<(Case, DType)> {
    let of = |case: Case| case.dtypes.iter().map(move |&dtype| (case.clone(), dtype));
    cover(cases::all().into_iter().flat_map(of).collect(), |case, dtype| {
        kernels(&plans(case, &Data::new(case, dtype), dtype, facts))
    })
}

/// Of cases of one operation, some that together name every kernel that any names, and have every choice of options and
/// sizes that any has, on kernels for warpgroups and on the others.
pub fn of_choices(all: Vec<(Case, DType)>, backend: &dyn Emulated, pass: Pass) -> Vec<(Case, DType)> {
    cover(all, |case, dtype| {
        let plans = Arc::new(Mutex::default());
        let recorder = backend.on(Executor::Recorder(Arc::clone(&plans)), &[0]);
        let run = recorder.run(case, &Data::new(case, dtype), dtype, pass);
        run.unwrap_or_else(|error| panic!("{dtype} {case}: {error}"));
        let mut named = kernels(&plans.lock().unwrap());
        let family = if named.iter().any(|kernel| kernel.contains("sm90")) { "warpgroups" } else { "warps" };
        named.extend(choices(case).into_iter().map(|choice| format!("{family}, {choice}")));
        named
    })
}

/// Fields of the options with their values, without numbers, and how sizes are to each other.
fn choices(case: &Case) -> BTreeSet<String> {
    let options = format!("{:?}", case.operation);
    let words = options.split([',', '{', '}', '(', ')']).map(|word| {
        let letters: String = word.chars().filter(|c| c.is_alphabetic() || *c == ':').collect();
        letters
    });
    let mut choices: BTreeSet<String> = words.filter(|word| !word.is_empty()).collect();
    let [heads, key_heads, value_heads] = case.heads;
    choices.extend([
        format!("queries {:?} keys", case.queries.cmp(&case.keys)),
        format!("grouped {} {}", heads > key_heads, key_heads.cmp(&value_heads) as i8),
        format!("state {}", case.prefix > 0),
        format!("{:?}", case.layout),
    ]);
    choices
}

/// Those that together have every name that any has: each, smallest first, if it has a new one, without those that the
/// others then make superfluous.
fn cover(mut all: Vec<(Case, DType)>, names: impl Fn(&Case, DType) -> BTreeSet<String>) -> Vec<(Case, DType)> {
    all.sort_by_key(|(case, _)| work(case));
    let mut uses = BTreeMap::new();
    let mut chosen = Vec::new();
    for (case, dtype) in all {
        let named = names(&case, dtype);
        if named.iter().any(|kernel| !uses.contains_key(kernel)) {
            named.iter().for_each(|kernel| *uses.entry(kernel.clone()).or_insert(0) += 1);
            chosen.push((case, dtype, named));
        }
    }
    chosen.retain(|(.., named)| {
        let is_needed = named.iter().any(|kernel| uses[kernel] == 1);
        if !is_needed {
            named.iter().for_each(|kernel| *uses.get_mut(kernel).expect("counted above") -= 1);
        }
        is_needed
    });
    chosen.into_iter().map(|(case, dtype, _)| (case, dtype)).collect()
}

/// Multiplications of tiles, about.
fn work(case: &Case) -> usize {
    let tiles = |size: usize| size.div_ceil(32).max(1);
    let widths = tiles(case.width) * tiles(case.width) + tiles(case.value_width);
    case.batch * case.output_heads() * tiles(case.queries) * tiles(case.keys) * widths
}
