//! Each instruction alone, from one list of expectations, on the emulator and on a GPU.

use std::collections::BTreeSet;
use std::io::Write;

use crate::common::emulator::{self, Sanitizer};
use crate::common::executor::Executor;
use crate::common::primitives;

fn check(executor: &Executor) {
    let Some(primitives) = primitives::read().filter(|_| executor.is_available()) else {
        let _ = writeln!(std::io::stderr(), "SKIPPED on {}: the suite of instructions", executor.name());
        return;
    };
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
