//! Who computes a case. Another backend is another implementation of [`Backend`] in [`all`].

mod calls;
#[cfg(feature = "candle")]
pub mod candle;
mod cpu;
pub mod emulator_linear;
pub mod emulator_quadratic;

use attn_kernels::cpu::Isa;
use attn_kernels::problem::DType;

use super::cases::Case;
use super::data::Data;
use super::executor::Executor;
use super::reference::Results;

pub use calls::Calls;
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
    /// Whether it has this form of the operation.
    fn takes(&self, _case: &Case) -> bool {
        true
    }
    /// Outputs and, for both passes, gradients; every output buffer starts as NaN.
    fn run(&self, case: &Case, data: &Data, dtype: DType, pass: Pass) -> Result<Results, String>;
}

/// A backend that runs plans.
pub trait Emulated: Backend {
    /// The same plans, run by another.
    fn on(&self, executor: Executor, seeds: &'static [u32]) -> Box<dyn Backend>;
    fn executor(&self) -> &Executor;
    fn seeds(&self) -> &'static [u32];
}

/// Every backend, available or not.
pub fn all() -> Vec<Box<dyn Backend>> {
    let mut all: Vec<Box<dyn Backend>> = Vec::new();
    for isa in Isa::ALL {
        all.push(Box::new(Cpu(isa)));
    }
    #[cfg(feature = "candle")]
    all.push(Box::new(candle::Candle::Cpu));
    all
}

/// The CPU as it is used by default.
pub fn default() -> Cpu {
    Cpu(Isa::detect())
}
