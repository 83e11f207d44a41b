//! Time and memory of repeated runs.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The system allocator, counting the bytes in use. A program installs it with `#[global_allocator]`.
pub struct CountingAllocator;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(grown: usize, shrunk: usize) {
    let before = IN_USE.fetch_add(grown.wrapping_sub(shrunk), Ordering::Relaxed);
    PEAK.fetch_max(before.wrapping_add(grown).wrapping_sub(shrunk), Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's layout.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: the caller's block and layout.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: the caller's block and layout.
        unsafe { System.dealloc(at, layout) }
    }
}

/// The result of `run` and the most bytes it had in use beyond those at its start.
pub fn peak_bytes<R>(run: impl FnOnce() -> R) -> (R, usize) {
    let start = IN_USE.load(Ordering::Relaxed);
    PEAK.store(start, Ordering::Relaxed);
    let result = run();
    (result, PEAK.load(Ordering::Relaxed).saturating_sub(start))
}

/// Runs at least this often, whatever the time.
const MIN_SAMPLES: usize = 3;

/// Seconds of each of `samples` runs, fewer once `budget` is spent; sorted.
///
/// # Errors
/// The first of `run`.
pub fn sample<E>(samples: usize, budget: Duration, mut run: impl FnMut() -> Result<(), E>) -> Result<Vec<f64>, E> {
    let start = Instant::now();
    let mut seconds = Vec::with_capacity(samples);
    while seconds.len() < samples && (seconds.len() < MIN_SAMPLES || start.elapsed() < budget) {
        let start = Instant::now();
        run()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}

/// The median of sorted, non-empty numbers.
pub fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}
