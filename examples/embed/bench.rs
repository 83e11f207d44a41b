//! Sentences per second.

use std::time::{Duration, Instant};

use candle_core::Tensor;

use crate::common::Mechanism;
use crate::common::measure::{median, sample};
use crate::embed::tokens::Batch;

/// Passes before those that are timed.
const WARM_UP: Duration = Duration::from_millis(300);

/// As many passes at most.
const PASSES: usize = 100_000;

/// Prints the median rate of the passes of about `time`.
///
/// # Errors
/// The first of `embed`.
pub fn run(
    mechanism: Mechanism,
    batch: &Batch,
    time: Duration,
    embed: impl Fn() -> Result<Tensor, String>,
) -> Result<(), String> {
    let pass = || embed()?.device().synchronize().map_err(|error| error.to_string());
    let started = Instant::now();
    while started.elapsed() < WARM_UP {
        pass()?;
    }
    let seconds = sample(PASSES, time, pass)?;
    let (count, longest) = (batch.lengths.len(), batch.lengths.iter().max().copied().unwrap_or_default());
    println!(
        "{}: {:.1} sentences/s ({count} sentences of {longest} tokens at most, {:.3} ms, {} passes, {} threads)",
        mechanism.name(),
        count as f64 / median(&seconds),
        median(&seconds) * 1e3,
        seconds.len(),
        rayon::current_num_threads(),
    );
    Ok(())
}
