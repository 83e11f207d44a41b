//! The backends behind the operations: where tensors lie decides which one computes.

use candle_core::{Layout, Result, Storage};

use super::reading::Lent;
use super::tensors::{Buffer, unsupported};
use crate::cpu::{linear, quadratic};
use crate::problem::{
    Elements, Linear, LinearGradients, LinearInputs, LinearOutputs, LinearSaved, Operand, Quadratic,
    QuadraticGradients, QuadraticInputs, QuadraticSaved, Slice, SliceMut, View,
};

/// Both engines on the storages of one kind of device.
pub trait Backend {
    /// An operand.
    type View<'a>: Operand;
    /// Room for a result.
    type Room<'a>: Elements;

    /// The elements of a storage that a layout shows.
    fn view<'a>(&self, storage: Lent<'a>, layout: &Layout) -> Result<Self::View<'a>>;

    /// Room for two results end to end, not both empty, of which the first has `first` elements and the second all others.
    fn rooms<'a>(&self, buffer: &'a mut Buffer, first: usize) -> Result<[Self::Room<'a>; 2]>;

    /// Room for a result.
    fn room<'a>(&self, buffer: &'a mut Buffer) -> Result<Self::Room<'a>> {
        let len = buffer.len;
        self.rooms(buffer, len).map(|[all, _]| all)
    }

    /// The first `count` elements of room, which is left with the others.
    fn take<'a>(&self, room: &mut Option<Self::Room<'a>>, count: usize) -> Option<Self::Room<'a>>;

    fn quadratic_forward(
        &self,
        problem: &Quadratic,
        inputs: &QuadraticInputs<Self::View<'_>>,
        out: Self::Room<'_>,
        statistic: Self::Room<'_>,
    ) -> crate::Result<()>;

    fn quadratic_backward(
        &self,
        problem: &Quadratic,
        inputs: &QuadraticInputs<Self::View<'_>>,
        saved: &QuadraticSaved<Self::View<'_>>,
        gradients: QuadraticGradients<Self::Room<'_>>,
    ) -> crate::Result<()>;

    fn linear_forward(
        &self,
        problem: &Linear,
        inputs: &LinearInputs<Self::View<'_>>,
        outputs: LinearOutputs<Self::Room<'_>>,
    ) -> crate::Result<()>;

    fn linear_backward(
        &self,
        problem: &Linear,
        inputs: &LinearInputs<Self::View<'_>>,
        saved: &LinearSaved<Self::View<'_>>,
        gradients: LinearGradients<Self::Room<'_>>,
    ) -> crate::Result<()>;
}

/// Binds the backend of a device that `Admission` lets through.
macro_rules! on_device {
    ($device:expr, $backend:ident => $body:expr) => {
        match $device {
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(device) => {
                let $backend = &$crate::candle::engine::cuda::Cuda::new(device)?;
                $body
            }
            _ => {
                let $backend = &$crate::candle::engine::backend::Cpu;
                $body
            }
        }
    };
}
pub(super) use on_device;

/// Slices in main memory.
pub struct Cpu;

/// Elements from `offset` on; an empty tensor may start anywhere.
fn tail<T>(elements: &[T], offset: usize) -> Slice<'_>
where
    for<'a> Slice<'a>: From<&'a [T]>,
{
    elements.get(offset..).unwrap_or_default().into()
}

impl Backend for Cpu {
    type View<'a> = View<'a>;
    type Room<'a> = SliceMut<'a>;

    fn view<'a>(&self, storage: Lent<'a>, layout: &Layout) -> Result<View<'a>> {
        use candle_core::CpuStorage::{BF16, F16, F32, F64, U8};
        let offset = layout.start_offset();
        let data = match storage {
            Lent::Cpu(U8(elements)) => tail(elements, offset),
            Lent::Cpu(F16(elements)) => tail(elements, offset),
            Lent::Cpu(BF16(elements)) => tail(elements, offset),
            Lent::Cpu(F32(elements)) => tail(elements, offset),
            Lent::Cpu(F64(elements)) => tail(elements, offset),
            other => return Err(unsupported(other.dtype())),
        };
        Ok(View::new(data, layout.dims(), layout.stride())?)
    }

    fn rooms<'a>(&self, buffer: &'a mut Buffer, first: usize) -> Result<[SliceMut<'a>; 2]> {
        use candle_core::CpuStorage::{BF16, F16, F32, F64};
        let mut all: SliceMut<'a> = match &mut buffer.storage {
            Storage::Cpu(F16(elements)) => elements.as_mut_slice().into(),
            Storage::Cpu(BF16(elements)) => elements.as_mut_slice().into(),
            Storage::Cpu(F32(elements)) => elements.as_mut_slice().into(),
            Storage::Cpu(F64(elements)) => elements.as_mut_slice().into(),
            other => return Err(unsupported(other.dtype())),
        };
        Ok([all.take(first), all])
    }

    fn take<'a>(&self, room: &mut Option<Self::Room<'a>>, count: usize) -> Option<Self::Room<'a>> {
        room.as_mut().map(|room| room.take(count))
    }

    fn quadratic_forward(
        &self,
        problem: &Quadratic,
        inputs: &quadratic::QuadraticInputs<'_>,
        out: SliceMut<'_>,
        statistic: SliceMut<'_>,
    ) -> crate::Result<()> {
        quadratic::forward(problem, inputs, out, Some(statistic))
    }

    fn quadratic_backward(
        &self,
        problem: &Quadratic,
        inputs: &quadratic::QuadraticInputs<'_>,
        saved: &quadratic::QuadraticSaved<'_>,
        gradients: quadratic::QuadraticGradients<'_>,
    ) -> crate::Result<()> {
        quadratic::backward(problem, inputs, saved, gradients)
    }

    fn linear_forward(
        &self,
        problem: &Linear,
        inputs: &linear::LinearInputs<'_>,
        outputs: linear::LinearOutputs<'_>,
    ) -> crate::Result<()> {
        linear::forward(problem, inputs, outputs)
    }

    fn linear_backward(
        &self,
        problem: &Linear,
        inputs: &linear::LinearInputs<'_>,
        saved: &linear::LinearSaved<'_>,
        gradients: linear::LinearGradients<'_>,
    ) -> crate::Result<()> {
        linear::backward(problem, inputs, saved, gradients)
    }
}
