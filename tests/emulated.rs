//! Plans on the emulator: the executor itself, and sizes of parameters as the C++ compiler sees them.

use attn_kernels::gpu::parameters;
use attn_kernels::gpu::params::Type;
use attn_kernels::gpu::plan::{Argument, Plan};

use crate::common::emulator::{self, SEEDS, Sanitizer};
use crate::common::executor::Tensor;
use crate::common::extent::is_all;
use crate::common::instances;
use crate::common::primitives::PrimitiveParams;

/// 128 words from the input to a workspace, and from there to the output.
fn plan(kernel: &str, input: Option<Argument>) -> Plan {
    let mut plan = Plan::default();
    let between = plan.workspace(512).into();
    plan.launch(kernel, [1; 3], 128, 0, &PrimitiveParams { input: input.into(), output: between });
    let output = Argument::Out.into();
    plan.launch("primitive_vector_4", [1; 3], 128, 0, &PrimitiveParams { input: between, output });
    plan
}

#[test]
fn plans_run() {
    if !emulator::is_available() {
        return emulator::skip("the emulator's executor");
    }
    let emulator = emulator::get(Sanitizer::None).unwrap();
    let content: Vec<u8> = (0..516usize).map(|i| (i / 3) as u8).collect();
    let tensors = [Tensor::input(Argument::Q, content.clone(), 4), Tensor::output(Argument::Out, 512)];
    let run = |kernel, input| emulator.run(&plan(kernel, input), &tensors, &SEEDS);
    let copy = || run("primitive_vector_4", Some(Argument::Q)).unwrap()[&Argument::Out].clone();
    assert_eq!(copy(), content[4..]);

    let error = run("no_such_kernel", Some(Argument::Q)).unwrap_err();
    assert!(error.contains("no_such_kernel") && error.contains("exit status"), "{error}");
    let error = run("primitive_vector_4", None).unwrap_err();
    assert!(error.contains("primitive_vector_4") && error.contains("input: null"), "{error}");
    // The next request has a new process.
    assert_eq!(copy(), content[4..]);

    let missing = emulator.run(&plan("primitive_vector_4", Some(Argument::Q)), &tensors[..1], &SEEDS).unwrap_err();
    assert!(missing.starts_with("no tensor was given for Out of primitive_vector_4<<<"), "{missing}");
}

#[test]
fn emulator_notices_faults() {
    if !emulator::is_available() {
        return emulator::skip("checks of the emulator");
    }
    // The emulator itself notices all but four.
    let sanitizers = [Sanitizer::None, Sanitizer::Address, Sanitizer::Thread];
    for sanitizer in if is_all() { &sanitizers[..] } else { &sanitizers[..1] } {
        let checked = emulator::for_checks(*sanitizer).unwrap().check();
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
