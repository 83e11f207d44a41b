//! A backend against the f64 reference.
//!
//! ```sh
//! cargo run --release --example validate
//! cargo run --release --example validate -- --input activations.safetensors
//! cargo run --release --features gpu --example validate -- --device gpu
//! ```
//!
//! The first compares every operation, element type, pass and instruction set that the processor has; with `--device gpu`
//! it is the GPU that computes, with or without `--input`, within the same bounds. The second runs
//! every mechanism on given tensors: q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]` and, where there are any,
//! key_mask `[B, M]` (0 removes a key) and the output of softmax attention, out `[B, H, N, E]`. Errors are relative
//! to the reference, those of rows to its largest row; the exit status is 1 if one is outside its bound.

#[path = "validate/activations.rs"]
mod activations;
mod common;
#[path = "validate/operations.rs"]
mod operations;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, Parser};
use common::check::Comparison;
use common::device::DeviceKind;
use common::{Device, arguments};
use serde::Serialize;

/// A backend against the f64 reference: every operation, element type, pass and, on the CPU, instruction set.
#[derive(Parser)]
struct Options {
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Write the results as a list of JSON objects
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run every mechanism on q, k, v and, where there are any, key_mask and out of a safetensors file instead
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Whether the tensors of --input are those of causal attention
    #[arg(long, action = ArgAction::Set, default_value_t = false, requires = "input")]
    causal: bool,
}

/// One line of JSON: the errors of a pass that come closest to their bounds.
#[derive(Debug, Clone, Serialize)]
struct Outcome {
    operation: &'static str,
    mechanism: &'static str,
    dtype: String,
    path: &'static str,
    pass: &'static str,
    rms_error: f64,
    rms_bound: f64,
    worst_row_error: f64,
    worst_row_bound: f64,
    is_within: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    distance_to_softmax: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_difference_to_out: Option<f64>,
}

impl Outcome {
    /// Takes the comparisons' errors in, where they are closer to their bounds.
    fn add(&mut self, comparisons: &[Comparison]) {
        for Comparison { error, bound, .. } in comparisons {
            if share(error.rms, bound.rms) >= share(self.rms_error, self.rms_bound) {
                (self.rms_error, self.rms_bound) = (error.rms, bound.rms);
            }
            if share(error.worst_row, bound.worst_row) >= share(self.worst_row_error, self.worst_row_bound) {
                (self.worst_row_error, self.worst_row_bound) = (error.worst_row, bound.worst_row);
            }
            self.is_within &= error.rms <= bound.rms && error.worst_row <= bound.worst_row;
        }
    }

    /// Two cells: the errors, each with its bound.
    fn cells(&self) -> [String; 2] {
        let mark = |error: f64, bound: f64| if error <= bound { "" } else { " !" };
        let cell = |error, bound| format!("{error:.1e} ≤ {bound:.1e}{}", mark(error, bound));
        [cell(self.rms_error, self.rms_bound), cell(self.worst_row_error, self.worst_row_bound)]
    }
}

/// How much of its bound an error takes; infinite for NaN.
fn share(error: f64, bound: f64) -> f64 {
    let share = error / bound;
    if share.is_nan() { f64::INFINITY } else { share }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcomes = Device::open(options.device).and_then(|device| match &options.input {
        Some(file) => activations::run(&device, file, options.causal),
        None => operations::run(&device),
    });
    arguments::status(outcomes.and_then(|outcomes| report(&outcomes, options.json.as_deref())))
}

/// # Errors
/// If the JSON cannot be written, or an outcome is outside its bounds.
fn report(outcomes: &[Outcome], json: Option<&Path>) -> Result<(), String> {
    if let Some(path) = json {
        let list = serde_json::to_string_pretty(outcomes).map_err(|error| error.to_string())?;
        std::fs::write(path, list + "\n").map_err(|error| format!("--json {}: {error}", path.display()))?;
    }
    let outside = outcomes.iter().filter(|outcome| !outcome.is_within).count();
    if outside > 0 {
        return Err(format!("{outside} of {} results are outside their bounds (marked !)", outcomes.len()));
    }
    println!("all {} results are within their bounds", outcomes.len());
    Ok(())
}
