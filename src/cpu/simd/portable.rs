use super::{Real, Simd};

/// Arrays that the compiler may turn into whatever vectors the target has by default.
#[derive(Clone, Copy)]
pub struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn zip<T: Copy>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

macro_rules! simd {
    ($t:ty, $bits:ty, $mantissa:literal, $bias:literal) => {
        // Safe apart from the pointers, which the caller vouches for.
        impl Simd<$t> for Portable {
            type V = [$t; LANES];
            const LANES: usize = LANES;
            const ROWS: usize = 4;

            #[inline(always)]
            unsafe fn splat(x: $t) -> Self::V {
                [x; LANES]
            }
            #[inline(always)]
            unsafe fn load(from: *const $t) -> Self::V {
                // SAFETY: valid for LANES elements.
                unsafe { from.cast::<Self::V>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn store(to: *mut $t, x: Self::V) {
                // SAFETY: valid for LANES elements.
                unsafe { to.cast::<Self::V>().write_unaligned(x) }
            }
            #[inline(always)]
            unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
                zip(a, b, |a, b| a + b)
            }
            #[inline(always)]
            unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
                zip(a, b, |a, b| a - b)
            }
            #[inline(always)]
            unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
                zip(a, b, |a, b| a * b)
            }
            #[inline(always)]
            unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
                zip(a, b, |a, b| a / b)
            }
            #[inline(always)]
            unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                // Without the instruction, `mul_add` would be a library call.
                std::array::from_fn(|i| a[i] * b[i] + c[i])
            }
            #[inline(always)]
            unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
                zip(a, b, |a, b| if a > b { a } else { b })
            }
            #[inline(always)]
            unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
                zip(a, b, |a, b| if a < b { a } else { b })
            }
            #[inline(always)]
            unsafe fn select_less(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
                std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
            }
            #[inline(always)]
            unsafe fn round(x: Self::V) -> Self::V {
                // Adding 1.5·2^mantissa leaves no room for a fraction.
                let shift = (1.5 * (1u64 << $mantissa) as f64) as $t;
                x.map(|x| (x + shift) - shift)
            }
            #[inline(always)]
            unsafe fn scale_by_power_of_two(x: Self::V, n: Self::V) -> Self::V {
                // 2ⁿ⁻¹ is normal where 2ⁿ may not be.
                let double_half = |x: $t, n: $t| {
                    let half = <$t>::from_bits(((n as i32 - 1 + $bias) as $bits) << $mantissa);
                    x * half * 2.0
                };
                zip(x, n, double_half)
            }
            #[inline(always)]
            unsafe fn sum(x: Self::V) -> $t {
                x.into_iter().sum()
            }
            #[inline(always)]
            unsafe fn largest(x: Self::V) -> $t {
                x.into_iter().fold(<$t>::NEG_INFINITY, <$t as Real>::larger)
            }
        }
    };
}

simd!(f32, u32, 23, 127);
simd!(f64, u64, 52, 1023);
