//! Several results of one computation.
//!
//! A node of candle's graph has one result. Here it is a token, of a number for each result of the computation, which
//! are operations on it. On the way back each of them lays its gradient aside and gives the token the number that it
//! can be found by: gradients are not padded to one size and not added to zeros, and one that an interrupted pass has
//! left is nobody else's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Error, Layout, Result, Shape, Tensor};

use super::graph::Ready;
use super::tensors::{Buffer, buffer};

/// Where the results of a computation with so many meet again.
#[derive(Clone, Default)]
pub struct Results<const N: usize>(Arc<Mutex<Aside>>);

#[derive(Default)]
struct Aside {
    /// Numbers given so far.
    count: u32,
    gradients: HashMap<u32, Returned>,
}

/// A result, outside of the graph, with its gradient.
pub struct Returned {
    pub result: Tensor,
    pub gradient: Tensor,
}

impl<const N: usize> Results<N> {
    /// What becomes the token.
    pub fn token(device: &Device) -> Result<Buffer> {
        buffer(device, DType::F64, N)
    }

    /// A result of the given shape, behind the token.
    pub fn hand_out(&self, token: &Tensor, index: usize, result: Ready) -> Result<Tensor> {
        token.apply_op1(HandedOut::<N> { index, result, results: self.clone() })
    }

    /// What comes back, by the gradient of the token.
    pub fn collect(&self, numbers: &Tensor) -> Result<[Option<Returned>; N]> {
        let numbers = numbers.to_vec1::<f64>()?;
        let mut aside = self.lock();
        let mut returned = [const { None }; N];
        for (returned, number) in returned.iter_mut().zip(numbers).filter(|(_, number)| *number != 0.0) {
            let found = aside.gradients.remove(&(number as u32));
            *returned = Some(found.ok_or_else(|| Error::msg("a gradient has been taken twice"))?);
        }
        Ok(returned)
    }

    /// Lays a gradient aside and gives it a number, from 1 on.
    fn lay_aside(&self, returned: Returned) -> u32 {
        let mut aside = self.lock();
        // They are few at a time.
        aside.count = aside.count.checked_add(1).unwrap_or(1);
        let number = aside.count;
        aside.gradients.insert(number, returned);
        number
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Aside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A result, as an operation on the token.
struct HandedOut<const N: usize> {
    index: usize,
    result: Ready,
    results: Results<N>,
}

impl<const N: usize> CustomOp1 for HandedOut<N> {
    fn name(&self) -> &'static str {
        "result"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.result.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.result.on_cuda()
    }

    fn bwd(&self, token: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let mut numbers = [0f64; N];
        let returned = Returned { result: result.detach(), gradient: gradient.detach() };
        numbers[self.index] = self.results.lay_aside(returned).into();
        Tensor::new(&numbers, token.device()).map(Some)
    }
}
