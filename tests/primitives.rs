//! Each instruction alone, from one list of expectations, on the emulator and on a GPU.

use std::collections::BTreeSet;
use std::io::Write;

use crate::common::emulator::{self, Sanitizer};
use crate::common::executor::Executor;
use crate::common::primitives;

/// Whether an instruction is one of sm_90a, where the GPU runs no such code.
fn is_beyond(executor: &Executor, kernel: &str) -> bool {
    let text = include_str!("../kernels/primitives/primitives.sm90.cu");
    !executor.runs_sm90a() && text.contains(&format!("ATTN_KERNEL({kernel},"))
}

fn check(executor: &Executor) {
    let primitives = primitives::read().filter(|_| executor.is_available());
    let Some(mut primitives) = primitives else {
        let _ = writeln!(std::io::stderr(), "SKIPPED on {}: the suite of instructions", executor.name());
        return;
    };
    let count = primitives.len();
    primitives.retain(|primitive| !is_beyond(executor, &primitive.kernel));
    if primitives.len() < count {
        let _ = writeln!(std::io::stderr(), "SKIPPED on this GPU: {} instructions of sm_90a", count - primitives.len());
    }
    let complaints: Vec<_> = primitives.iter().filter_map(|primitive| primitive.complaint(executor)).collect();
    let _ = writeln!(std::io::stderr(), "{} instructions on {}", primitives.len(), executor.name());
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn emulator() {
    check(&Executor::Emulator(Sanitizer::None));
}

#[test]
fn gpu() {
    check(&Executor::Gpu);
}

/// The list names every kernel of the suite.
#[test]
fn list_is_complete() {
    if !emulator::is_available() {
        return emulator::skip("the list of instructions");
    }
    let listed = emulator::get(Sanitizer::None).unwrap().list();
    let suite: BTreeSet<_> =
        listed.into_iter().map(|(kernel, ..)| kernel).filter(|k| k.starts_with("primitive_")).collect();
    let named = primitives::read().unwrap().into_iter().map(|primitive| primitive.kernel);
    assert_eq!(named.collect::<BTreeSet<_>>(), suite);
}
