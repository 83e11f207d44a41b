//! Efficient attention with gradients (documentation follows).
#![deny(missing_docs)]

#[cfg(feature = "candle")]
pub mod candle;
pub mod cpu;
mod error;
pub mod gau;
pub mod linear;
pub mod performer;
pub mod problem;
pub mod random_features;
pub mod reference;
pub mod softmax;
pub mod transnormer;

pub use error::{Error, Result};
