//! Vectors of one instruction set: the only place, with [`tile`](super::tile), that holds `unsafe` CPU code.
//!
//! An algorithm on tiles is written once over [`Simd`]; [`tile`](super::tile) compiles it for every [`Isa`] and
//! picks at run time.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(feature = "candle")]
mod normal;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::{Avx512, Avx512Pairs};
#[cfg(feature = "candle")]
pub(super) use exp::exp;
pub(super) use exp::{exp2, exp2s, exps, sigmoid, tanh};
#[cfg(target_arch = "aarch64")]
pub(super) use neon::Neon;
#[cfg(feature = "candle")]
pub(super) use normal::normal;
pub(super) use portable::Portable;

use std::cell::Cell;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::buffer::Kept;

/// An instruction set that the CPU backend has code for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// AVX-512 with bf16 dot products, which the quadratic engine uses for bf16 operands.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// Arm Advanced SIMD.
    Neon,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// All instruction sets, fastest first.
    pub const ALL: [Self; 5] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Neon, Self::Portable];

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => is_x86_feature_detected!("avx512bf16") && Self::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            Self::Portable => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The fastest available one for this processor, or the one that the environment variable `ATTN_KERNELS_ISA` names
    /// (`avx512bf16`, `avx512`, `avx2`, `neon`, `portable`; ignored when unknown or not available). Read once.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let wanted = std::env::var("ATTN_KERNELS_ISA").ok();
            let forced = Self::ALL.into_iter().find(|isa| Some(isa.name()) == wanted.as_deref() && isa.is_available());
            let fastest = |isa: &Isa| isa.is_available() && (*isa != Self::Avx512Bf16 || has_fast_bf16_products());
            forced.or_else(|| Self::ALL.into_iter().find(fastest)).unwrap_or(Self::Portable)
        })
    }

    /// The one that calls on this thread use: [`Isa::detect`], unless inside [`Isa::force`].
    pub fn current() -> Self {
        FORCED.get().unwrap_or_else(Self::detect)
    }

    /// Runs `f` with the engines on this instruction set, for calls made on this thread; `None` where the
    /// processor has not got it.
    pub fn force<R>(self, f: impl FnOnce() -> R) -> Option<R> {
        /// Puts the previous choice back, also when `f` panics.
        struct Restore(Option<Isa>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        self.is_available().then(|| {
            let _restore = Restore(FORCED.replace(Some(self)));
            f()
        })
    }

    /// Name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Bf16 => "avx512bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Portable => "portable",
        }
    }
}

/// Whether bf16 dot products beat f32 multiply-adds: not on Intel's processors, which leave them to their matrix unit.
fn has_fast_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: every such processor has CPUID, and its leaf 0.
        #[allow(unused_unsafe)] // newer compilers take this as safe
        let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
        // "ntel", the end of "GenuineIntel"
        vendor.ecx != u32::from_le_bytes(*b"ntel")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// The arithmetic of sums: f32 or f64.
