//! Who computes a case. Another backend is another implementation of [`Backend`] in [`all`].

mod cpu;

use attn_kernels::cpu::Isa;
use attn_kernels::problem::DType;

use super::cases::Case;
use super::data::Data;
use super::reference::Results;

pub use cpu::Cpu;

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    Forward,
    Both,
}

pub trait Backend {
    fn name(&self) -> String;
    /// Whether this machine has it.
    fn is_available(&self) -> bool;
    /// Outputs and, for both passes, gradients; every output buffer starts as NaN.
    fn run(&self, case: &Case, data: &Data, dtype: DType, pass: Pass) -> Result<Results, String>;
}

/// Every backend, available or not.
pub fn all() -> Vec<Box<dyn Backend>> {
    Isa::ALL.into_iter().map(|isa| Box::new(Cpu(isa)) as Box<dyn Backend>).collect()
}

/// The CPU as it is used by default.
pub fn default() -> Cpu {
    Cpu(Isa::detect())
}
