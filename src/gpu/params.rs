//! Parameter structs of kernels, laid out as the device's C++ compiler lays out their twins.
//!
//! ```
//! use attn_kernels::gpu::params::{Field, Pointer};
//! use attn_kernels::gpu::plan::{Argument, Launch};
//!
//! attn_kernels::kernel_params! {
//!     /// `struct ScaleParams` of the kernel's file, field by field.
//!     pub struct ScaleParams {
//!         pub q: Pointer,
//!         pub out: Pointer,
//!         pub count: i64,
//!         pub scale: f32,
//!     }
//! }
//!
//! let params = ScaleParams { q: Argument::Q.into(), out: Argument::Out.into(), count: 1000, scale: 0.5 };
//! let launch = Launch::new("scale", [4, 1, 1], 256, 0, &params);
//! assert_eq!((launch.params.len(), ScaleParams::TYPE.size()), (32, 32));
//! assert_eq!(launch.pointers, [(0, Argument::Q), (8, Argument::Out)]);
//! ```

use std::fmt;

use super::plan::{Argument, TensorMap};

/// A type that a parameter can have, the same on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// `int32_t`
    I32,
    /// `uint32_t`
    U32,
    /// `int64_t`
    I64,
    /// `uint64_t`
    U64,
    /// `float`
    F32,
    /// `double`
    F64,
    /// An address on the device.
    Pointer,
    /// A description of a tensor for the copy engine: 128 bytes at a multiple of 128.
    TensorMap,
    /// `type name[count]`
    Array(&'static Type, usize),
    /// A struct: its name, and its fields in order.
    Struct(&'static str, &'static [(&'static str, Type)]),
}

impl Type {
    /// Alignment in bytes.
    pub const fn align(&self) -> usize {
        match self {
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 | Self::Pointer => 8,
            Self::TensorMap => 128,
            Self::Array(element, _) => element.align(),
            Self::Struct(_, fields) => {
                let (mut align, mut i) = (1, 0);
                while i < fields.len() {
                    let field = fields[i].1.align();
                    align = if field > align { field } else { align };
                    i += 1;
                }
                align
            }
        }
    }

    /// Size in bytes, padding at the end included.
    pub const fn size(&self) -> usize {
        match self {
            Self::TensorMap => 128,
            Self::Array(element, count) => element.size() * *count,
            Self::Struct(_, fields) => {
                let (mut size, mut i) = (0usize, 0);
                while i < fields.len() {
                    size = size.next_multiple_of(fields[i].1.align()) + fields[i].1.size();
                    i += 1;
                }
                size.next_multiple_of(self.align())
            }
            scalar => scalar.align(),
        }
    }

    /// Name, or nothing for what is no struct.
    pub const fn name(&self) -> &'static str {
        if let Self::Struct(name, _) = self { name } else { "" }
    }

    /// Writes a value of this type, at `offset` of `image`, as text.
    pub(super) fn show(&self, image: &Image, offset: usize, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::I32 => write!(to, "{}", i32::from_le_bytes(image.get(offset))),
            Self::U32 => write!(to, "{}", u32::from_le_bytes(image.get(offset))),
            Self::I64 => write!(to, "{}", i64::from_le_bytes(image.get(offset))),
            Self::U64 => write!(to, "{}", u64::from_le_bytes(image.get(offset))),
            Self::F32 => write!(to, "{}", f32::from_le_bytes(image.get(offset))),
            Self::F64 => write!(to, "{}", f64::from_le_bytes(image.get(offset))),
            Self::Pointer => match image.pointers.iter().find(|(at, _)| *at == offset) {
                Some((_, argument)) => write!(to, "&{argument:?}"),
                None => write!(to, "null"),
            },
            Self::TensorMap => match image.tensor_maps.iter().find(|(at, _)| *at == offset) {
                Some((_, map)) => write!(to, "{map}"),
                None => write!(to, "none"),
            },
            Self::Array(element, count) => {
                for i in 0..*count {
                    write!(to, "{}", if i == 0 { "[" } else { ", " })?;
                    element.show(image, offset + i * element.size(), to)?;
                }
                write!(to, "]")
            }
            Self::Struct(_, fields) => {
                let mut at = offset;
                for (i, (name, field)) in fields.iter().enumerate() {
                    at = at.next_multiple_of(field.align());
                    write!(to, "{}{name}: ", if i == 0 { "{ " } else { ", " })?;
                    field.show(image, at, to)?;
                    at += field.size();
                }
                write!(to, " }}")
            }
        }
    }
}

/// The bytes of a parameter struct with null pointers, and which of them are addresses of what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// Little-endian, padding zero.
    pub bytes: Vec<u8>,
    /// Offsets of the addresses that are not null.
    pub pointers: Vec<(usize, Argument)>,
    /// Offsets of the tensor maps.
    pub tensor_maps: Vec<(usize, TensorMap)>,
}

impl Image {
    /// Of a whole parameter struct.
    pub fn of<P: Field>(params: &P) -> Self {
        let mut image = Self { bytes: Vec::with_capacity(const { P::TYPE.size() }), ..Self::default() };
        image.push(params);
        image
    }

    /// Adds a field at the next offset that suits it.
    pub fn push<F: Field>(&mut self, field: &F) {
        let align = const { F::TYPE.align() };
        self.pad(align);
        field.write(self);
        self.pad(align);
    }

