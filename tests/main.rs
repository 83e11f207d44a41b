//! One binary for all tests; see `common` for what they share.

mod activations;
mod agreement;
mod anything;
mod asked_for;
mod bad_input;
mod causality;
mod common;
mod differences;
mod emulated_linear;
mod emulated;
mod favor;
mod invariance;
mod kernels;
mod streaming;
mod structure;
