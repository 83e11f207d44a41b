//! Candle tensors as operands of the engines: checks of arguments, views of storages, buffers for results.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cpu_backend::CpuDevice;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, DeviceLocation, Error, Layout, Result, Shape, Storage, StorageRef, Tensor};

use crate::problem::{self, Operand, Slice, SliceMut, View};

impl From<crate::Error> for Error {
    fn from(error: crate::Error) -> Self {
        Self::wrap(error)
    }
}

impl Operand for Tensor {
    fn dims(&self) -> &[usize] {
        Tensor::dims(self)
    }

    fn dtype(&self) -> problem::DType {
        match Tensor::dtype(self) {
            DType::F16 => problem::DType::F16,
            DType::BF16 => problem::DType::BF16,
            DType::F32 => problem::DType::F32,
            DType::F64 => problem::DType::F64,
            DType::U8 => problem::DType::U8,
            other => problem::DType::Other(other.as_str()),
        }
    }
}

/// The dtype of sums and statistics for inputs of `dtype`.
pub fn accumulator(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// An argument that may receive a gradient, ready to be viewed.
pub fn differentiable(function: &'static str, argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
    let got = match tensor.device().location() {
        DeviceLocation::Cpu => return viewable(tensor),
        DeviceLocation::Cuda { gpu_id } => format!("CUDA device {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("Metal device {gpu_id}"),
    };
    let needs = "the CPU, the only device that this build computes on".to_string();
    Err(crate::Error::Device { function, argument, got, needs }.into())
}

/// An argument without a gradient, ready to be viewed; tracked ones are refused.
pub fn constant(function: &'static str, argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
    if tensor.track_op() {
        return Err(crate::Error::NoGradient { function, argument }.into());
    }
    differentiable(function, argument, tensor)
}

/// The tensor, copied if its last dimension is not contiguous.
pub fn viewable(tensor: &Tensor) -> Result<Tensor> {
    match (tensor.dims().last(), tensor.stride().last()) {
        (Some(&width), Some(&stride)) if width > 1 && stride != 1 => tensor.contiguous(),
        _ => Ok(tensor.clone()),
    }
}

/// A tensor locked for reading.
pub struct Reading<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Reading<'a> {
    pub fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub fn view(&self) -> Result<View<'_>> {
        let offset = self.layout.start_offset();
        let data = match &*self.storage {
            Storage::Cpu(CpuStorage::U8(elements)) => tail(elements, offset),
            Storage::Cpu(CpuStorage::F16(elements)) => tail(elements, offset),
            Storage::Cpu(CpuStorage::BF16(elements)) => tail(elements, offset),
            Storage::Cpu(CpuStorage::F32(elements)) => tail(elements, offset),
            Storage::Cpu(CpuStorage::F64(elements)) => tail(elements, offset),
            other => return Err(unsupported(other.dtype())),
        };
        Ok(View::new(data, self.layout.dims(), self.layout.stride())?)
    }
}

/// The view of an operand that may be absent.
pub fn view<'r>(reading: &'r Option<Reading<'_>>) -> Result<Option<View<'r>>> {
    reading.as_ref().map(Reading::view).transpose()
}

/// Elements from `offset` on; an empty tensor may start anywhere.
fn tail<T>(elements: &[T], offset: usize) -> Slice<'_>
where
    for<'a> Slice<'a>: From<&'a [T]>,
{
    elements.get(offset..).unwrap_or_default().into()
}

fn unsupported(dtype: DType) -> Error {
    Error::UnsupportedDTypeForOp(dtype, "attention").bt()
}

/// Room for the elements of a result.
pub fn buffer(dtype: DType, len: usize) -> Result<CpuStorage> {
    CpuDevice.zeros_impl(&Shape::from(len), dtype)
}

/// The elements of a buffer.
pub fn slice_mut(buffer: &mut CpuStorage) -> Result<SliceMut<'_>> {
    match buffer {
        CpuStorage::F16(elements) => Ok(elements.as_mut_slice().into()),
        CpuStorage::BF16(elements) => Ok(elements.as_mut_slice().into()),
        CpuStorage::F32(elements) => Ok(elements.as_mut_slice().into()),
        CpuStorage::F64(elements) => Ok(elements.as_mut_slice().into()),
        other => Err(unsupported(other.dtype())),
    }
}

/// A filled buffer as a tensor outside of any graph.
pub fn tensor(buffer: CpuStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cpu(buffer), shape, BackpropOp::none(), false)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn views_lie_over_the_tensor_itself() -> Result<()> {
        let x = Tensor::arange(0f32, 120.0, &Device::Cpu)?.reshape((2, 3, 4, 5))?;
        let in_place = [
            (x.transpose(1, 2)?, [60, 5, 20, 1], 0.0),
            (x.narrow(2, 1, 2)?.narrow(3, 2, 3)?, [60, 20, 5, 1], 7.0),
            (x.narrow(0, 1, 1)?.broadcast_as((7, 3, 4, 5))?, [0, 20, 5, 1], 60.0),
            (x.narrow(3, 4, 1)?, [60, 20, 5, 1], 4.0),
        ];
        for (tensor, strides, first) in in_place {
            let tensor = viewable(&tensor)?;
            let reading = Reading::new(&tensor);
            let view = reading.view()?;
            assert_eq!((view.dims(), view.strides()), (Tensor::dims(&tensor), &strides[..]));
            assert!(matches!(view.data(), Slice::F32(elements) if elements[0] == first));
        }
        Ok(())
    }

    #[test]
    fn last_dimensions_out_of_order_are_copied() -> Result<()> {
        let x = Tensor::arange(0f32, 120.0, &Device::Cpu)?.reshape((2, 3, 4, 5))?;
        for tensor in [x.transpose(2, 3)?, x.narrow(3, 2, 1)?.broadcast_as((2, 3, 4, 6))?] {
            assert!(Reading::new(&tensor).view().is_err());
            assert!(viewable(&tensor)?.is_contiguous());
            Reading::new(&viewable(&tensor)?).view()?;
        }
        Ok(())
    }
}
