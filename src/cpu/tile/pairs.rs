//! Products of bf16 pairs with f32 sums, on processors that have them: a pair is two neighbours along the inner
//! dimension in a u32, the first in the low half.

use super::super::simd::Isa;
use super::multiply::{self, Left, Place, Product, Right};
use super::transpose::elements;

/// Proof that the processor has bf16 dot products.
#[derive(Clone, Copy)]
pub struct Pairs(());

impl Pairs {
    /// Numbers in a vector of sums.
    pub const LANES: usize = 16;
    /// Columns of a panel.
    pub const PANEL: usize = multiply::PANEL_VECTORS * Self::LANES;

    pub fn get(isa: Isa) -> Option<Self> {
        (isa == Isa::Avx512Bf16 && isa.is_available()).then_some(Self(()))
    }

    /// out (+)= left · right; the inner size counts pairs.
    pub fn multiply(self, out: &mut [f32], row: usize, left: Left<'_, u32>, right: Right<'_, u32>, size: Product) {
        let to = Place { row, panel: Self::PANEL };
        multiply::check(out, to, &left, &right, &size, Self::PANEL, Self::LANES);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `self` proves the instruction set, and sizes are checked.
        unsafe {
            x86::multiply(out, to, left, right, size)
        }
    }

    /// Rounds a tile, whose rows are whole vectors, to pairs of neighbours in a row.
    pub fn narrow(self, from: &[f32], into: &mut [u32]) {
        assert!(from.len().is_multiple_of(Self::LANES) && into.len() * 2 >= from.len());
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `self` proves the instruction set, and the length is whole vectors.
        unsafe {
            x86::narrow(from, into)
        }
    }

    /// Rounds the first `width` columns of `rows` rows to pairs along a row, then transposes them into panels.
    pub fn transpose(self, into: &mut [u32], from: &[f32], row: usize, rows: usize, width: usize) {
        let mut pairs = vec![0; rows * row / 2];
        self.narrow(&from[..rows * row], &mut pairs);
        elements(into, &pairs, row / 2, rows, width.div_ceil(2), Self::PANEL);
    }

    /// Rounds rows to pairs of one row and the next; the row after the last counts as zeros.
    pub fn interleave(self, into: &mut [u32], from: &[f32], row: usize) {
        let mut pairs = vec![0; from.len() / 2];
        self.narrow(from, &mut pairs);
        for (into, rows) in into.chunks_exact_mut(row).zip(pairs.chunks(row)) {
            let (first, second) = rows.split_at(row / 2);
            for (column, x) in into.iter_mut().enumerate() {
                let half = |pairs: &[u32]| pairs.get(column / 2).map_or(0, |pair| pair >> (column % 2 * 16) & 0xffff);
                *x = half(first) | half(second) << 16;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::super::simd::{Avx512, Avx512Pairs};
    use super::*;

    // SAFETY: as the generic function, whose instruction set is enabled here.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn multiply(out: &mut [f32], to: Place, left: Left<'_, u32>, right: Right<'_, u32>, size: Product) {
        unsafe { multiply::multiply::<f32, Avx512, Avx512Pairs>(out, to, left, right, size) }
    }

    // SAFETY: whole vectors; the instruction set is enabled here.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn narrow(from: &[f32], into: &mut [u32]) {
        for (from, to) in from.chunks_exact(Pairs::LANES).zip(into.chunks_exact_mut(Pairs::LANES / 2)) {
            unsafe { Avx512Pairs::narrow(from.as_ptr(), to.as_mut_ptr()) }
        }
    }
}
