//! Tensors in a device's memory.

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut};
use half::{bf16, f16};

use crate::problem::{DType, Elements, Strided};

/// Borrowed elements on a device.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum DeviceSlice<'a> {
    F16(CudaView<'a, f16>),
    BF16(CudaView<'a, bf16>),
    F32(CudaView<'a, f32>),
    F64(CudaView<'a, f64>),
    U8(CudaView<'a, u8>),
}

/// Contiguous output elements on a device.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum DeviceSliceMut<'a> {
    F16(CudaViewMut<'a, f16>),
    BF16(CudaViewMut<'a, bf16>),
    F32(CudaViewMut<'a, f32>),
    F64(CudaViewMut<'a, f64>),
}

/// A strided tensor of up to four dimensions in a device's memory, the last dimension contiguous.
pub type DeviceView<'a> = Strided<DeviceSlice<'a>>;

/// Does the same with the elements of any type.
macro_rules! each {
    ($slice:expr, $kind:ident { $($name:ident),* }, $x:ident => $body:expr) => {
        match $slice { $($kind::$name($x) => $body,)* }
    };
}
pub(super) use each;

impl Elements for DeviceSlice<'_> {
    fn len(&self) -> usize {
        each!(self, DeviceSlice { F16, BF16, F32, F64, U8 }, x => x.len())
    }

    fn dtype(&self) -> DType {
        match self {
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
            Self::F32(_) => DType::F32,
            Self::F64(_) => DType::F64,
            Self::U8(_) => DType::U8,
        }
    }
}

impl Elements for DeviceSliceMut<'_> {
    fn len(&self) -> usize {
        each!(self, DeviceSliceMut { F16, BF16, F32, F64 }, x => x.len())
    }

    fn dtype(&self) -> DType {
        match self {
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
            Self::F32(_) => DType::F32,
            Self::F64(_) => DType::F64,
        }
    }
}

macro_rules! read {
    ($($name:ident $element:ty),*) => { $(
        impl<'a> From<CudaView<'a, $element>> for DeviceSlice<'a> {
            fn from(elements: CudaView<'a, $element>) -> Self {
                Self::$name(elements)
            }
        }
        impl<'a> From<&'a CudaSlice<$element>> for DeviceSlice<'a> {
            fn from(elements: &'a CudaSlice<$element>) -> Self {
                Self::$name(elements.as_view())
            }
        }
    )* };
}
read!(F16 f16, BF16 bf16, F32 f32, F64 f64, U8 u8);

macro_rules! written {
    ($($name:ident $element:ty),*) => { $(
        impl<'a> From<CudaViewMut<'a, $element>> for DeviceSliceMut<'a> {
            fn from(elements: CudaViewMut<'a, $element>) -> Self {
                Self::$name(elements)
            }
        }
        impl<'a> From<&'a mut CudaSlice<$element>> for DeviceSliceMut<'a> {
            fn from(elements: &'a mut CudaSlice<$element>) -> Self {
                Self::$name(elements.as_view_mut())
            }
        }
    )* };
}
written!(F16 f16, BF16 bf16, F32 f32, F64 f64);

/// The first strides, in elements.
pub(super) fn strides<const N: usize>(view: &DeviceView<'_>) -> [i64; N] {
    std::array::from_fn(|i| view.strides().get(i).map_or(0, |&stride| stride as i64))
}
