//! The GPU backend.
//!
//! A launch is a value: [`plan`] says what would run (kernels, grids, shared memory, parameters, workspaces) without a
//! GPU, so that it can be printed and tested anywhere, and is compiled with every set of features. With the feature
//! `gpu` a `Device` runs plans; the driver is opened at run time, so that one binary works with and without a GPU.
//! [`info`] says what there is.

#[cfg(feature = "gpu")]
mod driver;
mod info;
#[cfg(feature = "gpu")]
mod launch;
pub mod linear;
#[cfg(feature = "gpu")]
mod module;
pub mod params;
pub mod plan;
pub mod quadratic;
#[cfg(all(test, feature = "gpu", target_os = "linux"))]
mod tests;
#[cfg(feature = "gpu")]
mod view;
#[cfg(feature = "gpu")]
mod workspaces;

pub use info::{DeviceInfo, Info, info};
#[cfg(feature = "gpu")]
pub use launch::{Arguments, Device};
#[cfg(feature = "gpu")]
pub use view::{DeviceSlice, DeviceSliceMut, DeviceView};

use params::Type;

/// The parameter structs of all kernels, for tests that compare them with their twins on the device.
pub fn parameters() -> Vec<Type> {
    [linear::parameters(), quadratic::parameters()].concat()
}
