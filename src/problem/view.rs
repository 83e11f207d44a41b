use half::{bf16, f16};

use crate::{Error, Result};

/// Element types of operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DType {
    F16,
    BF16,
    F32,
    F64,
    /// Masks only.
    U8,
    /// A type that no operation takes, by name.
    Other(&'static str),
}

impl DType {
    /// Whether q, k and v may have this type.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32 | Self::F64)
    }

    /// The type of sums, states and statistics for inputs of this type: f64 for f64, else f32.
    pub fn accumulator(self) -> Self {
        if self == Self::F64 { Self::F64 } else { Self::F32 }
    }

    /// Bytes of an element; 0 for [`DType::Other`].
    pub fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
            Self::Other(_) => 0,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::U8 => "u8",
            Self::Other(name) => name,
        })
    }
}

/// What the checks need to know of a tensor.
pub trait Operand {
    /// Sizes of the dimensions.
    fn dims(&self) -> &[usize];
    /// Element type.
    fn dtype(&self) -> DType;
}

/// Borrowed elements of one of the supported types.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Slice<'a> {
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    F32(&'a [f32]),
    F64(&'a [f64]),
    U8(&'a [u8]),
}

impl Slice<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F16(x) => x.len(),
            Self::BF16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::F64(x) => x.len(),
            Self::U8(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
            Self::F32(_) => DType::F32,
            Self::F64(_) => DType::F64,
            Self::U8(_) => DType::U8,
        }
    }

    /// The elements from `start` on, none beyond the end.
    pub(super) fn tail(&self, start: usize) -> Self {
        macro_rules! cut {
            ($($name:ident),*) => {
                match self { $( Self::$name(x) => Self::$name(x.get(start..).unwrap_or_default()), )* }
            };
        }
        cut!(F16, BF16, F32, F64, U8)
    }
}

macro_rules! slice_from {
    ($($name:ident $element:ty),*) => { $(
        impl<'a> From<&'a [$element]> for Slice<'a> {
            fn from(elements: &'a [$element]) -> Self {
                Self::$name(elements)
            }
        }
        impl<'a> From<&'a mut [$element]> for SliceMut<'a> {
            fn from(elements: &'a mut [$element]) -> Self {
                Self::$name(elements)
            }
        }
    )* };
}

slice_from!(F16 f16, BF16 bf16, F32 f32, F64 f64);

impl<'a> From<&'a [u8]> for Slice<'a> {
    fn from(elements: &'a [u8]) -> Self {
        Self::U8(elements)
    }
}

/// Contiguous output elements of one of the float types.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum SliceMut<'a> {
    F16(&'a mut [f16]),
    BF16(&'a mut [bf16]),
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
}

impl<'a> SliceMut<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F16(x) => x.len(),
            Self::BF16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::F64(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
            Self::F32(_) => DType::F32,
            Self::F64(_) => DType::F64,
        }
    }

    /// Cuts the first `count` elements off.
    pub(crate) fn take(&mut self, count: usize) -> SliceMut<'a> {
        macro_rules! cut {
            ($($name:ident),*) => {
                match self { $( Self::$name(x) => Self::$name(x.split_off_mut(..count).unwrap_or_default()), )* }
            };
        }
        cut!(F16, BF16, F32, F64)
    }
}

/// Elements that a [`Strided`] tensor can lie over, or that a result can be written to.
pub trait Elements {
    /// Number of elements.
    fn len(&self) -> usize;

    /// Element type.
    fn dtype(&self) -> DType;

    /// Whether there are no elements.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Elements for Slice<'_> {
    fn len(&self) -> usize {
        Slice::len(self)
    }

    fn dtype(&self) -> DType {
        Slice::dtype(self)
    }
}

impl Elements for SliceMut<'_> {
    fn len(&self) -> usize {
        SliceMut::len(self)
    }

    fn dtype(&self) -> DType {
        SliceMut::dtype(self)
    }
}

/// A strided tensor of up to four dimensions, the last one contiguous, over elements of a backend.
#[derive(Debug, Clone, Copy)]
pub struct Strided<D> {
    data: D,
    dims: [usize; 4],
    strides: [usize; 4],
    rank: usize,
}

/// A strided tensor over borrowed elements in main memory.
pub type View<'a> = Strided<Slice<'a>>;

impl<D: Elements> Strided<D> {
    /// A view of `data` with the given sizes and strides (in elements).
    ///
    /// # Errors
    /// Ranks that differ or exceed 4, a last stride other than 1, or elements outside `data`.
    pub fn new(data: impl Into<D>, dims: &[usize], strides: &[usize]) -> Result<Self> {
        let data = data.into();
        let refuse = |got: String, needs: &str| {
            Err(Error::Shape { function: "View::new", argument: "strides", got, needs: needs.to_string() })
        };
        let rank = dims.len();
        if rank != strides.len() || rank == 0 || rank > 4 {
            return refuse(format!("sizes {dims:?} and strides {strides:?}"), "equal ranks from 1 to 4");
        }
        if dims[rank - 1] > 1 && strides[rank - 1] != 1 {
            return refuse(format!("strides {strides:?}"), "a contiguous last dimension (stride 1)");
        }
        let end = dims.iter().zip(strides).try_fold(1usize, |end, (&d, &s)| {
            d.saturating_sub(1).checked_mul(s).and_then(|reach| end.checked_add(reach))
        });
        if !dims.contains(&0) && end.is_none_or(|end| end > data.len()) {
            let needs = format!("every element inside a slice of {}", data.len());
            return refuse(format!("sizes {dims:?} and strides {strides:?}"), &needs);
        }
        let mut view = Self { data, dims: [1; 4], strides: [0; 4], rank };
        view.dims[..rank].copy_from_slice(dims);
        view.strides[..rank].copy_from_slice(strides);
        Ok(view)
    }

    /// A view of all of `data`, row-major.
    ///
    /// # Errors
    /// As [`View::new`].
    pub fn contiguous(data: impl Into<D>, dims: &[usize]) -> Result<Self> {
        let mut strides = vec![1usize; dims.len()];
        for i in (0..dims.len().saturating_sub(1)).rev() {
            strides[i] = strides[i + 1].saturating_mul(dims[i + 1]);
        }
        Self::new(data, dims, &strides)
    }

    /// The elements that the view lies over.
    pub fn elements(&self) -> &D {
        &self.data
    }

    /// Distances between neighbours, in elements, one per dimension.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.rank]
    }
}

impl<'a> View<'a> {
    /// The same with `data` in place of the elements, of another size in one dimension.
    pub(super) fn with_size(mut self, data: Slice<'a>, dimension: usize, size: usize) -> Self {
        self.data = data;
        self.dims[dimension] = size;
        self
    }

    /// The elements that the view lies over, for as long as they are borrowed.
    pub fn data(&self) -> Slice<'a> {
        self.data
    }
}

impl<D: Elements> Operand for Strided<D> {
    fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    fn dtype(&self) -> DType {
        self.data.dtype()
    }
}
