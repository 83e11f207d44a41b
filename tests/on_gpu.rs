//! Every case and every instruction on a GPU, where this build and this machine have one.

use std::io::Write;

use attn_kernels::gpu::plan::DeviceFacts;

use crate::agreement;
#[cfg(feature = "candle")]
use crate::common::backends::candle::Candle;
use crate::common::backends::{Backend, Pass};
use crate::common::data::Data;
use crate::common::executor::Executor;
#[cfg(feature = "gpu")]
use crate::common::gpu;
use crate::common::{cases, cover};

fn facts() -> DeviceFacts {
    #[cfg(feature = "gpu")]
    if let Ok(device) = gpu::device() {
        return *device.facts();
    }
    DeviceFacts::H200
}

fn backends() -> Vec<Box<dyn Backend>> {
    cover::engines(&Executor::Gpu, facts(), &[0]).into()
}

macro_rules! operations {
    ($($operation:ident)*) => { $(
        #[test]
        fn $operation() {
            agreement::check(&cases::$operation(), &backends());
        }
    )* };
}

operations!(softmax diag gau linear performer norm mixed_chunk);

/// Operations on candle's CUDA tensors, gradients through its graph.
#[cfg(feature = "candle")]
#[test]
fn candle() {
    for cases in cases::lists() {
        agreement::check(&cases, &[Box::new(Candle::Cuda)]);
    }
}

/// Prints what there is.
#[test]
fn info() {
    let _ = write!(std::io::stderr(), "{}", attn_kernels::gpu::info());
}

/// The cases that name every kernel, run but not judged: few enough for the vendor's sanitizer.
#[test]
fn smallest() {
    if !Executor::Gpu.is_available() {
        let _ = writeln!(std::io::stderr(), "SKIPPED, no GPU: the smallest cases");
        return;
    }
    let backends = backends();
    for (case, dtype) in cover::smallest(facts()) {
        let data = Data::new(&case, dtype);
        for backend in backends.iter().filter(|backend| backend.takes(&case)) {
            let error = backend.run(&case, &data, dtype, Pass::Both).err();
            assert_eq!(error, None, "{dtype} {case}");
        }
    }
}
