//! Every case of the quadratic engine on its kernels under the emulator.

use attn_kernels::gpu::plan::DeviceFacts;
use attn_kernels::problem::DType;

use crate::common::backends::Pass;
use crate::common::backends::emulator_quadratic::EmulatedQuadratic;
use crate::common::cases::{self, Case};
use crate::common::emulated::{check, check_all};
use crate::common::emulator::{SEEDS, Sanitizer};
use crate::common::executor::Executor;
use crate::common::extent;

const PLAIN: EmulatedQuadratic = EmulatedQuadratic {
    facts: DeviceFacts::H200,
    executor: Executor::Emulator(Sanitizer::None),
    seeds: &SEEDS,
    wide_out: false,
};

/// As few multiprocessors as blocks that walk several blocks of rows need.
const FEW: DeviceFacts = DeviceFacts { multiprocessors: 3, ..DeviceFacts::H200 };

#[test]
fn softmax() {
    check(&PLAIN, &cases::softmax(), &[""], &cases::FLOATS, Pass::Both);
}

#[test]
fn diag() {
    check(&PLAIN, &cases::diag(), &[""], &cases::FLOATS, Pass::Both);
}

#[test]
fn gau() {
    check(&PLAIN, &cases::gau(), &[""], &cases::FLOATS, Pass::Both);
}

#[test]
fn mixed_chunk() {
    // Many heads are the same to the local branch as to the others.
    let cases: Vec<Case> = cases::mixed_chunk().into_iter().filter(|case| case.batch < 100).collect();
    check(&PLAIN, &cases, &[""], &cases::FLOATS, Pass::Both);
}

/// Warpgroups, in more orders: other warps first, the last tensor copy first, other lanes elected.
#[test]
fn warpgroups() {
    let backend = EmulatedQuadratic { facts: FEW, seeds: &[4, 5, 6, 7], ..PLAIN };
    let dtypes = [DType::F16, DType::BF16];
    check(&backend, &cases::softmax(), &["aligned"], &dtypes, Pass::Both);
    check(&backend, &cases::diag(), &["aligned"], &dtypes, Pass::Both);
    check(&backend, &cases::gau(), &["aligned"], &dtypes, Pass::Both);
    check(&backend, &cases::mixed_chunk(), &["aligned"], &dtypes, Pass::Both);
}

/// All keys by one block, which adds up as many as there are. (In 16 bits the gradients of q are what the rounding of an
/// output leaves of ⟨d_out, out⟩.)
#[test]
fn long_sums() {
    let facts = DeviceFacts { multiprocessors: 1, ..DeviceFacts::H200 };
    let backend = EmulatedQuadratic { facts, seeds: &SEEDS[1..2], ..PLAIN };
    let cases: Vec<Case> = cases::long_sums().into_iter().filter(|case| !case.operation.has_state()).collect();
    check_all(&backend, &cases, &[""], &[DType::F32], Pass::Both);
    check(&backend, &cases, &[""], &[DType::F16, DType::BF16], Pass::Forward);
}

/// Rows that do not stay in shared memory, single stages.
#[test]
fn little_shared_memory() {
    let backend = EmulatedQuadratic { facts: DeviceFacts::RTX_3090, seeds: &SEEDS[..2], ..PLAIN };
    let reasons = ["widest", "widths", "paper's widths"];
    check(&backend, &cases::softmax(), &reasons, &cases::FLOATS, Pass::Both);
    check(&backend, &cases::gau(), &reasons, &cases::FLOATS, Pass::Both);
    check(&backend, &cases::diag(), &reasons, &cases::FLOATS, Pass::Both);
}

#[test]
fn outputs_in_the_type_of_sums() {
    let backend = EmulatedQuadratic { wide_out: true, seeds: &SEEDS[..2], ..PLAIN };
    let dtypes = [DType::F16, DType::BF16];
    check(&backend, &cases::softmax(), &["several tiles", "a tile and one"], &dtypes, Pass::Both);
    check(&backend, &cases::diag(), &["many blocks", "ReLU"], &dtypes, Pass::Both);
    check(&backend, &cases::gau(), &["several tiles", "key mask"], &dtypes, Pass::Both);
    check(&backend, &cases::softmax(), &["aligned, causal", "aligned, decoding"], &dtypes, Pass::Forward);
}

/// One case for each kernel and each way through it.
fn sanitized(sanitizer: Sanitizer) {
    if extent::leaves_out(&format!("quadratic kernels under {sanitizer:?}Sanitizer")) {
        return;
    }
    let backend = EmulatedQuadratic { executor: Executor::Emulator(sanitizer), seeds: &SEEDS[1..3], ..PLAIN };
    let dtypes = [DType::F64, DType::BF16];
    let softmax = ["decoding", "bias in a window", "soft-cap, bias", "widths 111", "grouped heads"];
    check(&backend, &cases::softmax(), &softmax, &dtypes, Pass::Both);
    check(&backend, &cases::diag(), &["ragged last block, causal", "widths 111 and 40, ReLU"], &dtypes, Pass::Both);
    check(&backend, &cases::gau(), &["bias per head, row sum", "one tile, the paper"], &dtypes, Pass::Both);
    // Alignment allows 16-byte copies here.
    check(&backend, &cases::softmax(), &["one tile"], &[DType::F16, DType::F32], Pass::Both);
}

fn sanitized_warpgroups(sanitizer: Sanitizer) {
    if extent::leaves_out(&format!("quadratic kernels under {sanitizer:?}Sanitizer")) {
        return;
    }
    let executor = Executor::Emulator(sanitizer);
    let backend = EmulatedQuadratic { facts: FEW, executor, seeds: &SEEDS[1..3], ..PLAIN };
    let aligned =
        ["aligned, causal", "aligned, ragged", "aligned, widest tile", "aligned, window", "aligned, keys in parts"];
    check(&backend, &cases::softmax(), &aligned, &[DType::BF16], Pass::Both);
    check(&backend, &cases::gau(), &["aligned, several tiles"], &[DType::F16], Pass::Forward);
}

#[test]
fn addresses_of_warpgroups_are_sane() {
    sanitized_warpgroups(Sanitizer::Address);
}

#[test]
fn warpgroups_do_not_race() {
    sanitized_warpgroups(Sanitizer::Thread);
}

#[test]
fn addresses_are_sane() {
    sanitized(Sanitizer::Address);
}

#[test]
fn threads_do_not_race() {
    sanitized(Sanitizer::Thread);
}
