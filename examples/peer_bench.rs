//! Our side of the peer benchmarks: a program that a script starts once and asks for one timing after the other.
//!
//! Every line in is a JSON object, answered by one line of JSON. `{"case": {…}}` (the fields of [`Case`]) prepares and
//! checks a case and is answered by `{"max_rel_error": x}`; `{"sample": n}` runs it n times and is answered by
//! `{"seconds": s}`, the time of one run. A request that cannot be met is answered by `{"error": "…"}`.
//!
//! A run includes the allocation of its results; `fwdbwd` is the forward pass with what the backward pass needs of it,
//! and the backward pass.

mod common;

use std::io::{BufRead, Write};
use std::time::Instant;

use clap::ValueEnum;
use common::backend::Cpu;
use common::check::{Expected, Scope};
use common::inputs::Shape;
use common::run::Run;
use common::{Call, Device, Float, Inputs, Mechanism, Pass};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    Case(Case),
    Sample(usize),
}

#[derive(Deserialize)]
struct Case {
    mechanism: String,
    /// `fwd` or `fwdbwd`
    pass: Passes,
    causal: bool,
    dtype: String,
    batch: usize,
    heads: usize,
    head_dim: usize,
    len: usize,
    threads: usize,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Passes {
    Fwd,
    FwdBwd,
}

fn main() -> std::io::Result<()> {
    let mut next = read()?;
    while let Some(request) = next {
        next = match request {
            Ok(Request::Case(case)) => serve(&case)?,
            Ok(Request::Sample(_)) => fail("a sample before the first case")?,
            Err(message) => fail(&message)?,
        };
    }
    Ok(())
}

type Line = Option<Result<Request, String>>;

fn read() -> std::io::Result<Line> {
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line).map_err(|error| error.to_string())))
}

fn answer(value: &Value) -> std::io::Result<Line> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    out.flush()?;
    read()
}

fn fail(message: &str) -> std::io::Result<Line> {
    answer(&json!({ "error": message }))
}

/// Answers the requests for samples of a case; returns the first other request.
fn serve(case: &Case) -> std::io::Result<Line> {
    let pool = match rayon::ThreadPoolBuilder::new().num_threads(case.threads).build() {
        Ok(pool) => pool,
        Err(error) => return fail(&error.to_string()),
    };
    let (mechanism, inputs) = match pool.install(|| prepare(case)) {
        Ok(prepared) => prepared,
        Err(message) => return fail(&message),
    };
    let call = match Call::new(mechanism, case.causal, &inputs) {
        Ok(call) => call,
        Err(error) => return fail(&error.to_string()),
    };
    let error = match pool.install(|| check(case, &call)) {
        Ok(error) => error,
        Err(message) => return fail(&message),
    };
    let mut next = answer(&json!({ "max_rel_error": error }))?;
    while let Some(Ok(Request::Sample(repeats))) = next {
        let seconds = pool.install(|| time(case, &call, repeats.max(1)));
        next = match seconds {
            Ok(seconds) => answer(&json!({ "seconds": seconds }))?,
            Err(error) => fail(&error.to_string())?,
        };
    }
    Ok(next)
}

fn prepare(case: &Case) -> Result<(Mechanism, Inputs), String> {
    let mechanism = Mechanism::from_str(&case.mechanism, false)?;
    let dtype = Float::from_str(&case.dtype, false)?;
    if !mechanism.supports(case.causal) {
        return Err(format!("{} needs causal: true", mechanism.name()));
    }
    let shape = Shape::square(case.batch, case.heads, case.len, case.head_dim);
    Ok((mechanism, Inputs::random(dtype, shape).map_err(|error| error.to_string())?))
}

fn check(case: &Case, call: &Call<'_>) -> Result<f64, String> {
    let passes: &[Pass] = match case.pass {
        Passes::Fwd => &[Pass::Fwd],
        Passes::FwdBwd => &Pass::ALL,
    };
    let mut worst = 0.0_f64;
    for &pass in passes {
        let check = Expected::new(call, pass, Scope::Sample).check(&Device::Cpu).map_err(|error| error.to_string())?;
        worst = worst.max(check.into_result()?.worst_row());
    }
    Ok(worst)
}

/// Seconds of one run, averaged over `repeats`.
fn time(case: &Case, call: &Call<'_>, repeats: usize) -> attn_kernels::Result<f64> {
    let start = Instant::now();
    for _ in 0..repeats {
        match case.pass {
            Passes::Fwd => Run::new(Cpu, call, Pass::Fwd, &call.inputs.d_out)?.forward()?,
            Passes::FwdBwd => {
                let mut run = Run::new(Cpu, call, Pass::Bwd, &call.inputs.d_out)?;
                run.forward()?;
                run.backward()?;
            }
        }
    }
    Ok(start.elapsed().as_secs_f64() / repeats as f64)
}
