//! What the examples and benches share: the mechanisms, calls of the CPU backend on random or given inputs, and
//! their comparison with the f64 reference.
#![allow(dead_code)] // Each program uses a part of it.

pub mod call;
pub mod check;
pub mod cost;
pub mod inputs;
pub mod linear_call;
pub mod measure;
pub mod mechanism;
pub mod plain;
pub mod reference;
pub mod tensor;

pub use call::Call;
pub use inputs::Inputs;
pub use mechanism::{Mechanism, Pass};
pub use tensor::Float;
