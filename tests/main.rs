//! One binary for all tests; see `common` for what they share.

mod agreement;
mod anything;
mod bad_input;
mod causality;
mod common;
mod differences;
mod invariance;
mod streaming;
