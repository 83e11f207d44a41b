//! The GPU backend.
//!
//! A launch is a value: [`plan`] says what would run (kernels, grids, shared memory, parameters, workspaces) without a
//! GPU, so that it can be printed and tested anywhere, and is compiled with every set of features.

pub mod params;
pub mod plan;

use params::Type;

/// The parameter structs of all kernels, for tests that compare them with their twins on the device.
pub fn parameters() -> Vec<Type> {
    Vec::new()
}
