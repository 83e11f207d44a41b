//! bf16 ↔ f32 on slices of equal length. Results do not depend on the instruction set.

use half::bf16;

#[inline(always)]
fn widen_all(from: &[bf16], into: &mut [f32]) {
    for (to, &x) in into.iter_mut().zip(from) {
        *to = f32::from_bits((x.to_bits() as u32) << 16);
    }
}

/// To nearest, ties to even, without branches.
#[inline(always)]
fn round_all(from: &[f32], into: &mut [bf16]) {
    for (to, &x) in into.iter_mut().zip(from) {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        *to = bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16);
    }
}

/// bf16 → f32
pub fn widen(from: &[bf16], into: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 was detected.
        return unsafe { x86::widen(from, into) };
    }
    widen_all(from, into);
}

/// f32 → bf16
pub fn round(from: &[f32], into: &mut [bf16]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 was detected.
        return unsafe { x86::round(from, into) };
    }
    round_all(from, into);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;

    #[target_feature(enable = "avx2")]
    pub fn widen(from: &[bf16], into: &mut [f32]) {
        widen_all(from, into);
    }

    #[target_feature(enable = "avx2")]
    pub fn round(from: &[f32], into: &mut [bf16]) {
        round_all(from, into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_half_does() {
        let mut numbers: Vec<f32> = (0..1 << 16).map(|i| f32::from_bits(i << 16 | (i * 40503) & 0xffff)).collect();
        numbers.extend([f32::MAX, f32::MIN, f32::NAN, f32::INFINITY, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
        let mut rounded = vec![bf16::ZERO; numbers.len()];
        round(&numbers, &mut rounded);
        let mut widened = vec![0.0; numbers.len()];
        widen(&rounded, &mut widened);
        for ((&x, &r), &w) in numbers.iter().zip(&rounded).zip(&widened) {
            assert_eq!(bf16::from_f32(x).is_nan(), r.is_nan());
            assert!(r.is_nan() || (bf16::from_f32(x).to_bits() == r.to_bits() && r.to_f32().to_bits() == w.to_bits()));
        }
    }
}
