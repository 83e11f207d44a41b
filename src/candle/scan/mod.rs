//! Recurrences whose numbers do not mix, as operations of the graph.

mod diagonal;
mod returns;
mod selective;

pub use diagonal::{complex_diagonal_scan, complex_diagonal_scan_with_state, diagonal_scan, diagonal_scan_with_state};
pub use returns::{discounted_returns, generalized_advantages};
pub use selective::{selective_scan, selective_scan_with_state};

use candle_core::{DType, Result, Tensor};

use super::engine::{Admission, accumulator};
use crate::Error;
use crate::problem::{ensure_dtype, ensure_shape};

/// The operands of a call.
#[derive(Clone, Copy)]
struct Operands<'a> {
    function: &'static str,
    admission: Admission<'a>,
    /// Of sums.
    dtype: DType,
}

impl<'a> Operands<'a> {
    /// For a call whose main operand is `like`.
    fn new(function: &'static str, argument: &'static str, like: &'a Tensor) -> Result<Self> {
        let admission = Admission::new(function, like);
        admission.on_cpu(argument)?;
        let dtype = like.dtype();
        if !matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
            let got = dtype.as_str().into();
            return Err(Error::DType { function, argument, got, needs: "f32, f64, f16 or bf16".into() }.into());
        }
        Ok(Self { function, admission, dtype: accumulator(dtype) })
    }

    /// An operand in the dtype of the main one, of these sizes, in the dtype of sums.
    fn like(&self, main: &Tensor, argument: &'static str, x: &Tensor, dims: &[usize], names: &str) -> Result<Tensor> {
        ensure_dtype(self.function, argument, x, crate::problem::Operand::dtype(main), "that of the other operands")?;
        self.shaped(argument, x, dims, names)?.to_dtype(self.dtype)
    }

    /// An operand in the dtype of sums, of these sizes.
    fn of_sums(&self, argument: &'static str, x: &Tensor, dims: &[usize], names: &str) -> Result<Tensor> {
        let dtype = if self.dtype == DType::F64 { crate::problem::DType::F64 } else { crate::problem::DType::F32 };
        ensure_dtype(self.function, argument, x, dtype, "the dtype of sums")?;
        self.shaped(argument, x, dims, names)
    }

    fn shaped(&self, argument: &'static str, x: &Tensor, dims: &[usize], names: &str) -> Result<Tensor> {
        let needs: Vec<Option<usize>> = dims.iter().copied().map(Some).collect();
        ensure_shape(self.function, argument, x, &needs, names)?;
        self.admission.differentiable(argument, x)?.contiguous()
    }
}
