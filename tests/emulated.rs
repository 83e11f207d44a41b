//! Plans on the emulator: the executor itself, and sizes of parameters as the C++ compiler sees them.

use attn_kernels::gpu::parameters;
use attn_kernels::gpu::params::{Pointer, Type};
use attn_kernels::gpu::plan::{Argument, Plan};

use crate::common::emulator::{self, SEEDS, Sanitizer, Tensor};
use crate::common::instances;

attn_kernels::kernel_params! {
    /// Of the kernels in tests/emulator/faults.cu.
    struct FaultParams {
        input: Pointer,
        output: Pointer,
        count: i64,
    }
}

/// A plan of one of these kernels.
fn plan(kernel: &str) -> Plan {
    let mut plan = Plan::default();
    let params = FaultParams { input: Argument::Q.into(), output: Argument::Out.into(), count: 1 };
    plan.launch(kernel, [1; 3], 128, 0, &params);
    plan
}

fn tensors() -> [Tensor; 2] {
    [Tensor::input(Argument::Q, vec![0; 512], 0), Tensor::output(Argument::Out, 512)]
}

#[test]
fn plans_run() {
    if !emulator::is_available() {
        return emulator::skip("the emulator's executor");
    }
    let emulator = emulator::get(Sanitizer::None).unwrap();
    let run = |kernel| emulator.run(&plan(kernel), &tensors(), &SEEDS);
    let ones = 1f32.to_le_bytes().repeat(128);
    assert_eq!(run("measure_nothing").unwrap()[&Argument::Out], ones);
    let error = run("no_such_kernel").unwrap_err();
    assert!(error.contains("no_such_kernel") && error.contains("exit status"), "{error}");
    // The next request has a new process.
    assert_eq!(run("measure_nothing").unwrap()[&Argument::Out], ones);

    let missing = emulator.run(&plan("measure_nothing"), &tensors()[..1], &SEEDS).unwrap_err();
    assert!(missing.starts_with("no tensor was given for Out of measure_nothing<<<"), "{missing}");
}

#[test]
fn emulator_notices_faults() {
    if !emulator::is_available() {
        return emulator::skip("checks of the emulator");
    }
    for sanitizer in [Sanitizer::None, Sanitizer::Address, Sanitizer::Thread] {
        let checked = emulator::get(sanitizer).unwrap().check();
        assert!(checked.is_ok(), "{sanitizer:?}: {}", checked.unwrap_err());
    }
}

/// Parameters of a kernel are as large on the device as here, and it has the threads that the list says.
#[test]
fn parameters_have_the_same_size() {
    if !emulator::is_available() {
        return emulator::skip("sizes of parameters");
    }
    let twins = parameters();
    let listed = emulator::get(Sanitizer::None).unwrap().list();
    for instance in instances::all() {
        let name = &instance.kernel;
        let (_, size, _) =
            listed.iter().find(|(kernel, ..)| kernel == name).unwrap_or_else(|| panic!("{name} is lost"));
        let twin = twins.iter().find(|twin| twin.name() == instance.params);
        assert_eq!(Some(*size), twin.map(Type::size), "{name}: bytes of {}", instance.params);
    }
}
