//! The tolerance, by rule.
//!
//! A tensor's error against the f64 reference may be twice that of the [`plain`](super::plain) implementation with
//! storage in the same dtype, plus one rounding of the tensor; both as root mean square over the tensor and for its
//! worst row. Results that are in the accumulator's dtype are held against plain f32. For f64 the bound is that of
//! f32, scaled down by the ratio of the roundings, with one plain error more for the reference's own.
//!
//! One plain run is a matter of luck where numbers are few or cancel, so the error is the largest over several runs
//! with other roundings, and no plain run is taken to be better than one rounding of the tensor.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use attn_kernels::problem::DType;
use attn_kernels::reference::Array;

use super::buffers::{smallest, unit};
use super::cases::Case;
use super::data::{Data, entry_dtype};
use super::plain;
use super::reference::{Results, expected, is_accumulated};

/// A size of error.
#[derive(Debug, Clone, Copy, Default)]
pub struct Size {
    /// Root mean square over the tensor.
    pub rms: f64,
    /// Root mean square of the worst row.
    pub worst: f64,
}

type Sizes = Vec<(&'static str, Size)>;

/// What the results of a run are compared with.
pub struct Judge {
    pub expected: Results,
    /// By name of a result.
    bounds: Sizes,
}

impl Judge {
    pub fn new(case: &Case, data: &Data, dtype: DType) -> Self {
        let expected = expected(case, data);
        // Gradients of biases and sinks are in the dtype of these.
        let entry = |name: &str, dtype| match name {
            "d_attention_bias" => case.operation.attention_bias().map_or(dtype, |kind| entry_dtype(kind, dtype)),
            "d_sinks" => case.operation.sinks().map_or(dtype, |kind| entry_dtype(kind, dtype)),
            _ => dtype,
        };
        let bounds =
            match dtype {
                DType::F32 => bounds(&expected, &plain_errors(case, DType::F32), 2.0, 1.0, |_| DType::F32),
                DType::F64 => {
                    let ratio = unit(DType::F64) / unit(DType::F32);
                    bounds(&expected, &plain_errors(case, DType::F32), 3.0, ratio, |name| entry(name, DType::F64))
                }
                _ => {
                    let mut plain = plain_errors(case, dtype).to_vec();
                    plain.extend(plain_errors(case, DType::F32).iter().filter(|(name, _)| is_held_in_f32(name)));
                    bounds(&expected, &plain, 2.0, 1.0, |name| {
                        if is_accumulated(name) { DType::F32 } else { entry(name, dtype) }
                    })
                }
            };
        Judge { expected, bounds }.with_rests(case, data, dtype)
    }

    /// From runs of a plain implementation in f32, `of_result` the dtype of each result.
    pub fn of(expected: Results, plain: &[Results], dtype: DType, of_result: impl Fn(&str) -> DType) -> Self {
        let mut errors = Sizes::new();
        for results in plain {
            add_errors(&mut errors, results, &expected, 1e-4, |_| true).unwrap_or_else(|wrong| panic!("plain {wrong}"));
        }
        let (factor, ratio) = if dtype == DType::F64 { (3.0, unit(DType::F64) / unit(DType::F32)) } else { (2.0, 1.0) };
        let bounds = bounds(&expected, &errors, factor, ratio, of_result);
        Judge { expected, bounds }
    }

    /// Where every query sees one key at most, the gradients of q and k are what is left of ⟨d_out, v⟩ − ⟨d_out, out⟩, beside
    /// that of the log-sum-exp. GPUs sum up both in orders of their own, while a plain implementation takes a number off
    /// itself: a rounding for each summand may be left. (That the CPU leaves nothing is a test of its own.)
    fn with_rests(mut self, case: &Case, data: &Data, dtype: DType) -> Self {
        let largest = |x: &Array| x.data.iter().filter(|x| x.is_finite()).fold(0f64, |most, x| most.max(x.abs()));
        let sums = unit(if dtype == DType::F64 { DType::F64 } else { DType::F32 });
        let width = data.v.shape[3] as f64;
        let rest = sums * width * largest(&data.d_out) * largest(&data.v) * largest(&data.q).max(largest(&data.k));
        for (name, bound) in self.bounds.iter_mut().filter(|(name, _)| matches!(*name, "d_q" | "d_k")) {
            let is_single = case.keys == 1 && data.d_lse.is_some();
            if is_single || self.expected.get(name).is_some_and(|x| largest(x) == 0.0) {
                *bound = Size { rms: bound.rms.max(rest), worst: bound.worst.max(rest) };
            }
        }
        self
    }

    /// What is wrong with `results`, one line per tensor.
    pub fn complaints(&self, results: &Results) -> Vec<String> {
        let mut complaints = Vec::new();
        let names = |results: &Results| results.0.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        let has = |prefix: &str| results.0.iter().any(|(name, _)| name.starts_with(prefix));
        // Forward passes have no gradients, and some backends no state.
        let left_out: Vec<&str> = ["d_", "state."].into_iter().filter(|prefix| !has(prefix)).collect();
        let is_asked = |name: &str| !left_out.iter().any(|prefix| name.starts_with(prefix));
        for (name, expected) in self.expected.0.iter().filter(|(name, _)| is_asked(name)) {
            let Some(got) = results.get(name) else {
                complaints.push(format!("{name} is missing among {:?}", names(results)));
                continue;
            };
            let bound = self.bounds.iter().find(|(other, _)| other == name).map(|(_, bound)| *bound);
            complaints.extend(complaint(name, got, expected, bound.unwrap_or_default()));
        }
        let unknown = names(results).into_iter().filter(|name| self.expected.get(name).is_none());
        complaints.extend(unknown.map(|name| format!("{name} is not expected")));
        complaints
    }
}

/// Whether a result's error does not depend on the dtype of the inputs. (Gradients go through the stored output.)
fn is_held_in_f32(name: &str) -> bool {
    is_accumulated(name) && !name.starts_with("d_")
}

/// Errors of the plain implementation by name of the result; computed once for all tests. Narrow dtypes leave out what
/// is held in f32.
fn plain_errors(case: &Case, dtype: DType) -> Arc<Sizes> {
    type Known = HashMap<(String, DType), Arc<OnceLock<Arc<Sizes>>>>;
    static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
    let entry = {
        let mut known = KNOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        known.get_or_insert_default().entry((format!("{case:?}"), dtype)).or_default().clone()
    };
    entry.get_or_init(|| Arc::new(measure(case, dtype))).clone()
}

fn measure(case: &Case, dtype: DType) -> Sizes {
    let narrow = matches!(dtype, DType::F16 | DType::BF16);
    let data = Data::new(case, if narrow { dtype } else { DType::F32 });
    let expected = expected(case, &data);
    let pairs = case.batch * case.output_heads() * case.queries * case.keys;
    // What comes back through a state is a sum that all tokens share: its error is a matter of luck for the whole tensor.
    let fewest = if narrow { 1 } else { 3 };
    let fewest = if case.state_gradient { plain::SAMPLES } else { fewest };
    let samples = (100_000 / pairs.max(1)).clamp(fewest, plain::SAMPLES);
    let mut errors = Sizes::new();
    for sample in 0..samples {
        let results = plain::run(case, &data, dtype, sample);
        let limit = if narrow { 0.5 } else { 1e-4 };
        let counts = |name: &str| !(narrow && is_held_in_f32(name));
        let outcome = add_errors(&mut errors, &results, &expected, limit, counts);
        outcome.unwrap_or_else(|wrong| panic!("{case}: {dtype} plain {wrong}"));
    }
    errors
}

/// Takes the errors of a plain run in, of the results that `counts` holds for, where they are larger.
fn add_errors(
    errors: &mut Sizes,
    results: &Results,
    expected: &Results,
    limit: f64,
    counts: impl Fn(&str) -> bool,
) -> Result<(), String> {
    for (name, expected) in expected.0.iter().filter(|(name, _)| counts(name)) {
        let got = results.get(name).ok_or_else(|| format!("results have no {name}"))?;
        let error = error(got, expected).map_err(|at| format!("{name} at {at}"))?;
        if error.rms >= limit * (1.0 + magnitude(expected).rms) {
            return Err(format!("{name} is off by {error:?}; it cannot set a bound"));
        }
        match errors.iter_mut().find(|(other, _)| other == name) {
            Some((_, size)) => {
                *size = Size { rms: size.rms.max(error.rms), worst: size.worst.max(error.worst) };
            }
            None => errors.push((name, error)),
        }
    }
    Ok(())
}

/// `factor` times the plain errors, which are scaled by `ratio` first, and one rounding to the dtype of the result.
fn bounds(
    expected: &Results,
    plain: &[(&'static str, Size)],
    factor: f64,
    ratio: f64,
    dtype: impl Fn(&str) -> DType,
) -> Vec<(&'static str, Size)> {
    let bound = |(name, error): &(&'static str, Size)| {
        let size = magnitude(expected.get(name).expect("the same results"));
        let (unit, smallest) = (unit(dtype(name)), smallest(dtype(name)));
        let bound = |error: f64, size: f64| {
            let rounding = unit * size + smallest;
            factor * (error * ratio).max(rounding) + rounding
        };
        (*name, Size { rms: bound(error.rms, size.rms), worst: bound(error.worst, size.worst) })
    };
    plain.iter().map(bound).collect()
}

fn complaint(name: &str, got: &Array, expected: &Array, bound: Size) -> Option<String> {
    if got.shape != expected.shape {
        return Some(format!("{name} has shape {:?}, expected {:?}", got.shape, expected.shape));
    }
    let error = match error(got, expected) {
        Ok(error) => error,
        Err(difference) => return Some(format!("{name} at {difference}")),
    };
    if error.rms <= bound.rms && error.worst <= bound.worst {
        return None;
    }
    let distance = |i: &usize| (got.data[*i] - expected.data[*i]).abs();
    let finite = (0..got.data.len()).filter(|&i| expected.data[i].is_finite());
    let at = finite.max_by(|i, j| distance(i).total_cmp(&distance(j))).unwrap_or(0);
    let scale = magnitude(expected).rms;
    Some(format!(
        "{name}: error rms {:.2e} (bound {:.2e}), worst row {:.2e} (bound {:.2e}), relative to rms {scale:.2e}; worst \
         at {:?}: got {:e}, expected {:e}",
        error.rms / scale,
        bound.rms / scale,
        error.worst / scale,
        bound.worst / scale,
        index(expected.shape, at),
        got.data[at],
        expected.data[at]
    ))
}

fn index(shape: [usize; 4], at: usize) -> [usize; 4] {
    let [_, b, c, d] = shape.map(|size| size.max(1));
    [at / (b * c * d), at / (c * d) % b, at / d % c, at % d]
}

/// The size of `got − expected`; where one of them is not finite they must be the same, else `Err` says where not.
pub fn error(got: &Array, expected: &Array) -> Result<Size, String> {
    let mut difference = expected.clone();
    for (at, (to, &x)) in difference.data.iter_mut().zip(&got.data).enumerate() {
        let same = x == *to || (x.is_nan() && to.is_nan());
        if !same && (!x.is_finite() || !to.is_finite()) {
            return Err(format!("{:?}: got {x:e}, expected {to:e}", index(expected.shape, at)));
        }
        *to = if same { 0.0 } else { x - *to };
    }
    Ok(magnitude(&difference))
}

/// The size of the finite entries.
pub fn magnitude(x: &Array) -> Size {
    let square = |row: &[f64]| row.iter().filter(|x| x.is_finite()).map(|x| x * x).sum::<f64>();
    let width = x.shape[3].max(1);
    let worst = x.data.chunks(width).map(square).fold(0.0, f64::max) / width as f64;
    Size { rms: (square(&x.data) / x.data.len().max(1) as f64).sqrt(), worst: worst.sqrt() }
}
