//! What the examples and benches share: the mechanisms, calls on random or given inputs, the devices that they
//! run on, and their comparison with the f64 reference.
#![allow(dead_code)] // Each program uses a part of it.

pub mod backend;
pub mod bound;
pub mod call;
pub mod check;
pub mod cost;
pub mod device;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod inputs;
pub mod measure;
pub mod mechanism;
pub mod plain;
pub mod plot;
pub mod reference;
pub mod run;
pub mod tensor;

pub use call::Call;
pub use device::Device;
pub use inputs::Inputs;
pub use mechanism::{Mechanism, Pass};
pub use tensor::Float;
