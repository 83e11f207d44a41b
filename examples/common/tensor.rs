//! Tensors of any float type, owned.

use attn_kernels::problem::{DType, Slice, SliceMut, View};
use attn_kernels::reference::Array;
use clap::ValueEnum;
use half::{bf16, f16};
use rayon::prelude::*;

/// Element types of operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Float {
    F32,
    Bf16,
    F16,
    F64,
}

impl Float {
    pub const ALL: [Self; 4] = [Self::F32, Self::F64, Self::F16, Self::Bf16];

    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::F64 => DType::F64,
        }
    }

    /// The type of sums and statistics.
    pub fn accumulator(self) -> Self {
        if self == Self::F64 { Self::F64 } else { Self::F32 }
    }

    /// Largest relative error of rounding to this type, within its normal numbers.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            Self::F32 => (f32::EPSILON / 2.0).into(),
            Self::Bf16 => f64::from(bf16::EPSILON) / 2.0,
            Self::F16 => f64::from(f16::EPSILON) / 2.0,
            Self::F64 => f64::EPSILON / 2.0,
        }
    }

    /// Largest absolute error of rounding to this type, within its subnormal numbers.
    pub fn smallest_rounding(self) -> f64 {
        let smallest_normal = match self {
            Self::F32 => f32::MIN_POSITIVE.into(),
            Self::Bf16 => bf16::MIN_POSITIVE.into(),
            Self::F16 => f16::MIN_POSITIVE.into(),
            Self::F64 => f64::MIN_POSITIVE,
        };
        smallest_normal * self.unit_roundoff()
    }

    /// `x` with as many significant bits as this type has, at most those of f32, and any exponent.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 | Self::F64 => x,
            Self::Bf16 | Self::F16 => {
                // Dekker's splitting: the upper part of x, to nearest.
                let split = x * (self.unit_roundoff() as f32 / (f32::EPSILON / 2.0) + 1.0);
                split - (split - x)
            }
        }
    }
}

impl std::fmt::Display for Float {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

#[derive(Debug, Clone)]
pub enum Buffer {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F64(Vec<f64>),
}

/// Evaluates `$body` with `$x` bound to the elements, whatever their type.
macro_rules! each {
    ($buffer:expr, $x:ident => $body:expr) => {
        match $buffer {
            Buffer::F32($x) => $body,
            Buffer::Bf16($x) => $body,
            Buffer::F16($x) => $body,
            Buffer::F64($x) => $body,
        }
    };
}

fn widened(x: impl Into<f64>) -> f64 {
    x.into()
}

impl Buffer {
    pub fn zeros(float: Float, len: usize) -> Self {
        match float {
            Float::F32 => Self::F32(vec![0.0; len]),
            Float::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
            Float::F16 => Self::F16(vec![f16::ZERO; len]),
            Float::F64 => Self::F64(vec![0.0; len]),
        }
    }

    pub fn from_f64(float: Float, data: &[f64]) -> Self {
        match float {
            Float::F32 => Self::F32(data.iter().map(|&x| x as f32).collect()),
            Float::Bf16 => Self::Bf16(data.iter().map(|&x| bf16::from_f64(x)).collect()),
            Float::F16 => Self::F16(data.iter().map(|&x| f16::from_f64(x)).collect()),
            Float::F64 => Self::F64(data.to_vec()),
        }
    }

    pub fn float(&self) -> Float {
        match self {
            Self::F32(_) => Float::F32,
            Self::Bf16(_) => Float::Bf16,
            Self::F16(_) => Float::F16,
            Self::F64(_) => Float::F64,
        }
    }

    pub fn len(&self) -> usize {
        each!(self, x => x.len())
    }

    pub fn get(&self, index: usize) -> f64 {
        each!(self, x => widened(x[index]))
    }

    pub fn to_f64(&self) -> Vec<f64> {
        each!(self, x => x.iter().map(|&x| widened(x)).collect())
    }

    pub fn slice(&self) -> Slice<'_> {
        each!(self, x => x.as_slice().into())
    }

    pub fn slice_mut(&mut self) -> SliceMut<'_> {
        each!(self, x => x.as_mut_slice().into())
    }

    /// self ← self + other, element by element.
    ///
    /// # Panics
    /// If the types differ.
    pub fn add(&mut self, other: &Self) {
        match (self, other) {
            (Self::F32(x), Self::F32(y)) => x.par_iter_mut().zip(y).for_each(|(x, y)| *x += y),
            (Self::Bf16(x), Self::Bf16(y)) => x.par_iter_mut().zip(y).for_each(|(x, y)| *x += y),
            (Self::F16(x), Self::F16(y)) => x.par_iter_mut().zip(y).for_each(|(x, y)| *x += y),
            (Self::F64(x), Self::F64(y)) => x.par_iter_mut().zip(y).for_each(|(x, y)| *x += y),
            (x, y) => panic!("sum of {} and {}", x.float(), y.float()),
        }
    }
}

/// A contiguous tensor, in main memory if not said otherwise.
#[derive(Debug, Clone)]
pub struct Tensor<D = Buffer> {
    pub data: D,
    pub dims: Vec<usize>,
}

impl Tensor {
    pub fn zeros(float: Float, dims: &[usize]) -> Self {
        Self { data: Buffer::zeros(float, dims.iter().product()), dims: dims.to_vec() }
    }

    pub fn from_f64(float: Float, data: &[f64], dims: &[usize]) -> Self {
        Self { data: Buffer::from_f64(float, data), dims: dims.to_vec() }
    }

    pub fn view(&self) -> attn_kernels::Result<View<'_>> {
        View::contiguous(self.data.slice(), &self.dims)
    }

    /// Elements of the box `ranges` of a tensor of four dimensions.
    pub fn part(&self, ranges: [std::ops::Range<usize>; 3]) -> Array {
        let [batches, heads, rows] = ranges;
        let width = self.dims[3];
        let shape = [batches.len(), heads.len(), rows.len(), width];
        Array::from_fn(shape, |[b, h, i, d]| {
            let row = ((batches.start + b) * self.dims[1] + heads.start + h) * self.dims[2] + rows.start + i;
            self.data.get(row * width + d)
        })
    }

    pub fn bytes(&self) -> usize {
        self.data.len() * self.data.float().dtype().size()
    }
}
