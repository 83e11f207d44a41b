//! Candle tensors as operands of the engines: checks of arguments, views of storages, buffers for results.

use std::ops::Range;

use candle_core::backend::BackendDevice;
use candle_core::cpu_backend::CpuDevice;
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, DeviceLocation, Error, Result, Shape, Storage, Tensor};

use crate::problem::{self, Operand, Sequences};

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

/// The arguments of a call, which must all be on one device.
#[derive(Clone, Copy)]
pub struct Admission<'a> {
    function: &'static str,
    device: &'a Device,
}

impl<'a> Admission<'a> {
    /// For a call whose queries are `q`.
    pub fn new(function: &'static str, q: &'a Tensor) -> Self {
        Self { function, device: q.device() }
    }

    /// An argument that may receive a gradient, ready to be viewed.
    pub fn differentiable(self, argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
        let location = tensor.device().location();
        let computes = match location {
            DeviceLocation::Cpu => true,
            DeviceLocation::Cuda { .. } => cfg!(feature = "cuda"),
            DeviceLocation::Metal { .. } => false,
        };
        let needs = match self.device.location() {
            wanted if computes && wanted != location => format!("the device of q, {}", name(wanted)),
            _ if !computes => format!(
                "{}, which this build computes on",
                if cfg!(feature = "cuda") { "the CPU or CUDA" } else { "the CPU" }
            ),
            _ => return viewable(tensor),
        };
        Err(crate::Error::Device { function: self.function, argument, got: name(location), needs }.into())
    }

    /// Refuses the argument whose device is that of the call where only the CPU has the operation.
    pub fn on_cpu(self, argument: &'static str) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            device => {
                let (function, got) = (self.function, name(device.location()));
                Err(crate::Error::Device { function, argument, got, needs: name(DeviceLocation::Cpu) }.into())
            }
        }
    }

    /// An argument without a gradient, ready to be viewed; tracked ones are refused.
    pub fn constant(self, argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
        if tensor.track_op() {
            return Err(crate::Error::NoGradient { function: self.function, argument }.into());
        }
        self.differentiable(argument, tensor)
    }
}

fn name(location: DeviceLocation) -> String {
    match location {
        DeviceLocation::Cpu => "the CPU".into(),
        DeviceLocation::Cuda { gpu_id } => format!("CUDA device {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("Metal device {gpu_id}"),
    }
}

/// The tensor, copied if its last dimension is not contiguous.
pub fn viewable(tensor: &Tensor) -> Result<Tensor> {
    match (tensor.dims().last(), tensor.stride().last()) {
        (Some(&width), Some(&stride)) if width > 1 && stride != 1 => tensor.contiguous(),
        _ => Ok(tensor.clone()),
    }
}

/// Whether packed sequences are computed one by one: there is a single launch for all of them on no GPU.
pub fn is_cut(sequences: Option<&Sequences>, q: &Tensor) -> bool {
    sequences.is_some_and(|sequences| sequences.count() > 0) && !q.device().is_cpu()
}

/// Some of the queries or keys: the third dimension, the last one of fewer.
pub fn rows(x: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    x.narrow((x.rank() - 1).min(2), range.start, range.len())
}

/// None, the one, or all end to end.
pub fn end_to_end(mut tensors: Vec<Tensor>) -> Result<Option<Tensor>> {
    if tensors.len() < 2 {
        return Ok(tensors.pop());
    }
    let flat: Vec<Tensor> = tensors.iter().map(Tensor::flatten_all).collect::<Result<_>>()?;
    Tensor::cat(&flat, 0).map(Some)
}

/// Names the dtype of a storage that no engine takes.
pub fn unsupported(dtype: DType) -> Error {
    Error::UnsupportedDTypeForOp(dtype, "attention").bt()
}

/// Room for the elements of a result.
pub struct Buffer {
    pub storage: Storage,
    pub len: usize,
}

/// Room for so many elements of any content, since engines and plans overwrite all of it.
pub fn buffer(device: &Device, dtype: DType, len: usize) -> Result<Buffer> {
    // Drivers allocate no empty memory.
    let shape = Shape::from(len.max(1));
    let storage = match device {
        // SAFETY of both: every bit pattern is a number, and nobody reads them before an engine or a plan has written them
        // all; after one that fails, nobody does.
        Device::Cpu => Storage::Cpu(unsafe { CpuDevice.alloc_uninit(&shape, dtype) }?),
        Device::Cuda(device) => Storage::Cuda(unsafe { device.alloc_uninit(&shape, dtype) }?),
        Device::Metal(device) => Storage::Metal(device.zeros_impl(&shape, dtype)?),
    };
    Ok(Buffer { storage, len })
}

/// A filled buffer as a tensor outside of any graph.
pub fn tensor(buffer: Buffer, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(buffer.storage, shape, BackpropOp::none(), false)
}

#[cfg(test)]
mod tests {
    use super::super::backend::Cpu;
    use super::super::reading::read;
    use super::*;
    use crate::problem::Slice;

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
            read(&[&tensor], |readings| {
                let view = readings.view(&Cpu, &tensor)?;
                assert_eq!((view.dims(), view.strides()), (Tensor::dims(&tensor), &strides[..]));
                assert!(matches!(view.data(), Slice::F32(elements) if elements[0] == first));
                Ok(())
            })?;
        }
        Ok(())
    }

    #[test]
    fn last_dimensions_out_of_order_are_copied() -> Result<()> {
        let x = Tensor::arange(0f32, 120.0, &Device::Cpu)?.reshape((2, 3, 4, 5))?;
        for tensor in [x.transpose(2, 3)?, x.narrow(3, 2, 1)?.broadcast_as((2, 3, 4, 6))?] {
            let is_viewed =
                |tensor: &Tensor| read(&[tensor], |readings| readings.view(&Cpu, tensor).map(|_| ())).is_ok();
            assert!(!is_viewed(&tensor));
            let copy = viewable(&tensor)?;
            assert!(copy.is_contiguous() && is_viewed(&copy));
        }
        Ok(())
    }
}
