use std::fmt::Debug;

use half::{bf16, f16};

use super::super::rows::Number;
use super::super::tile::{self, Bits};
use crate::problem::{DType, Operand, Slice, SliceMut, View};
use crate::{Error, Result};

/// The type of an element of q, k, v and results: f32, f64, [`struct@f16`] or [`struct@bf16`].
pub trait Element: Conversion + Copy + Default + Debug + Send + Sync + 'static {
    /// The type of sums, statistics and states: f64 for f64, else f32.
    type Sum: Element;

    /// The type as a value.
    const DTYPE: DType;
}

/// What the calls need of an element; nobody else can name or implement it.
pub trait Conversion: Bits {
    fn slice(elements: &[Self]) -> Slice<'_>;
    fn slice_mut(elements: &mut [Self]) -> SliceMut<'_>;
    /// The sum of two, rounded once.
    fn plus(self, other: Self) -> Self;

    /// Sums, f32 or f64, each rounded once.
    fn rounded(sums: Slice<'_>) -> Vec<Self> {
        let mut elements = tile::room(sums.len());
        let mut into = Self::slice_mut(&mut elements);
        match sums {
            Slice::F64(sums) => Number::store(sums, &mut into, 0),
            Slice::F32(sums) => Number::store(sums, &mut into, 0),
            _ => {}
        }
        elements
    }
}

macro_rules! element {
    ($($element:ident $name:ident $sum:ident, |$x:ident, $y:ident| $plus:expr;)*) => { $(
        impl Element for $element {
            type Sum = $sum;
            const DTYPE: DType = DType::$name;
        }

        impl Conversion for $element {
            fn slice(elements: &[Self]) -> Slice<'_> {
                Slice::$name(elements)
            }

            fn slice_mut(elements: &mut [Self]) -> SliceMut<'_> {
                SliceMut::$name(elements)
            }

            fn plus(self, other: Self) -> Self {
                let ($x, $y) = (self, other);
                $plus
            }
        }
    )* };
}

element! {
    f16 F16 f32, |x, y| f16::from_f32(x.to_f32() + y.to_f32());
    bf16 BF16 f32, |x, y| bf16::from_f32(x.to_f32() + y.to_f32());
    f32 F32 f32, |x, y| x + y;
    f64 F64 f64, |x, y| x + y;
}

/// Refuses results of another type than that of q.
pub fn ensure_element<T: Element>(function: &'static str, q: DType) -> Result<()> {
    if q == T::DTYPE {
        return Ok(());
    }
    let needs = format!("{}, the type that the results are asked for in", T::DTYPE);
    Err(Error::DType { function, argument: "q", got: q.to_string(), needs })
}

/// Row-major elements as a view of exactly these sizes.
pub fn view<'a, T: Element>(
    function: &'static str,
    argument: &'static str,
    elements: &'a [T],
    dims: &[usize],
) -> Result<View<'a>> {
    let needs = dims.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    if needs != Some(elements.len()) {
        let (got, needs) = (format!("{} elements", elements.len()), format!("those of a tensor {dims:?}"));
        return Err(Error::Shape { function, argument, got, needs });
    }
    View::contiguous(T::slice(elements), dims)
}

/// Room for as many elements as a tensor of these sizes has, which an engine overwrites.
pub fn room<T: Element>(dims: &[usize]) -> Vec<T> {
    tile::room(dims.iter().product())
}

/// Room for a gradient of an operand.
pub fn like<T: Element>(operand: &View<'_>) -> Vec<T> {
    room(operand.dims())
}
