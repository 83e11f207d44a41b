//! Comparison of a call with the f64 reference.
//!
//! An error may be twice that of the plain implementation in the same type, plus one rounding of the result. For f64
//! the plain implementation's error is that in f32, scaled by the ratio of their roundings, and added a third time
//! for the reference. For a sample, or few rows, whose plain errors are good or bad luck, the factor is 8 and 16
//! roundings of the sums are allowed for gradients that cancel, on the scale of the largest gradient.

use attn_kernels::Result;
use attn_kernels::reference::Array;
use rayon::prelude::*;

use super::call::Call;
use super::device::Device;
use super::inputs::Window;
use super::mechanism::{Mechanism, Pass};
use super::reference::DENSE;
use super::tensor::{Buffer, Float, Tensor};
use super::{plain, reference};

/// Rows of a head that are looked at where all are too many.
const ROWS: usize = 8;
/// Rows from which on the plain implementation's errors are no luck.
const MANY_ROWS: usize = 256;
/// A multiple of every block and chunk, where sampled rows end.
const ALIGNMENT: usize = 256;
/// Pairs of query and key up to which everything is looked at.
const SAMPLE_PAIRS: usize = 1 << 18;
/// As `SAMPLE_PAIRS`, on demand.
const WHOLE_PAIRS: usize = 1 << 24;

/// How much of the result is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything, if there are no more than 2²⁴ pairs of query and key.
    Whole,
    /// The first and the last head; of long ones some rows.
    Sample,
}

impl Scope {
    fn max_pairs(self) -> usize {
        match self {
            Self::Whole => WHOLE_PAIRS,
            Self::Sample => SAMPLE_PAIRS,
        }
    }

    /// The largest admissible error, when the plain implementation's is `plain`; `largest` is the size of the largest
    /// result.
    fn bound(self, float: Float, plain: Error, wanted: &Array, largest: Error) -> Error {
        let rounding = |x: &f64| x + (x.abs() * float.unit_roundoff()).max(float.smallest_rounding());
        let rounded = Array { data: wanted.data.iter().map(rounding).collect(), shape: wanted.shape };
        let rounding = error(&rounded, wanted);
        let [batch, heads, rows, _] = wanted.shape;
        let (factor, cancellation) = match self {
            Self::Whole if batch * heads * rows >= MANY_ROWS => (2.0, 0.0),
            _ => (8.0, 16.0 * float.accumulator().unit_roundoff()),
        };
        let factor = match float {
            Float::F64 => (factor + 1.0) * Float::F64.unit_roundoff() / Float::F32.unit_roundoff(),
            _ => factor,
        };
        let size = size(wanted);
        Error {
            rms: factor * plain.rms + rounding.rms + cancellation * largest.rms / size.rms,
            worst_row: factor * plain.worst_row
                + rounding.worst_row
                + cancellation * largest.worst_row / size.worst_row,
        }
    }
}

/// Root mean squares of a tensor of errors and of its largest row, relative to those of the reference.
#[derive(Debug, Clone, Copy, Default)]
pub struct Error {
    pub rms: f64,
    pub worst_row: f64,
}

impl Error {
    fn larger(self, other: Self) -> Self {
        Self { rms: largest(self.rms, other.rms), worst_row: largest(self.worst_row, other.worst_row) }
    }
}

/// The error of one tensor of results.
#[derive(Debug, Clone)]
pub struct Comparison {
    pub tensor: &'static str,
    pub error: Error,
    pub bound: Error,
}

impl Comparison {
    pub fn is_within(&self) -> bool {
        self.error.rms <= self.bound.rms && self.error.worst_row <= self.bound.worst_row
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tensor, error, bound } = self;
        write!(
            f,
            "{tensor}: RMS error {:.2e} (bound {:.2e}), worst row {:.2e} (bound {:.2e})",
            error.rms, bound.rms, error.worst_row, bound.worst_row
        )
    }
}

pub struct Check(pub Vec<Comparison>);

impl Check {
    pub fn worst_row(&self) -> f64 {
        self.0.iter().map(|comparison| comparison.error.worst_row).fold(0.0, largest)
    }

    /// # Errors
    /// Naming the first tensor that is outside its bound.
    pub fn into_result(self) -> std::result::Result<Self, String> {
        match self.0.iter().find(|comparison| !comparison.is_within()) {
            Some(comparison) => Err(format!("wrong result: {comparison}")),
            None => Ok(self),
        }
    }
}

/// What a pass of a call should result in.
pub struct Expected<'a> {
    call: &'a Call<'a>,
    pass: Pass,
    /// Zero in rows that are not looked at.
    d_out: Tensor,
    windows: Vec<(Window, Vec<Array>, Vec<Error>)>,
}

