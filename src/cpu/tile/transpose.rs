//! Row-major tiles into column panels of their transpose.

use super::super::simd::{Real, Simd};
use super::multiply::PANEL_VECTORS;

/// Writes the transpose of `rows` × `width` numbers as panels: row j of `from` becomes column j, and `into` holds for
/// each panel of columns its `width` rows, the last panel filled up with zeros.
///
/// # Safety
/// The processor has the instruction set of S.
#[inline(always)]
pub unsafe fn vectors<T: Real, S: Simd<T>>(into: &mut [T], from: &[T], row: usize, rows: usize, width: usize) {
    let panel = PANEL_VECTORS * S::LANES;
    for (index, columns) in panels(into, rows, width, panel).enumerate() {
        let first = index * panel;
        let count = (rows - first).min(panel);
        let from = &from[first * row..];
        let (whole_rows, whole_width) = (count - count % S::LANES, width - width % S::LANES);
        for j in (0..whole_rows).step_by(S::LANES) {
            for p in (0..whole_width).step_by(S::LANES) {
                let (square, to) = (&from[j * row + p..], &mut columns[p * panel + j..]);
                assert!(
                    square.len() >= (S::LANES - 1) * row + S::LANES && to.len() >= (S::LANES - 1) * panel + S::LANES
                );
                // SAFETY: both squares are inside their slices.
                unsafe { S::transpose(square.as_ptr(), row, to.as_mut_ptr(), panel) }
            }
        }
        scalars(columns, from, row, 0..whole_rows, whole_width..width, panel);
        scalars(columns, from, row, whole_rows..count, 0..width, panel);
        clear(columns, count, panel);
    }
}

/// The panels of the transpose of `rows` × `width` numbers, from panels; the last panel is filled up with zeros.
///
/// # Safety
/// The processor has the instruction set of S.
#[inline(always)]
pub unsafe fn between_panels<T: Real, S: Simd<T>>(into: &mut [T], from: &[T], rows: usize, width: usize) {
    let panel = PANEL_VECTORS * S::LANES;
    let whole_rows = rows - rows % S::LANES;
    for (index, from) in from.chunks_exact((rows * panel).max(1)).enumerate().take(width.div_ceil(panel)) {
        let first = index * panel;
        let count = (width - first).min(panel);
        let whole = count - count % S::LANES;
        for (group, columns) in panels(into, rows, width, panel).enumerate() {
            let columns = &mut columns[first * panel..(first + count) * panel];
            let (low, high) = (group * panel, rows.min((group + 1) * panel));
            for j in (low..whole_rows.min(high)).step_by(S::LANES) {
                for p in (0..whole).step_by(S::LANES) {
                    let (square, to) = (&from[j * panel + p..], &mut columns[p * panel + j - low..]);
                    assert!(square.len() >= (S::LANES - 1) * panel + S::LANES);
                    assert!(to.len() >= (S::LANES - 1) * panel + S::LANES);
                    // SAFETY: both squares are inside their slices.
                    unsafe { S::transpose(square.as_ptr(), panel, to.as_mut_ptr(), panel) }
                }
            }
            let (source, whole_rows) = (&from[low * panel..], whole_rows.clamp(low, high) - low);
            scalars(columns, source, panel, 0..whole_rows, whole..count, panel);
            scalars(columns, source, panel, whole_rows..high - low, 0..count, panel);
            clear(columns, high - low, panel);
        }
    }
}

/// [`vectors`] for any element, one by one.
pub fn elements<X: Copy + Default>(into: &mut [X], from: &[X], row: usize, rows: usize, width: usize, panel: usize) {
    for (index, columns) in panels(into, rows, width, panel).enumerate() {
        let count = (rows - index * panel).min(panel);
        scalars(columns, &from[index * panel * row..], row, 0..count, 0..width, panel);
        clear(columns, count, panel);
    }
}

fn panels<X>(into: &mut [X], rows: usize, width: usize, panel: usize) -> std::slice::ChunksExactMut<'_, X> {
    into[..rows.div_ceil(panel) * panel * width].chunks_exact_mut((panel * width).max(1))
}

/// Moves the given rows and columns, eight columns at a time so that both sides stay in few cache lines.
#[inline(always)]
fn scalars<X: Copy>(
    columns: &mut [X],
    from: &[X],
    row: usize,
    rows: std::ops::Range<usize>,
    width: std::ops::Range<usize>,
    panel: usize,
) {
    for p in width.clone().step_by(8) {
        for j in rows.clone() {
            let source = &from[j * row + p..j * row + (p + 8).min(width.end)];
            for (d, &x) in source.iter().enumerate() {
                columns[(p + d) * panel + j] = x;
            }
        }
    }
}

fn clear<X: Copy + Default>(columns: &mut [X], count: usize, panel: usize) {
    if count < panel {
        columns.chunks_exact_mut(panel).for_each(|row| row[count..].fill(X::default()));
    }
}
