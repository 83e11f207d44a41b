//! Our side of the peer benchmarks: a program that a script starts once and asks for one timing after the other.
//!
//! Every line in is a JSON object, answered by one line of JSON:
//!
//! * `{"case": {…}}`, the fields of [`Case`], prepares a case. With random operands it is checked and answered by
//!   `{"max_rel_error": x}`; with operands from a file by `{}`: whoever made them checks the results.
//! * `{"sample": n}` runs it n times. On the CPU it is answered by `{"seconds": [s], …}`, the average of the runs; on a GPU
//!   by the times of each by events of the device, 20 or more. `host_seconds` is what the host is busy for with one run,
//!   `extra_bytes` the memory that plans on a GPU ask for.
//! * `{"results": "path"}` runs it and writes the results of the last pass to a file, in f32.
//! * `{"plot": {…}}`, the fields of [`Plot`], draws a picture.
//!
//! A request that cannot be met is answered by `{"error": "…"}`.
//!
//! On the CPU a run includes the allocation of its results; on a GPU they are there. `fwdbwd` is the forward pass with
//! what the backward pass needs of it, and the backward pass.

#[path = "peer_bench/case.rs"]
mod case;
mod common;
#[path = "peer_bench/lines.rs"]
mod lines;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use case::{Case, Passes};
use common::backend::Cpu;
use common::chart::{Axis, Chart, Series};
use common::check::{Expected, Scope};
#[cfg(feature = "gpu")]
use common::gpu::Rotation;
use common::run::Run;
use common::{Call, Device, Inputs, Pass};
use lines::{Next, answer, fail, read, reply};
use plotters::prelude::SeriesLabelPosition;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Deserialize;
use serde_json::{Value, json};

/// What samples on a GPU may take.
#[cfg(feature = "gpu")]
const BUDGET: Duration = Duration::from_secs(2);

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    Case(Case),
    Sample(usize),
    Results(PathBuf),
    Plot(Plot),
}

#[derive(Deserialize)]
struct Plot {
    path: PathBuf,
    title: String,
    x: String,
    y: String,
    /// Names and points
    lines: Vec<(String, Vec<(f64, f64)>)>,
}

fn main() -> std::io::Result<()> {
    let mut next = read()?;
    while let Some(request) = next {
        next = match request {
            Ok(Request::Case(case)) => serve(&case)?,
            Ok(Request::Plot(picture)) => answer(&reply(draw(picture)))?,
            Ok(_) => fail("needs a case before")?,
            Err(message) => fail(&message)?,
        };
    }
    Ok(())
}

fn draw(picture: Plot) -> Result<Value, String> {
    let Plot { path, title, x, y, lines } = picture;
    let chart =
        Chart { title: &title, x: Axis::log(&x, 2.0), y: Axis::log(&y, 10.0), legend: SeriesLabelPosition::UpperLeft };
    let series = lines.into_iter().enumerate().map(|(i, (name, points))| Series::numbered(i, name, points));
    let svg = chart.draw(&series.collect::<Vec<_>>())?;
    std::fs::write(&path, svg).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(json!({}))
}

/// Answers the requests about a case; returns the first other request.
fn serve(case: &Case) -> std::io::Result<Next<Request>> {
    let (pool, device, inputs) = match open(case) {
        Ok(opened) => opened,
        Err(message) => return fail(&message),
    };
    let call = match case.call(&inputs) {
        Ok(call) => call,
        Err(message) => return fail(&message),
    };
    let (checked, mut timed) =
        match pool.install(|| Ok::<_, String>((check(case, &device, &call)?, Timed::new(case, &device, &call)?))) {
            Ok(prepared) => prepared,
            Err(message) => return fail(&message),
        };
    let mut next = answer(&checked)?;
    loop {
        let result = match next {
            Some(Ok(Request::Sample(repeats))) => pool.install(|| timed.sample(repeats.max(1))),
            Some(Ok(Request::Results(path))) => pool.install(|| save(case, &device, &call, &path)),
            other => return Ok(other),
        };
        next = answer(&reply(result))?;
    }
}

fn open(case: &Case) -> Result<(ThreadPool, Device, Inputs), String> {
    let pool = ThreadPoolBuilder::new().num_threads(case.threads).build().map_err(|error| error.to_string())?;
    let (device, inputs) = pool.install(|| Ok::<_, String>((Device::open(case.device()?)?, case.inputs()?)))?;
    Ok((pool, device, inputs))
}

fn check(case: &Case, device: &Device, call: &Call<'_>) -> Result<Value, String> {
    if case.inputs.is_some() {
        return Ok(json!({}));
    }
    let mut worst = 0.0_f64;
    for &pass in case.pass.list() {
        let check = Expected::new(call, pass, Scope::Sample).check(device).map_err(|error| error.to_string())?;
        worst = worst.max(check.into_result()?.worst_row());
    }
    Ok(json!({ "max_rel_error": worst }))
}

fn save(case: &Case, device: &Device, call: &Call<'_>, path: &Path) -> Result<Value, String> {
    let pass = if case.pass == Passes::Fwd { Pass::Fwd } else { Pass::Bwd };
    let results = device.results(call, pass, &call.inputs.d_out).map_err(|error| error.to_string())?;
    case::write(path, &results).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(json!({}))
}

/// A case ready to be timed.
enum Timed<'c> {
    Cpu(&'c Call<'c>, Passes),
    #[cfg(feature = "gpu")]
    Gpu(Box<Rotation<'c>>),
}

impl<'c> Timed<'c> {
    fn new(case: &Case, device: &Device, call: &'c Call<'c>) -> Result<Self, String> {
        match device {
            Device::Cpu => Ok(Self::Cpu(call, case.pass)),
            #[cfg(feature = "gpu")]
            Device::Gpu(gpu) => {
                let rotation = Rotation::new(gpu, call, case.pass.list()).map_err(|error| error.to_string())?;
                Ok(Self::Gpu(Box::new(rotation)))
            }
        }
    }

    fn sample(&mut self, repeats: usize) -> Result<Value, String> {
        match self {
            Self::Cpu(call, passes) => {
                let seconds = time(*passes, call, repeats).map_err(|error| error.to_string())?;
                Ok(json!({ "seconds": [seconds], "host_seconds": seconds, "extra_bytes": 0 }))
            }
            #[cfg(feature = "gpu")]
            Self::Gpu(rotation) => {
                let samples = rotation.sample(repeats, BUDGET).map_err(|error| error.to_string())?;
                Ok(json!({
                    "seconds": samples.seconds,
                    "host_seconds": samples.host_seconds,
                    "extra_bytes": samples.extra_bytes,
                }))
            }
        }
    }
}

/// Seconds of one run on the CPU, averaged over `repeats`.
fn time(passes: Passes, call: &Call<'_>, repeats: usize) -> attn_kernels::Result<f64> {
    let kind = if passes == Passes::Fwd { Pass::Fwd } else { Pass::Bwd };
    let mut total = Duration::ZERO;
    for _ in 0..repeats {
        let mut start = Instant::now();
        let mut run = Run::new(Cpu, call, kind, &call.inputs.d_out)?;
        run.forward()?;
        if passes == Passes::Bwd {
            start = Instant::now();
        }
        run.backward()?;
        total += start.elapsed();
    }
    Ok(total.as_secs_f64() / repeats as f64)
}
