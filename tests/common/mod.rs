//! Cases, what they are run on, who runs them, and how results are judged.

pub mod backends;
pub mod buffers;
pub mod cases;
pub mod compare;
pub mod cover;
pub mod data;
pub mod emulated;
pub mod emulator;
pub mod executor;
pub mod extent;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod instances;
pub mod options;
pub mod plain;
pub mod primitives;
pub mod random;
pub mod reference;
pub mod sources;
