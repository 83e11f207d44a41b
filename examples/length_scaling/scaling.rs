//! Measurements, and what they say about growth with length.

use serde::Serialize;

use crate::common::Mechanism;
use crate::common::bound::Share;

/// One case. Times are those of the pass alone, into memory that is there.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    pub mechanism: &'static str,
    pub pass: &'static str,
    pub causal: bool,
    pub dtype: String,
    /// `cpu`, or what the driver calls the GPU.
    pub device: String,
    pub batch: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub len: usize,
    pub median_ms: f64,
    pub min_ms: f64,
    pub tokens_per_s: f64,
    /// From the counted work of the definition.
    pub gflops: f64,
    /// From operands and results, each moved once.
    pub gbytes_per_s: f64,
    /// None on a GPU whose rates are not known.
    #[serde(flatten)]
    pub bound: Option<Share>,
    /// Memory beyond operands and results; on a GPU that of the plans.
    pub peak_bytes: usize,
    /// Largest error of a row, relative to the largest row.
    pub max_rel_error: f64,
}

/// The records of each mechanism, by length.
pub fn by_mechanism(records: &[Record]) -> impl Iterator<Item = (Mechanism, &[Record])> {
    let of_name = |name| Mechanism::ALL.into_iter().find(|mechanism| mechanism.name() == name);
    records
        .chunk_by(|a, b| a.mechanism == b.mechanism)
        .filter_map(move |chunk| Some((of_name(chunk.first()?.mechanism)?, chunk)))
}

/// d ln(time)/d ln(length) between the last two lengths.
pub fn growth_exponent(records: &[Record]) -> Option<f64> {
    let [.., before, last] = records else { return None };
    Some((last.median_ms / before.median_ms).ln() / (last.len as f64 / before.len as f64).ln())
}

/// Where a mechanism becomes, and stays, faster than another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Crossover {
    /// Already at the first length.
    Before(usize),
    /// Interpolated, times and lengths on logarithmic scales.
    At(f64),
    /// Not up to the last length.
    NoneUpTo(usize),
}

impl std::fmt::Display for Crossover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Before(length) => write!(f, "below {length}"),
            Self::At(length) => write!(f, "{length:.0}"),
            Self::NoneUpTo(length) => write!(f, "none up to {length}"),
        }
    }
}

/// The crossover of `records` against `other`, measured at the same lengths.
pub fn crossover(records: &[Record], other: &[Record]) -> Option<Crossover> {
    let difference = |i: usize| (records[i].median_ms / other[i].median_ms).ln();
    let last = records.len().min(other.len()).checked_sub(1)?;
    if difference(last) >= 0.0 {
        return Some(Crossover::NoneUpTo(records[last].len));
    }
    let Some(slower) = (0..last).rev().find(|&i| difference(i) >= 0.0) else {
        return Some(Crossover::Before(records[0].len));
    };
    let (before, after) = (difference(slower), difference(slower + 1));
    let (from, to) = ((records[slower].len as f64).ln(), (records[slower + 1].len as f64).ln());
    Some(Crossover::At((from + (to - from) * before / (before - after)).exp()))
}
