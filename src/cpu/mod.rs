//! The CPU backend: both engines on slices, forward and backward, over the threads of the current rayon pool.
//!
//! Operands are [`View`](crate::problem::View)s, outputs contiguous slices. Results are the same on every run with
//! the same number of threads and the same [`Isa`].

mod buffer;
#[cfg(feature = "candle")]
pub(crate) mod elementwise;
mod finish;
pub mod linear;
mod parallel;
pub mod quadratic;
mod rows;
mod simd;
mod tile;

pub use simd::Isa;

/// Binds the type of sums for inputs of a dtype.
macro_rules! dispatch {
    ($dtype:expr, $t:ident => $body:block) => {
        match $dtype.accumulator() {
            $crate::problem::DType::F64 => {
                type $t = f64;
                $body
            }
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}
use dispatch;
