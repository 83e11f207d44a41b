//! Every kernel under the sanitizers, on the smallest cases that name it.

use std::io::Write;
use std::time::{Duration, Instant};

use attn_kernels::gpu::plan::DeviceFacts;

use crate::common::backends::Pass;
use crate::common::cover;
use crate::common::data::Data;
use crate::common::emulator::{self, Sanitizer};
use crate::common::executor::Executor;
use crate::common::extent;

/// One seed, with warps in an order of their own and late copies.
fn check(sanitizer: Sanitizer) {
    if extent::leaves_out(&format!("every kernel under {sanitizer:?}Sanitizer")) {
        return;
    }
    if !emulator::is_available() {
        return emulator::skip(&format!("kernels under {sanitizer:?}Sanitizer"));
    }
    let start = Instant::now();
    emulator::get(sanitizer).unwrap_or_else(|error| panic!("{error}"));
    let (compiled, start) = (start.elapsed(), Instant::now());
    let chosen = cover::smallest(DeviceFacts::H200);
    let backends = cover::engines(&Executor::Emulator(sanitizer), DeviceFacts::H200, &[2]);
    let (mut complaints, mut longest) = (Vec::new(), (Duration::ZERO, String::new()));
    for (case, dtype) in &chosen {
        let data = Data::new(case, *dtype);
        let began = Instant::now();
        for backend in backends.iter().filter(|backend| backend.takes(case)) {
            let error = backend.run(case, &data, *dtype, Pass::Both).err();
            complaints.extend(error.map(|error| format!("{dtype} {case}: {error}")));
        }
        longest = longest.max((began.elapsed(), format!("{dtype} {case}")));
    }
    let _ = writeln!(
        std::io::stderr(),
        "{sanitizer:?}Sanitizer: compiled in {:.1} s, {} cases in {:.1} s; the longest, {:.1} s: {}",
        compiled.as_secs_f64(),
        chosen.len(),
        start.elapsed().as_secs_f64(),
        longest.0.as_secs_f64(),
        longest.1
    );
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn address() {
    check(Sanitizer::Address);
}

#[test]
fn thread() {
    check(Sanitizer::Thread);
}
