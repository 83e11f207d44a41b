//! Every case of the linear engine on its kernels under the emulator.

use attn_kernels::gpu::plan::DeviceFacts;
use attn_kernels::problem::DType;

use crate::common::backends::emulator_linear::EmulatedLinear;
use crate::common::backends::{Backend, Pass};
use crate::common::cases::{self, Case};
use crate::common::compare::{error, magnitude};
use crate::common::data::Data;
use crate::common::emulated::{check, check_all};
use crate::common::emulator::{self, SEEDS, Sanitizer};
use crate::common::executor::Executor;
use crate::common::extent;
use crate::common::reference::expected;

const PLAIN: EmulatedLinear = EmulatedLinear {
    facts: DeviceFacts::H200,
    executor: Executor::Emulator(Sanitizer::None),
    seeds: &SEEDS,
    wide_out: false,
    state: true,
};

/// Little shared memory, so that most pieces of a block's memory lie in global memory.
const SMALL: DeviceFacts = DeviceFacts { shared_bytes_per_block: 16 * 1024, ..DeviceFacts::H200 };

#[test]
fn linear() {
    check(&PLAIN, &cases::linear(), &[""], &cases::FLOATS, Pass::Both);
}

const HALVES: [DType; 2] = [DType::F16, DType::BF16];

/// Cases for warpgroups without a state to be handed out, and with wide outputs.
#[test]
fn warpgroups() {
    let only = |cases: Vec<Case>| cases.into_iter().filter(|case| case.dtypes == HALVES).collect::<Vec<_>>();
    let stateless = EmulatedLinear { state: false, ..PLAIN };
    check(&stateless, &only(cases::linear()), &[""], &HALVES, Pass::Forward);
    check(&stateless, &only(cases::norm()), &[""], &HALVES, Pass::Forward);
    check(&stateless, &only(cases::performer()), &[""], &HALVES, Pass::Forward);
    let wide = EmulatedLinear { wide_out: true, ..PLAIN };
    check(&wide, &only(cases::linear()), &["128 by 128", "two blocks"], &HALVES, Pass::Forward);
    check(&wide, &only(cases::performer()), &["two blocks"], &HALVES, Pass::Forward);
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

/// One segment, whose sums are as long as it is. (The gradients of k are differences of two of them, which a dense
/// implementation takes before it sums up.)
#[test]
fn long_sums() {
    let facts = DeviceFacts { multiprocessors: 1, ..DeviceFacts::H200 };
    let backend = EmulatedLinear { facts, seeds: &SEEDS[1..2], ..PLAIN };
    let cases: Vec<Case> = cases::long_sums().into_iter().filter(|case| case.operation.has_state()).collect();
    check_all(&backend, &cases, &[""], &cases::FLOATS, Pass::Forward);
    let stateless = EmulatedLinear { state: false, ..backend };
    check(&stateless, &cases, &["aligned"], &HALVES, Pass::Forward);
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
    if extent::leaves_out(&format!("linear kernels under {sanitizer:?}Sanitizer")) {
        return;
    }
    let backend = EmulatedLinear { executor: Executor::Emulator(sanitizer), seeds: &SEEDS[1..3], ..PLAIN };
    let dtypes = [DType::F32];
    check(
        &backend,
        &cases::linear(),
        &["decay per token, in seg", "resets, in seg", "SSD", "softmax over"],
        &dtypes,
        Pass::Both,
    );
    check(&backend, &cases::performer(), &["causal, in segments", "ReLU features, full"], &dtypes, Pass::Both);
    check(&backend, &cases::norm(), &["full, in segments", "one token, all heads"], &dtypes, Pass::Both);
    check(&backend, &cases::mixed_chunk(), &["chunks of 7"], &dtypes, Pass::Both);
}

/// One size of each kernel for warpgroups.
fn sanitized_warpgroups(sanitizer: Sanitizer) {
    if extent::leaves_out(&format!("linear kernels under {sanitizer:?}Sanitizer")) {
        return;
    }
    let backend = EmulatedLinear { executor: Executor::Emulator(sanitizer), seeds: &SEEDS[1..3], ..PLAIN };
    let reasons = [
        "64 wide, one chunk",
        "128 by 128, decay",
        "256 wide, in",
        "64 by 128, in segments",
        "shared q, k",
        "resets, key mask, in",
    ];
    check(&backend, &cases::linear(), &reasons, &HALVES, Pass::Both);
    check(&backend, &cases::linear(), &["256 wide, elu", "full, 64 wide"], &HALVES, Pass::Forward);
    check(&backend, &cases::mixed_chunk(), &["64 wide, key mask", "two blocks of values"], &HALVES, Pass::Forward);
    check(&backend, &cases::norm(), &["128 by 104"], &HALVES, Pass::Both);
    check(
        &backend,
        &cases::performer(),
        &["a chunk and a bit", "two blocks", "256 features in"],
        &HALVES,
        Pass::Forward,
    );
    let stateless = EmulatedLinear { state: false, ..backend };
    check(&stateless, &cases::linear(), &["256 wide, elu"], &HALVES, Pass::Forward);
    check(
        &stateless,
        &cases::performer(),
        &["key mask, 64 wide", "64 wide, 256", "full, large"],
        &HALVES,
        Pass::Forward,
    );
}

#[test]
fn addresses_are_sane() {
    sanitized(Sanitizer::Address);
}

#[test]
fn threads_do_not_race() {
    sanitized(Sanitizer::Thread);
}

#[test]
fn addresses_of_warpgroups_are_sane() {
    sanitized_warpgroups(Sanitizer::Address);
}

#[test]
fn warpgroups_do_not_race() {
    sanitized_warpgroups(Sanitizer::Thread);
}

/// Of the keys, the first are so long that a short one behind them leaves nothing of what they added; the next is the
/// shortest. With ω = 0 only the stabiliser is left of the weights.
fn with_a_jump(case: &Case, dtype: DType) -> Data {
    let mut data = Data::new(case, dtype);
    let omega = data.omega.as_mut().expect("ω of a Performer");
    omega.data.fill(0.0);
    data.q.data.fill(0.0);
    let [.., keys, width] = data.k.shape;
    for (j, row) in data.k.data.chunks_exact_mut(width).enumerate() {
        row.fill(0.0);
        row[0] = match j % keys {
            0..40 => 1e9,
            40 => 2.0,
            _ => 0.0,
        };
    }
    data
}

#[test]
fn a_jump_of_the_stabilizer_spares_later_ones() {
    let backend = EmulatedLinear { seeds: &SEEDS[1..3], ..PLAIN };
    if !backend.is_available() {
        return emulator::skip("a jump of the stabiliser");
    }
    let of = |why: &str, dtype: DType| {
        let found = cases::performer().into_iter().find(|case| case.why == why && case.dtypes.contains(&dtype));
        found.unwrap_or_else(|| panic!("no case {why} in {dtype}"))
    };
    let portable = "a tile and one";
    for (why, dtype, bound) in [
        (portable, DType::F32, 1e-5),
        (portable, DType::F64, 1e-13),
        ("64 wide, 128 features, a chunk and a bit", DType::BF16, 1e-2),
    ] {
        let case = of(why, dtype);
        let data = with_a_jump(&case, dtype);
        let got = backend.run(&case, &data, dtype, Pass::Both).unwrap();
        for (name, expected) in &expected(&case, &data).0 {
            let error = error(got.get(name).expect(name), expected).unwrap().worst;
            let limit = bound * (1.0 + magnitude(expected).worst);
            assert!(error <= limit, "{dtype} {name} is off by {error:e} of at most {limit:e}");
        }
    }
}