pub trait Real:
    Kept
    + PartialOrd
    + Send
    + Sync
    + std::fmt::Debug
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::iter::Sum
{
    const ZERO: Self;
    const ONE: Self;
    /// Whether a product of many factors in f64 is exact to its last digit.
    const IS_NARROW: bool;
    const NEG_INFINITY: Self;
    /// The lowest finite number.
    const LOWEST: Self;
    /// Below this eˣ is taken as 0: twice the smallest normal number.
    const EXP_MIN: Self;
    /// Slightly above the largest x whose eˣ is finite.
    const EXP_MAX: Self;
    /// ln 2 in two parts, the first with trailing zeros so that its small multiples are exact.
    const LN_2: [Self; 2];
    /// Polynomial of eʳ for |r| ≤ ln 2/2, of even degree, highest power first.
    const EXP_COEFFICIENTS: &'static [Self];
    /// Below this 2ˣ is taken as 0, and the same where [`Simd::scale_by_power_of_two`] takes every n.
    const EXP2_MIN: [Self; 2];
    /// Polynomial of 2ʳ for |r| ≤ 1/2, highest power first.
    const EXP2_COEFFICIENTS: &'static [Self];
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn exp(self) -> Self;
    fn exp2(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;
    fn larger(self, other: Self) -> Self;
}

macro_rules! real {
    ($t:ident, $min:expr, $max:expr, $ln_2:expr, $coefficients:expr, $min_2:expr, $coefficients_2:expr) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const IS_NARROW: bool = size_of::<$t>() < size_of::<f64>();
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            const LOWEST: Self = $t::MIN;
            const EXP_MIN: Self = $min;
            const EXP_MAX: Self = $max;
            const LN_2: [Self; 2] = $ln_2;
            const EXP_COEFFICIENTS: &'static [Self] = $coefficients;
            const EXP2_MIN: [Self; 2] = $min_2;
            const EXP2_COEFFICIENTS: &'static [Self] = $coefficients_2;
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            fn to_f64(self) -> f64 {
                self as f64
            }
            fn exp(self) -> Self {
                $t::exp(self)
            }
            fn exp2(self) -> Self {
                $t::exp2(self)
            }
            fn ln(self) -> Self {
                $t::ln(self)
            }
            fn sqrt(self) -> Self {
                $t::sqrt(self)
            }
            fn larger(self, other: Self) -> Self {
                $t::max(self, other)
            }
        }
    };
}

// Relative error 3e-9 (f32, minimax of degree 6) and 2e-16 (f64, Taylor of degree 12).
real!(
    f32,
    -86.6,
    89.0,
    [355.0 / 512.0, -2.121_944_4e-4],
    &[0.0013814613, 0.00836871, 0.041_668_39, 0.16666521, 0.49999994, 1.0, 1.0],
    [-125.0, -200.0],
    &[0.00015353362, 0.0013398874, 0.009618437, 0.055503324, 0.24022648, std::f32::consts::LN_2, 1.0]
);
real!(
    f64,
    -707.7,
    710.0,
    [0.6931471803691238, 1.9082149292705877e-10],
    &[
        2.08767569878681e-9,
        2.505210838544172e-8,
        2.755731922398589e-7,
        2.7557319223985893e-6,
        2.48015873015873e-5,
        1.984126984126984e-4,
        1.388888888888889e-3,
        8.333333333333333e-3,
        4.1666666666666664e-2,
        1.6666666666666666e-1,
        0.5,
        1.0,
        1.0
    ],
    [-1021.0, -1200.0],
    &[
        2.5678435993488196e-11,
        4.44553827187081e-10,
        7.054911620801121e-9,
        1.0178086009239696e-7,
        1.3215486790144305e-6,
        1.5252733804059838e-5,
        0.00015403530393381606,
        0.0013333558146428441,
        0.009618129107628477,
        0.055504108664821576,
        0.2402265069591007,
        std::f64::consts::LN_2,
        1.0
    ]
);

