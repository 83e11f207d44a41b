//! One binary for all tests; see `common` for what they share.

mod activations;
mod agreement;
mod anything;
mod asked_for;
mod bad_input;
mod calls;
mod causality;
mod common;
mod conflicts;
#[cfg(feature = "candle")]
mod convolution;
mod decays;
mod delta;
mod differences;
mod dropout;
mod emulated;
mod emulated_linear;
mod emulated_quadratic;
#[cfg(feature = "candle")]
mod examples;
mod favor;
#[cfg(feature = "gpu")]
mod gpu_calls;
mod invariance;
mod kernels;
#[cfg(feature = "candle")]
mod nn;
mod on_gpu;
mod packed;
mod plans;
mod primitives;
mod sanitized;
#[cfg(feature = "candle")]
mod scans;
mod streaming;
mod structure;
