//! What the examples and benches share: the mechanisms, calls on random or given inputs, the devices that they
//! run on, and their comparison with the f64 reference.
#![allow(dead_code, unused_imports)] // Each program uses a part of it.

pub mod arguments;
pub mod backend;
pub mod bound;
pub mod call;
#[cfg(feature = "candle")]
pub mod candle_device;
pub mod chains;
pub mod chart;
pub mod check;
pub mod cost;
pub mod device;
pub mod files;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod inputs;
pub mod measure;
pub mod mechanism;
#[cfg(feature = "candle")]
pub mod optimizer;
pub mod plain;
pub mod rates;
pub mod reference;
pub mod run;
pub mod table;
pub mod tensor;
#[cfg(feature = "candle")]
pub mod tensor_operations;

pub use call::Call;
pub use device::Device;
pub use inputs::Inputs;
pub use mechanism::{Mechanism, Pass};
pub use tensor::Float;
