//! The engines as operations of candle's graph.
//!
//! A call holds a problem with its tensors, computes, and puts its result into the graph with a node that knows the
//! way back.

mod backend;
#[cfg(feature = "cuda")]
mod cuda;
mod delta;
mod elements;
mod graph;
mod linear;
mod quadratic;
mod reading;
mod results;
mod tensors;

pub use delta::{DeltaCall, DeltaTensors};
pub use elements::{Computation, compute};
pub use linear::{LinearCall, LinearTensors};
pub use quadratic::QuadraticCall;
pub use tensors::{Admission, accumulator, rows};
