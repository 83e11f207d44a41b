//! Who runs plans.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use attn_kernels::gpu::plan::{Argument, Plan};
use attn_kernels::problem::Operand as _;

use super::buffers::Operand;
use super::emulator::{self, Banks, Sanitizer};
#[cfg(feature = "gpu")]
use super::gpu;

/// Memory that a plan is run on.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub argument: Argument,
    pub content: Option<Vec<u8>>,
    pub bytes: usize,
    /// Where the first element lies, in bytes.
    pub start: usize,
    pub is_output: bool,
}

impl Tensor {
    /// An input whose first element lies `start` bytes into `content`.
    pub fn input(argument: Argument, content: Vec<u8>, start: usize) -> Self {
        Self { argument, bytes: content.len(), content: Some(content), start, is_output: false }
    }

    /// An input with the memory around it.
    pub fn of(argument: Argument, operand: &Operand) -> Self {
        let start = operand.start * operand.view().dtype().size();
        Self::input(argument, operand.buffer.to_bytes(), start)
    }

    /// An output of so many bytes, all 0xff at first.
    pub fn output(argument: Argument, bytes: usize) -> Self {
        Self { argument, bytes, content: None, start: 0, is_output: true }
    }
}

/// Contents of the outputs.
pub type Outputs = BTreeMap<Argument, Vec<u8>>;

#[derive(Debug, Clone)]
pub enum Executor {
    /// The emulator, once per seed.
    Emulator(Sanitizer),
    /// The emulator, once, with what each launch did to the banks of shared memory.
    Counter(Arc<Mutex<Vec<Banks>>>),
    /// The first GPU that this build can use, twice.
    Gpu,
    /// Nobody: outputs are 0, and the plans are kept.
    Recorder(Arc<Mutex<Vec<Plan>>>),
}

impl Executor {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Emulator(_) | Self::Counter(_) => "emulator",
            Self::Gpu => "gpu",
            Self::Recorder(_) => "recorder",
        }
    }

    pub fn is_available(&self) -> bool {
        match self {
            Self::Emulator(_) | Self::Counter(_) => emulator::is_available(),
            #[cfg(feature = "gpu")]
            Self::Gpu => gpu::device().is_ok(),
            #[cfg(not(feature = "gpu"))]
            Self::Gpu => false,
            Self::Recorder(_) => true,
        }
    }

    /// Whether kernels for sm_90a run there.
    pub fn runs_sm90a(&self) -> bool {
        match self {
            #[cfg(feature = "gpu")]
            Self::Gpu => gpu::device().is_ok_and(|device| device.facts().runs_sm90a),
            #[cfg(not(feature = "gpu"))]
            Self::Gpu => false,
            _ => true,
        }
    }

    /// Runs the launches in order; results must be the same bits every time.
    pub fn run(&self, plan: &Plan, tensors: &[Tensor], seeds: &[u32]) -> Result<Outputs, String> {
        match self {
            Self::Emulator(sanitizer) => emulator::get(*sanitizer)?.run(plan, tensors, seeds),
            Self::Counter(all) => {
                let (banks, outputs) = emulator::get(Sanitizer::Counters)?.count_banks(plan, tensors)?;
                all.lock().unwrap().extend(banks);
                Ok(outputs)
            }
            #[cfg(feature = "gpu")]
            Self::Gpu => gpu::run(plan, tensors),
            #[cfg(not(feature = "gpu"))]
            Self::Gpu => Err("this build is without the feature `gpu`".into()),
            Self::Recorder(plans) => {
                plans.lock().unwrap().push(plan.clone());
                let outputs = tensors.iter().filter(|tensor| tensor.is_output);
                Ok(outputs.map(|tensor| (tensor.argument, vec![0; tensor.bytes])).collect())
            }
        }
    }
}