impl<'a> Expected<'a> {
    pub fn new(call: &'a Call<'a>, pass: Pass, scope: Scope) -> Self {
        let float = call.inputs.float;
        let windows = windows(call, pass, scope);
        let d_out =
            if pass == Pass::Bwd { only_windows(&call.inputs.d_out, &windows) } else { call.inputs.d_out.clone() };
        let with_results = |window: Window| {
            let part = call.inputs.part(&window);
            let (wanted, plain) = rayon::join(
                || reference::compute(call, &window, &part, pass),
                || plain::runs(call, &window, &part, pass),
            );
            let largest = wanted.iter().map(size).fold(Error::default(), Error::larger);
            let bound = |(index, wanted): (usize, &Array)| {
                let plain = plain.iter().map(|run| error(&run[index], wanted));
                scope.bound(float, plain.fold(Error::default(), Error::larger), wanted, largest)
            };
            let bounds = wanted.iter().enumerate().map(bound).collect();
            (window, wanted, bounds)
        };
        Self { call, pass, d_out, windows: windows.into_par_iter().map(with_results).collect() }
    }

    /// Runs the call and compares.
    ///
    /// # Errors
    /// Those of the call.
    pub fn check(&self, device: &Device) -> Result<Check> {
        let Self { call, pass, .. } = *self;
        let tensors = device.results(call, pass, &self.d_out)?;
        let mut comparisons = Vec::new();
        for (window, wanted, bounds) in &self.windows {
            for (index, (tensor, rows)) in reference::results(call, pass).into_iter().enumerate() {
                let got = reference::part(call, &tensors[index], rows, window);
                comparisons.push(Comparison { tensor, error: error(&got, &wanted[index]), bound: bounds[index] });
            }
        }
        Ok(Check(comparisons))
    }
}

fn windows(call: &Call<'_>, pass: Pass, scope: Scope) -> Vec<Window> {
    let shape = &call.inputs.shape;
    let whole = Window::whole(shape);
    if shape.batch * shape.heads * shape.queries * shape.keys <= scope.max_pairs() {
        return vec![whole];
    }
    let first = Window { batches: 0..1, heads: 0..1, ..whole.clone() };
    let last = Window { batches: shape.batch - 1..shape.batch, heads: shape.heads - 1..shape.heads, ..whole };
    let is_single = shape.batch == 1 && shape.key_heads == 1;
    if shape.queries.max(shape.keys) <= DENSE {
        return if is_single { vec![last] } else { vec![first, last] };
    }
    if pass == Pass::Fwd && (call.mechanism.is_recurrent() || call.mechanism == Mechanism::Flash) {
        return vec![last];
    }
    let rows = |window: Window, end: usize| {
        let start = end.saturating_sub(ROWS).max((end - 1) / ALIGNMENT * ALIGNMENT);
        let keys = if call.causal { (end + shape.keys).saturating_sub(shape.queries) } else { shape.keys };
        Window { queries: start..end, keys, ..window }
    };
    let middle = (shape.queries / 3).next_multiple_of(ALIGNMENT);
    let middle = if call.causal { middle.min(shape.queries) } else { shape.queries };
    let last = rows(last, shape.queries);
    if is_single { vec![last] } else { vec![rows(first, middle), last] }
}

fn only_windows(d_out: &Tensor, windows: &[Window]) -> Tensor {
    let [heads, queries, width] = [d_out.dims[1], d_out.dims[2], d_out.dims[3]];
    let is_inside = |index: usize| {
        let row = index / width;
        let (b, h, i) = (row / queries / heads, row / queries % heads, row % queries);
        windows.iter().any(|w| w.batches.contains(&b) && w.heads.contains(&h) && w.queries.contains(&i))
    };
    let data: Vec<f64> = (0..d_out.data.len()).map(|i| if is_inside(i) { d_out.data.get(i) } else { 0.0 }).collect();
    Tensor { data: Buffer::from_f64(d_out.data.float(), &data), dims: d_out.dims.clone() }
}

/// NaN if an element of `got` is.
pub fn error(got: &Array, wanted: &Array) -> Error {
    let difference = got.data.iter().zip(&wanted.data).map(|(x, y)| x - y).collect();
    let (difference, size) = (root_mean_squares(&Array { data: difference, shape: wanted.shape }), size(wanted));
    Error { rms: difference.rms / size.rms, worst_row: difference.worst_row / size.worst_row }
}

/// What errors are relative to; 1 for zeros.
fn size(array: &Array) -> Error {
    let size = root_mean_squares(array);
    if size.rms == 0.0 { Error { rms: 1.0, worst_row: 1.0 } } else { size }
}

/// Of all elements, and of the row where it is largest.
fn root_mean_squares(array: &Array) -> Error {
    let of = |elements: &[f64]| (elements.iter().map(|x| x * x).sum::<f64>() / elements.len().max(1) as f64).sqrt();
    let rows = array.data.chunks(array.shape[3].max(1));
    Error { rms: of(&array.data), worst_row: rows.map(of).fold(0.0, largest) }
}

/// The larger, or NaN if one is.
fn largest(x: f64, y: f64) -> f64 {
    if x.is_nan() || x > y { x } else { y }
}