/// Operations on vectors of `LANES` numbers. All are `unsafe` because they may only run on a processor that has the
/// instruction set; pointers must be valid for `LANES` elements, aligned to one.
pub(super) trait Simd<T: Real>: Copy + 'static {
    type V: Copy;
    const LANES: usize;
    /// Rows of a register tile of `multiply`.
    const ROWS: usize;
    /// Whether `scale_by_power_of_two` takes every n, small ones giving 0.
    const SCALES_ANY: bool = false;

    unsafe fn splat(x: T) -> Self::V;
    unsafe fn load(from: *const T) -> Self::V;
    unsafe fn store(to: *mut T, x: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` when one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// x where a < b, else y.
    unsafe fn select_less(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// To the nearest integer.
    unsafe fn round(x: Self::V) -> Self::V;
    /// x·2ⁿ for the integers n between log₂ of [`Real::EXP_MIN`] and [`Real::EXP_MAX`]'s exponentials.
    unsafe fn scale_by_power_of_two(x: Self::V, n: Self::V) -> Self::V;
    /// The same for x from 1/2 to 2 and an n that makes it no infinite nor subnormal number.
    #[inline(always)]
    unsafe fn scale_normal(x: Self::V, n: Self::V) -> Self::V {
        // SAFETY: the caller's.
        unsafe { Self::scale_by_power_of_two(x, n) }
    }
    unsafe fn sum(x: Self::V) -> T;
    unsafe fn largest(x: Self::V) -> T;

    /// The sums of four vectors.
    #[inline(always)]
    unsafe fn sum_each(x: [Self::V; 4]) -> [T; 4] {
        let [a, b, c, d] = x;
        // SAFETY: as `sum`.
        unsafe { [Self::sum(a), Self::sum(b), Self::sum(c), Self::sum(d)] }
    }

    /// LANES numbers of 16 bits.
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { widened::<T, Self, _>(from, |x| T::from_f64(x.to_f64())) }
    }

    /// LANES numbers of 16 bits.
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { widened::<T, Self, _>(from, |x| T::from_f64(f64::from(f32::from_bits(u32::from(x.to_bits()) << 16)))) }
    }

    /// Transposes a square of LANES rows at distances `row` and `to_row`.
    #[inline(always)]
    unsafe fn transpose(from: *const T, row: usize, to: *mut T, to_row: usize) {
        for i in 0..Self::LANES {
            for j in 0..Self::LANES {
                // SAFETY: the caller vouches for both squares.
                unsafe { *to.add(j * to_row + i) = *from.add(i * row + j) };
            }
        }
    }
}

/// The longest vector has so many lanes.
pub(super) const MOST_LANES: usize = 16;

#[inline(always)]
unsafe fn widened<T: Real, S: Simd<T>, X: Copy>(from: *const X, widen: impl Fn(X) -> T) -> S::V {
    let mut lanes = [T::ZERO; MOST_LANES];
    for (i, lane) in lanes[..S::LANES].iter_mut().enumerate() {
        // SAFETY: the caller vouches for LANES elements.
        *lane = widen(unsafe { from.add(i).read() });
    }
    // SAFETY: there are MOST_LANES.
    unsafe { S::load(lanes.as_ptr()) }
}

/// An element of an operand that is read where it lies, widened in registers.
pub(super) trait Stored<T: Real>: Copy + Default {
    unsafe fn load<S: Simd<T>>(from: *const Self) -> S::V;
}

macro_rules! stored {
    ($($x:ty => $load:ident),*) => { $(
        impl<T: Real> Stored<T> for $x {
            #[inline(always)]
            unsafe fn load<S: Simd<T>>(from: *const Self) -> S::V {
                // SAFETY: as S::load.
                unsafe { S::$load(from) }
            }
        }
    )* };
}

stored!(f16 => load_f16, bf16 => load_bf16);

impl<T: Real> Stored<T> for T {
    #[inline(always)]
    unsafe fn load<S: Simd<T>>(from: *const T) -> S::V {
        // SAFETY: as S::load.
        unsafe { S::load(from) }
    }
}

/// The multiply-add of a product: operands X, sums in the vectors of S.
pub(super) trait MultiplyAdd<T: Real, S: Simd<T>> {
    /// An element of an operand.
    type X: Copy;
    /// `S::LANES` of them.
    type V: Copy;

    unsafe fn splat(x: Self::X) -> Self::V;
    unsafe fn load(from: *const Self::X) -> Self::V;
    /// a·b + c
    unsafe fn multiply_add(a: Self::V, b: Self::V, c: S::V) -> S::V;
}

/// Operands of the type of the sums.
pub(super) struct Plain;

// SAFETY: as the operations of S.
impl<T: Real, S: Simd<T>> MultiplyAdd<T, S> for Plain {
    type X = T;
    type V = S::V;

    #[inline(always)]
    unsafe fn splat(x: T) -> S::V {
        unsafe { S::splat(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const T) -> S::V {
        unsafe { S::load(from) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: S::V, b: S::V, c: S::V) -> S::V {
        unsafe { S::fma(a, b, c) }
    }
}
