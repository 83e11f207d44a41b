//! Typed, strided storage around f64 arrays.

use attn_kernels::problem::{DType, Slice, SliceMut, View};
use attn_kernels::reference::Array;
use half::{bf16, f16};

/// How an operand lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Contiguous,
    /// Four-dimensional operands as [B, N, H, D].
    Tokens,
    /// NaN before the first element and between rows, heads and batch entries.
    Gaps,
}

impl Layout {
    pub const ALL: [Self; 3] = [Self::Contiguous, Self::Tokens, Self::Gaps];

    /// Strides for `dims`, and the elements that they span.
    fn strides(self, dims: &[usize]) -> (Vec<usize>, usize) {
        let gap = if self == Self::Gaps { 3 } else { 0 };
        let mut order: Vec<usize> = (0..dims.len()).collect();
        if self == Self::Tokens && dims.len() == 4 {
            order.swap(1, 2);
        }
        let mut strides = vec![1; dims.len()];
        let mut span = 1;
        for &axis in order.iter().rev() {
            strides[axis] = span;
            span = span * dims[axis].max(1) + gap;
        }
        (strides, span)
    }
}

/// `x` rounded to `dtype`. (By way of f32: `from_f64` looks at the upper half of the bits only.)
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(x as f32).to_f64(),
        DType::BF16 => bf16::from_f32(x as f32).to_f64(),
        DType::F32 => x as f32 as f64,
        _ => x,
    }
}

/// Half the distance from 1 to the next number: the relative error of one rounding.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        DType::F32 => 2f64.powi(-24),
        _ => 2f64.powi(-53),
    }
}

/// Half the smallest positive number, the error of rounding next to 0, where that matters.
pub fn smallest(dtype: DType) -> f64 {
    if dtype == DType::F16 { 2f64.powi(-25) } else { 0.0 }
}

/// Owned elements of one type.
#[derive(Debug, Clone)]
pub enum Buffer {
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    U8(Vec<u8>),
}

/// Does the same with the vector of any type.
macro_rules! each {
    ($buffer:expr, $x:ident => $body:expr) => {
        match $buffer {
            Buffer::F16($x) => $body,
            Buffer::BF16($x) => $body,
            Buffer::F32($x) => $body,
            Buffer::F64($x) => $body,
            Buffer::U8($x) => $body,
        }
    };
}

impl Buffer {
    pub fn filled(dtype: DType, len: usize, value: f64) -> Self {
        match dtype {
            DType::F16 => Self::F16(vec![f16::from_f64(value); len]),
            DType::BF16 => Self::BF16(vec![bf16::from_f64(value); len]),
            DType::F32 => Self::F32(vec![value as f32; len]),
            DType::F64 => Self::F64(vec![value; len]),
            DType::U8 => Self::U8(vec![value as u8; len]),
            DType::Other(name) => panic!("no buffers of {name}"),
        }
    }

    /// An output before it is written.
    pub fn poisoned(dtype: DType, len: usize) -> Self {
        Self::filled(dtype, len, f64::NAN)
    }

    pub fn len(&self) -> usize {
        each!(self, x => x.len())
    }

    pub fn set(&mut self, index: usize, value: f64) {
        match self {
            Self::F16(x) => x[index] = f16::from_f32(value as f32),
            Self::BF16(x) => x[index] = bf16::from_f32(value as f32),
            Self::F32(x) => x[index] = value as f32,
            Self::F64(x) => x[index] = value,
            Self::U8(x) => x[index] = value as u8,
        }
    }

    pub fn get(&self, index: usize) -> f64 {
        match self {
            Self::F16(x) => x[index].to_f64(),
            Self::BF16(x) => x[index].to_f64(),
            Self::F32(x) => x[index].into(),
            Self::F64(x) => x[index],
            Self::U8(x) => x[index].into(),
        }
    }

    pub fn slice_from(&self, start: usize) -> Slice<'_> {
        each!(self, x => (&x[start..]).into())
    }

    pub fn slice_mut(&mut self) -> SliceMut<'_> {
        match self {
            Self::F16(x) => x[..].as_mut().into(),
            Self::BF16(x) => x[..].as_mut().into(),
            Self::F32(x) => x[..].as_mut().into(),
            Self::F64(x) => x[..].as_mut().into(),
            Self::U8(_) => panic!("no outputs of u8"),
        }
    }

    /// Little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        each!(self, x => x.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// An output that a kernel has written.
    pub fn from_bytes(dtype: DType, bytes: &[u8]) -> Self {
        /// Elements of one size.
        fn elements<const N: usize, T>(bytes: &[u8], make: fn([u8; N]) -> T) -> Vec<T> {
            bytes.chunks_exact(N).map(|bytes| make(bytes.try_into().expect("a whole element"))).collect()
        }
        match dtype {
            DType::F16 => Self::F16(elements(bytes, f16::from_le_bytes)),
            DType::BF16 => Self::BF16(elements(bytes, bf16::from_le_bytes)),
            DType::F32 => Self::F32(elements(bytes, f32::from_le_bytes)),
            DType::F64 => Self::F64(elements(bytes, f64::from_le_bytes)),
            dtype => panic!("no outputs of {dtype}"),
        }
    }

    pub fn array(&self, shape: [usize; 4]) -> Array {
        assert_eq!(self.len(), shape.iter().product::<usize>());
        Array { data: (0..self.len()).map(|i| self.get(i)).collect(), shape }
    }
}

/// An operand of `rank` dimensions, the last ones of an array.
#[derive(Debug, Clone)]
pub struct Operand {
    pub buffer: Buffer,
    pub start: usize,
    pub dims: Vec<usize>,
    pub strides: Vec<usize>,
}

impl Operand {
    pub fn new(array: &Array, rank: usize, dtype: DType, layout: Layout) -> Self {
        let dims = array.shape[4 - rank..].to_vec();
        let (strides, span) = layout.strides(&dims);
        let start = if layout == Layout::Gaps { 5 } else { 0 };
        let around = if dtype == DType::U8 { 7.0 } else { f64::NAN };
        let mut buffer = Buffer::filled(dtype, start + span, around);
        for (index, &x) in array.data.iter().enumerate() {
            let (mut rest, mut at) = (index, start);
            for (&size, &stride) in dims.iter().zip(&strides).rev() {
                at += rest % size * stride;
                rest /= size;
            }
            buffer.set(at, x);
        }
        Self { buffer, start, dims, strides }
    }

    /// The first strides.
    pub fn outer_strides<const N: usize>(&self) -> [i64; N] {
        std::array::from_fn(|axis| self.strides[axis] as i64)
    }

    pub fn view(&self) -> View<'_> {
        View::new(self.buffer.slice_from(self.start), &self.dims, &self.strides).unwrap()
    }
}
