//! Row-major tiles into column panels of their transpose.

use super::super::simd::{Real, Simd};
use super::multiply::PANEL_VECTORS;

/// Writes the transpose of `rows` × `width` numbers as panels: row j of `from` becomes column j, and `into` holds for
/// every panel of w columns its `width` rows of w numbers, the last panel filled up with zeros.
///
/// # Safety
/// The processor has the instruction set of S; `from` holds `rows` rows at distance `row`, `into` the panels.
#[inline(always)]
pub unsafe fn transpose<T: Real, S: Simd<T>>(into: &mut [T], from: &[T], row: usize, rows: usize, width: usize) {
    let panel = PANEL_VECTORS * S::LANES;
    for (index, columns) in into[..rows.div_ceil(panel) * panel * width].chunks_exact_mut(panel * width).enumerate() {
        let first = index * panel;
        let count = (rows - first).min(panel);
        if count < panel {
            columns.fill(T::ZERO);
        }
        let mut p = 0;
        while p < width {
            // Eight columns of eight rows at a time keep both sides in few cache lines.
            let depth = (width - p).min(8);
            for j in 0..count {
                let source = &from[(first + j) * row + p..][..depth];
                for (d, &x) in source.iter().enumerate() {
                    columns[(p + d) * panel + j] = x;
                }
            }
            p += depth;
        }
    }
}
