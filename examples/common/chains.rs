//! Multiply-adds in registers: independent chains, enough of them to hide the latency of each.

use std::hint::black_box;

pub struct Chains {
    pub operations: &'static str,
    /// Operations of a step.
    pub flops: f64,
    /// Runs so many steps.
    pub run: fn(usize),
}

/// A function of `$chains` chains for an instruction set.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! chains {
    ($name:ident, $feature:meta, $chains:literal, $splat:expr, $operand:expr, |$sum:ident, $x:ident, $y:ident| $step:expr) => {
        #[$feature]
        fn $name(steps: usize) {
            let mut sums = black_box([$splat; $chains]);
            let ($x, $y) = (black_box($operand), black_box($operand));
            for _ in 0..steps {
                for chain in &mut sums {
                    let $sum = *chain;
                    *chain = $step;
                }
            }
            black_box(sums);
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::Chains;

    chains!(f32_512, target_feature(enable = "avx512f"), 16, _mm512_set1_ps(1.0), _mm512_set1_ps(0.5), |sum, x, y| {
        _mm512_fmadd_ps(x, y, sum)
    });
    chains!(f64_512, target_feature(enable = "avx512f"), 16, _mm512_set1_pd(1.0), _mm512_set1_pd(0.5), |sum, x, y| {
        _mm512_fmadd_pd(x, y, sum)
    });
    chains!(f32_256, target_feature(enable = "avx2,fma"), 12, _mm256_set1_ps(1.0), _mm256_set1_ps(0.5), |sum, x, y| {
        _mm256_fmadd_ps(x, y, sum)
    });
    chains!(f64_256, target_feature(enable = "avx2,fma"), 12, _mm256_set1_pd(1.0), _mm256_set1_pd(0.5), |sum, x, y| {
        _mm256_fmadd_pd(x, y, sum)
    });
    chains!(
        bf16_512,
        target_feature(enable = "avx512f,avx512bf16"),
        16,
        _mm512_set1_ps(1.0),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.5)),
        |sum, x, y| _mm512_dpbf16_ps(sum, x, y)
    );

    fn has_fma() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }

    // SAFETY of the calls below: the processor has what each function enables.
    pub fn f32() -> Option<Chains> {
        let operations = "f32 multiply-adds";
        if is_x86_feature_detected!("avx512f") {
            return Some(Chains { operations, flops: 16.0 * 32.0, run: |steps| unsafe { f32_512(steps) } });
        }
        has_fma().then_some(Chains { operations, flops: 12.0 * 16.0, run: |steps| unsafe { f32_256(steps) } })
    }

    pub fn f64() -> Option<Chains> {
        let operations = "f64 multiply-adds";
        if is_x86_feature_detected!("avx512f") {
            return Some(Chains { operations, flops: 16.0 * 16.0, run: |steps| unsafe { f64_512(steps) } });
        }
        has_fma().then_some(Chains { operations, flops: 12.0 * 8.0, run: |steps| unsafe { f64_256(steps) } })
    }

    pub fn bf16() -> Option<Chains> {
        let has_products = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        let run = |steps| unsafe { bf16_512(steps) };
        has_products.then_some(Chains { operations: "bf16 dot products", flops: 16.0 * 64.0, run })
    }
}

#[cfg(target_arch = "aarch64")]
mod vectors {
    use std::arch::aarch64::*;
    use std::hint::black_box;

    use super::Chains;

    chains!(f32_128, target_feature(enable = "neon"), 16, vdupq_n_f32(1.0), vdupq_n_f32(0.5), |sum, x, y| vfmaq_f32(
        sum, x, y
    ));
    chains!(f64_128, target_feature(enable = "neon"), 16, vdupq_n_f64(1.0), vdupq_n_f64(0.5), |sum, x, y| vfmaq_f64(
        sum, x, y
    ));

    // SAFETY of the calls below: Advanced SIMD is part of the target.
    pub fn f32() -> Option<Chains> {
        #[allow(unused_unsafe)] // newer compilers take this as safe
        let run = |steps| unsafe { f32_128(steps) };
        Some(Chains { operations: "f32 multiply-adds", flops: 16.0 * 8.0, run })
    }

    pub fn f64() -> Option<Chains> {
        #[allow(unused_unsafe)] // newer compilers take this as safe
        let run = |steps| unsafe { f64_128(steps) };
        Some(Chains { operations: "f64 multiply-adds", flops: 16.0 * 4.0, run })
    }

    pub fn bf16() -> Option<Chains> {
        None
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod vectors {
    use super::Chains;

    pub fn f32() -> Option<Chains> {
        None
    }

    pub fn f64() -> Option<Chains> {
        None
    }

    pub fn bf16() -> Option<Chains> {
        None
    }
}

/// Numbers in a chain of the portable functions, for the compiler to put into vectors.
const LANES: usize = 4;
const PORTABLE: usize = 12;

macro_rules! portable {
    ($name:ident, $t:ty) => {
        fn $name(steps: usize) {
            let mut sums = black_box([[1.0 as $t; LANES]; PORTABLE]);
            let (x, y) = (black_box([0.5 as $t; LANES]), black_box([0.5 as $t; LANES]));
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = std::array::from_fn(|i| sum[i] * x[i] + y[i]);
                }
            }
            black_box(sums);
        }
    };
}

portable!(f32_portable, f32);
portable!(f64_portable, f64);

pub fn f32() -> Chains {
    let flops = (2 * LANES * PORTABLE) as f64;
    vectors::f32().unwrap_or(Chains { operations: "f32 products and sums", flops, run: f32_portable })
}

pub fn f64() -> Chains {
    let flops = (2 * LANES * PORTABLE) as f64;
    vectors::f64().unwrap_or(Chains { operations: "f64 products and sums", flops, run: f64_portable })
}

/// Dot products of pairs of bf16, if the processor has them.
pub fn bf16() -> Option<Chains> {
    vectors::bf16()
}
