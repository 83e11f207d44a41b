//! candle's CUDA tensors: the kernels of this crate, on candle's stream.

use candle_core::cuda_backend::CudaStorageSlice::{BF16, F16, F32, F64, U8};
use candle_core::{CudaDevice, Layout, Result, Storage};

use super::backend::Backend;
use super::reading::Lent;
use super::tensors::{Buffer, unsupported};
use crate::gpu::{Device, DeviceSlice, DeviceSliceMut, DeviceView, linear, quadratic};
use crate::problem::{Linear, Quadratic};

/// Storages on one GPU.
pub struct Cuda(Device);

impl Cuda {
    pub fn new(device: &CudaDevice) -> Result<Self> {
        Ok(Self(Device::on(device.cuda_stream())?))
    }
}

impl Backend for Cuda {
    type View<'a> = DeviceView<'a>;
    type Room<'a> = DeviceSliceMut<'a>;

    fn view<'a>(&self, storage: Lent<'a>, layout: &Layout) -> Result<DeviceView<'a>> {
        let Lent::Cuda(cuda) = storage else { return Err(unsupported(storage.dtype())) };
        // An empty tensor may start anywhere.
        macro_rules! tail {
            ($elements:expr) => {
                DeviceSlice::from($elements.slice(layout.start_offset().min($elements.len())..))
            };
        }
        let data = match &cuda.slice {
            U8(elements) => tail!(elements),
            F16(elements) => tail!(elements),
            BF16(elements) => tail!(elements),
            F32(elements) => tail!(elements),
            F64(elements) => tail!(elements),
            _ => return Err(unsupported(storage.dtype())),
        };
        Ok(DeviceView::new(data, layout.dims(), layout.stride())?)
    }

    fn rooms<'a>(&self, buffer: &'a mut Buffer, first: usize) -> Result<[DeviceSliceMut<'a>; 2]> {
        let wrong = unsupported(buffer.storage.dtype());
        let Storage::Cuda(cuda) = &mut buffer.storage else { return Err(wrong) };
        macro_rules! split {
            ($elements:expr) => {{
                let (first, others) = $elements.split_at_mut(first);
                Ok([first.into(), others.into()])
            }};
        }
        match &mut cuda.slice {
            F16(elements) => split!(elements),
            BF16(elements) => split!(elements),
            F32(elements) => split!(elements),
            F64(elements) => split!(elements),
            _ => Err(wrong),
        }
    }

    /// All of it: no operation on a GPU has a second such gradient.
    fn take<'a>(&self, room: &mut Option<Self::Room<'a>>, _count: usize) -> Option<Self::Room<'a>> {
        room.take()
    }

    fn quadratic_forward(
        &self,
        problem: &Quadratic,
        inputs: &quadratic::QuadraticInputs<'_>,
        out: DeviceSliceMut<'_>,
        statistic: DeviceSliceMut<'_>,
    ) -> crate::Result<()> {
        quadratic::forward(&self.0, problem, inputs, out, Some(statistic))
    }

    fn quadratic_backward(
        &self,
        problem: &Quadratic,
        inputs: &quadratic::QuadraticInputs<'_>,
        saved: &quadratic::QuadraticSaved<'_>,
        gradients: quadratic::QuadraticGradients<'_>,
    ) -> crate::Result<()> {
        quadratic::backward(&self.0, problem, inputs, saved, gradients)
    }

    fn linear_forward(
        &self,
        problem: &Linear,
        inputs: &linear::LinearInputs<'_>,
        outputs: linear::LinearOutputs<'_>,
    ) -> crate::Result<()> {
        linear::forward(&self.0, problem, inputs, outputs)
    }

    fn linear_backward(
        &self,
        problem: &Linear,
        inputs: &linear::LinearInputs<'_>,
        saved: &linear::LinearSaved<'_>,
        gradients: linear::LinearGradients<'_>,
    ) -> crate::Result<()> {
        linear::backward(&self.0, problem, inputs, saved, gradients)
    }
}
