//! Rows times weights, y = x Wᵀ, in an order of sums that the width of the rows alone decides: a row of y has the same bits
//! whatever other rows there are, and on any number of threads.

use super::buffer::Buffer;
use super::rows::Number;
use super::simd::Isa;
use super::tile::{Elements, StoredRows, Verbs};
use super::{dispatch, parallel};
use crate::problem::{Slice, SliceMut};

/// Rows of W of a task; whole groups of the inner products.
const COLUMNS: usize = 64;
/// Numbers of the rows of x that a task keeps in the second-level cache, while it goes once over its rows of W.
const KEPT: usize = 1 << 17;

/// y `[rows, columns]` of x `[rows, width]` and W `[columns, width]`, all contiguous and of one dtype. Both are read in
/// place, W once for every [`KEPT`] numbers of x.
///
/// # Panics
/// Lengths that are no such matrices.
pub(crate) fn products(x: Slice<'_>, weights: Slice<'_>, width: usize, y: SliceMut<'_>) {
    assert!(width > 0 && x.len().is_multiple_of(width) && weights.len().is_multiple_of(width));
    let (rows, columns) = (x.len() / width, weights.len() / width);
    assert!(y.len() == rows * columns);
    dispatch!(x.dtype(), T => { run(Verbs::<T>::get(Isa::current()), x, T::stored(weights), width, y) });
}

/// The products of some rows of x with some of W.
struct Task<'a, 'y, T> {
    left: &'a [T],
    first_column: usize,
    /// Of every row of x.
    rooms: Vec<SliceMut<'y>>,
}

fn run<T: Number>(verbs: &Verbs<T>, x: Slice<'_>, weights: Elements<'_, T>, width: usize, mut y: SliceMut<'_>)
where
    Verbs<T>: Sync,
{
    let (rows, padded) = (x.len() / width, verbs.padded(width));
    let columns = y.len().checked_div(rows).unwrap_or(0);
    let loaded;
    let left = match T::stored(x) {
        Elements::Own(x) if width == padded => x,
        _ => {
            let mut whole = Buffer::zeros(rows * padded);
            let rows = whole.chunks_exact_mut(padded).enumerate();
            rows.for_each(|(row, into)| T::load(x, row * width, &mut into[..width]));
            loaded = whole;
            &loaded[..]
        }
    };
    // Whole register tiles of 6 and 4 rows.
    let block = (KEPT / padded).clamp(12, 252) / 12 * 12;
    let mut tasks = Vec::new();
    for left in left.chunks(block * padded) {
        let first = tasks.len();
        let room = || Vec::with_capacity(left.len() / padded);
        let starts = (0..columns).step_by(COLUMNS);
        tasks.extend(starts.map(|first_column| Task { left, first_column, rooms: room() }));
        for _ in 0..left.len() / padded {
            for task in &mut tasks[first..] {
                task.rooms.push(y.take(COLUMNS.min(columns - task.first_column)));
            }
        }
    }
    let work = |tile: &mut Buffer<T>, task: Task<'_, '_, T>| {
        let count = task.rooms.first().map_or(0, SliceMut::len);
        let start = task.first_column * width;
        let weights = StoredRows { elements: weights, start, stride: width, count, width };
        verbs.inner_products(tile, COLUMNS, task.left, weights);
        for (row, mut room) in tile.chunks_exact(COLUMNS).zip(task.rooms) {
            T::store(&row[..count], &mut room, 0);
        }
    };
    let nanoseconds = rows.saturating_mul(columns).saturating_mul(width) / 16;
    parallel::run_brief(nanoseconds, tasks, || Buffer::zeros(block.min(rows) * COLUMNS), work);
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn wave(count: usize, step: f64) -> Vec<f64> {
        (0..count).map(|i| (i as f64 * step).sin()).collect()
    }

    /// Of every instruction set: right, and to the bit what a row gives alone.
    #[test]
    fn rows_are_their_own() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for (rows, columns, width) in [(1, 1, 1), (7, 5, 3), (33, 70, 24), (70, 131, 100), (5, 64, 4096)] {
                let (x, w) = (wave(rows * width, 0.37), wave(columns * width, 0.71));
                let [x32, w32] = [&x, &w].map(|x| x.iter().map(|&x| x as f32).collect::<Vec<_>>());
                let [x16, w16] = [&x, &w].map(|x| x.iter().map(|&x| bf16::from_f64(x)).collect::<Vec<_>>());
                isa.force(|| {
                    let (mut y, mut alone) = (vec![0f32; rows * columns], vec![0f32; rows * columns]);
                    products((&x32[..]).into(), (&w32[..]).into(), width, (&mut y[..]).into());
                    let (mut y64, mut y16) = (vec![0f64; rows * columns], vec![bf16::ZERO; rows * columns]);
                    products((&x[..]).into(), (&w[..]).into(), width, (&mut y64[..]).into());
                    products((&x16[..]).into(), (&w16[..]).into(), width, (&mut y16[..]).into());
                    for (row, alone) in alone.chunks_exact_mut(columns).enumerate() {
                        let x = &x32[row * width..][..width];
                        products(x.into(), (&w32[..]).into(), width, (&mut *alone).into());
                    }
                    assert_eq!(y, alone, "{isa:?} {rows} {columns} {width}");
                    let size = (width as f64).sqrt();
                    for (at, &y) in y.iter().enumerate() {
                        let (x, w) = (&x[at / columns * width..][..width], &w[at % columns * width..][..width]);
                        let exact: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                        assert!((f64::from(y) - exact).abs() < 1e-5 * size, "{isa:?} {y} {exact}");
                        assert!((y64[at] - exact).abs() < 1e-12 * size, "{isa:?} {} {exact}", y64[at]);
                        assert!((y16[at].to_f64() - exact).abs() < 0.02 * size.max(exact.abs()), "{isa:?} {exact}");
                    }
                });
            }
        }
    }
}
