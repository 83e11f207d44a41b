//! The CPU backend: both engines on slices, forward and backward, over the threads of the current rayon pool.
//!
//! Operands are [`View`](crate::problem::View)s, outputs contiguous slices. Results are the same on every run with
//! the same number of threads and the same [`Isa`].

mod buffer;
mod finish;
pub mod linear;
mod parallel;
pub mod quadratic;
mod rows;
mod simd;
mod tile;

pub use simd::Isa;

use crate::problem::{DType, SliceMut};
use crate::{Error, Result};

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

/// Refuses an output slice of the wrong length or dtype.
fn check_output(
    function: &'static str,
    argument: &'static str,
    slice: &SliceMut<'_>,
    len: usize,
    dtypes: &[DType],
) -> Result<()> {
    if !dtypes.contains(&slice.dtype()) {
        let needs: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
        return Err(Error::DType { function, argument, got: slice.dtype().to_string(), needs: needs.join(" or ") });
    }
    if slice.len() != len {
        let (got, needs) = (format!("{} elements", slice.len()), format!("{len} elements"));
        return Err(Error::Shape { function, argument, got, needs });
    }
    Ok(())
}
