//! Functions of one tensor that are computed outside of the graph and know their gradient.

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};

/// Puts `result`, which was computed from `x` outside of the graph, behind x; `backward` makes the gradient of x of that
/// of the result.
pub fn with_gradient(
    name: &'static str,
    x: &Tensor,
    result: Tensor,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if x.track_op() { x.apply_op1(OwnGradient { name, result, backward }) } else { Ok(result) }
}

struct OwnGradient<F> {
    name: &'static str,
    result: Tensor,
    backward: F,
}

impl<F> OwnGradient<F> {
    fn storage(&self) -> Result<Storage> {
        let (storage, layout) = self.result.storage_and_layout();
        storage.try_clone(layout)
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync> CustomOp1 for OwnGradient<F> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.storage()? {
            Storage::Cpu(storage) => Ok((storage, self.result.shape().clone())),
            _ => candle_core::bail!("{}: the result is not on the CPU", self.name),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.storage()? {
            Storage::Cuda(storage) => Ok((storage, self.result.shape().clone())),
            _ => candle_core::bail!("{}: the result is not on a CUDA device", self.name),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(gradient).map(Some)
    }
}