    fn pad(&mut self, align: usize) {
        let whole = self.bytes.len().next_multiple_of(align);
        if whole > self.bytes.len() {
            self.bytes.resize(whole, 0);
        }
    }

    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|i| self.bytes[offset + i])
    }
}

/// A value in the parameters of a kernel.
pub trait Field {
    /// Its type on the device.
    const TYPE: Type;

    /// Adds its bytes, without padding.
    fn write(&self, to: &mut Image);
}

macro_rules! scalars {
    ($($t:ty: $type:ident),*) => { $(
        impl Field for $t {
            const TYPE: Type = Type::$type;

            fn write(&self, to: &mut Image) {
                to.bytes.extend_from_slice(&self.to_le_bytes());
            }
        }
    )* };
}
scalars!(i32: I32, u32: U32, i64: I64, u64: U64, f32: F32, f64: F64);

impl<T: Field, const N: usize> Field for [T; N] {
    const TYPE: Type = Type::Array(&T::TYPE, N);

    fn write(&self, to: &mut Image) {
        self.iter().for_each(|element| to.push(element));
    }
}

/// A field that becomes the address of an argument at launch, or stays null.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pointer(pub Option<Argument>);

impl From<Argument> for Pointer {
    fn from(argument: Argument) -> Self {
        Self(Some(argument))
    }
}

impl From<Option<Argument>> for Pointer {
    fn from(argument: Option<Argument>) -> Self {
        Self(argument)
    }
}

impl Field for Pointer {
    const TYPE: Type = Type::Pointer;

    fn write(&self, to: &mut Image) {
        to.pointers.extend(self.0.map(|argument| (to.bytes.len(), argument)));
        to.bytes.extend_from_slice(&[0; 8]);
    }
}

impl Field for TensorMap {
    const TYPE: Type = Type::TensorMap;

    fn write(&self, to: &mut Image) {
        Some(*self).write(to);
    }
}

/// Without a map the bytes stay 0.
impl Field for Option<TensorMap> {
    const TYPE: Type = Type::TensorMap;

    fn write(&self, to: &mut Image) {
        to.tensor_maps.extend(self.map(|map| (to.bytes.len(), map)));
        to.bytes.extend_from_slice(&[0; 128]);
    }
}

/// Declares a struct and makes it a [`Field`](crate::gpu::params::Field), so that it can be, or be in, the parameters
/// of a kernel.
#[doc(hidden)]
#[macro_export]
macro_rules! kernel_params {
    ($(#[$about:meta])* $visible:vis struct $name:ident {
        $($(#[$field_about:meta])* $field_visible:vis $field:ident: $type:ty,)*
    }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq)]
        $visible struct $name {
            $($(#[$field_about])* $field_visible $field: $type,)*
        }

        impl $crate::gpu::params::Field for $name {
            const TYPE: $crate::gpu::params::Type = $crate::gpu::params::Type::Struct(
                stringify!($name),
                &[$((stringify!($field), <$type as $crate::gpu::params::Field>::TYPE),)*],
            );

            fn write(&self, to: &mut $crate::gpu::params::Image) {
                $(to.push(&self.$field);)*
            }
        }
    };
}

kernel_params! {
    /// Distances in elements; the last dimension is contiguous.
    pub(super) struct Strides {
        pub(super) batch: i64,
        pub(super) head: i64,
        pub(super) row: i64,
    }
}

impl From<[i64; 3]> for Strides {
    fn from([batch, head, row]: [i64; 3]) -> Self {
        Self { batch, head, row }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    kernel_params! {
        struct Inner {
            small: i32,
            wide: f64,
            last: u32,
        }
    }

    kernel_params! {
        struct Outer {
            first: u32,
            q: Pointer,
            absent: Pointer,
            strides: [i64; 3],
            half: f32,
            inner: [Inner; 2],
            end: i32,
        }
    }

    /// The same for the compiler.
    #[repr(C)]
    #[allow(dead_code)]
    struct InnerC {
        small: i32,
        wide: f64,
        last: u32,
    }

    #[repr(C)]
    #[allow(dead_code)]
    struct OuterC {
        first: u32,
        q: u64,
        absent: u64,
        strides: [i64; 3],
        half: f32,
        inner: [InnerC; 2],
        end: i32,
    }

    #[test]
    fn layout_is_that_of_c() {
        assert_eq!((Outer::TYPE.size(), Outer::TYPE.align()), (size_of::<OuterC>(), align_of::<OuterC>()));
        let inner = |small| Inner { small, wide: 0.5, last: 7 };
        let outer = Outer {
            first: 1,
            q: Argument::Q.into(),
            absent: None.into(),
            strides: [2, 3, -4],
            half: 1.5,
            inner: [inner(5), inner(6)],
            end: -8,
        };
        let image = Image::of(&outer);
        assert_eq!(image.bytes.len(), size_of::<OuterC>());
        assert_eq!(image.pointers, [(std::mem::offset_of!(OuterC, q), Argument::Q)]);
        let stride = i64::from_le_bytes(image.get(std::mem::offset_of!(OuterC, strides) + 16));
        let last = std::mem::offset_of!(OuterC, inner) + size_of::<InnerC>() + std::mem::offset_of!(InnerC, last);
        let end = i32::from_le_bytes(image.get(std::mem::offset_of!(OuterC, end)));
        assert_eq!((stride, u32::from_le_bytes(image.get(last)), end), (-4, 7, -8));
    }
}
