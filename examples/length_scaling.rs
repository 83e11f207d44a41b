//! How each attention mechanism scales with length on this machine, on checked numbers.
//!
//! ```sh
//! cargo run --release --example length_scaling
//! cargo run --release --example length_scaling -- --mechanisms softmax,linear --lengths 1024,4096 --pass bwd
//! cargo run --release --features gpu --example length_scaling -- --device gpu --dtype bf16
//! ```
//!
//! On a GPU times are those of events on the device, over copies of the operands that exceed its cache, with all memory
//! allocated before; the sum of FLASH's two branches is not in them.
//!
//! Prints a table and writes `length_scaling.svg` and `length_scaling.json` to `--out`. The bound of a case is the longer of
//! two times: of its counted operations at the rate of multiply-adds in registers, and of a copy of as many bytes as its
//! operands and results have. Both rates are measured first, on the same threads; those of a GPU are published ones.

mod common;
#[path = "length_scaling/plot.rs"]
mod plot;
#[path = "length_scaling/scaling.rs"]
mod scaling;
#[path = "length_scaling/table.rs"]
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgAction, Parser};
use common::arguments::{self, positive};
use common::bound::{Rates, Share};
use common::check::{Expected, Scope};
use common::device::{DeviceKind, Samples};
use common::files::Output;
use common::inputs::Shape;
use common::measure::{CountingAllocator, median};
use common::{Call, Device, Float, Inputs, Mechanism, Pass, cost};
use indicatif::{ProgressBar, ProgressStyle};
use scaling::Record;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// After this a case gets no further sample, beyond the first three.
const BUDGET: Duration = Duration::from_millis(300);

/// How often the time that is shown moves on.
const TICK: Duration = Duration::from_millis(200);

/// How each attention mechanism scales with length: every case is checked against the f64 reference, then timed.
#[derive(Parser)]
struct Options {
    /// Mechanisms [default: all that exist with this --causal]
    #[arg(long, value_enum, value_delimiter = ',')]
    mechanisms: Vec<Mechanism>,
    /// Lengths of the sequence
    #[arg(long, value_parser = positive, value_delimiter = ',', default_value = "256,512,1024,2048,4096,8192,16384")]
    lengths: Vec<usize>,
    #[arg(long, value_parser = positive, default_value = "1")]
    batch: usize,
    #[arg(long, value_parser = positive, default_value = "8")]
    heads: usize,
    #[arg(long, value_parser = positive, default_value = "64")]
    head_dim: usize,
    #[arg(long, value_enum, default_value_t = Float::F32)]
    dtype: Float,
    #[arg(long, value_enum, default_value_t = Pass::Fwd)]
    pass: Pass,
    #[arg(long, action = ArgAction::Set, default_value_t = true)]
    causal: bool,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Threads of the CPU, which also computes the reference [default: all that the machine has]
    #[arg(long, value_parser = positive)]
    threads: Option<usize>,
    /// Timed runs of each case; those beyond the third only within 0.3 seconds; 20 or more on a GPU
    #[arg(long, value_parser = positive, default_value = "15")]
    samples: usize,
    /// Directory for the SVG and the JSON
    #[arg(long, default_value = "target/length_scaling")]
    out: PathBuf,
}

impl Options {
    fn mechanisms(&self) -> Result<Vec<Mechanism>, String> {
        if self.mechanisms.is_empty() {
            return Ok(Mechanism::ALL.into_iter().filter(|mechanism| mechanism.supports(self.causal)).collect());
        }
        if let Some(mechanism) = self.mechanisms.iter().find(|mechanism| !mechanism.supports(self.causal)) {
            return Err(format!("--mechanisms {0}: {0} needs --causal true", mechanism.name()));
        }
        Ok(Mechanism::ALL.into_iter().filter(|mechanism| self.mechanisms.contains(mechanism)).collect())
    }

    fn lengths(&self) -> Vec<usize> {
        let mut lengths = self.lengths.clone();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    fn shape(&self, len: usize) -> Shape {
        Shape::square(self.batch, self.heads, len, self.head_dim)
    }

    fn title(&self, device: &Device, threads: usize) -> String {
        let place = if self.device == DeviceKind::Cpu { format!("threads {threads}") } else { device.name().into() };
        format!(
            "{} pass, {}{}, batch {}, heads {}, width {}, {}",
            if self.pass == Pass::Fwd { "Forward" } else { "Backward" },
            if self.causal { "causal, " } else { "" },
            self.dtype,
            self.batch,
            self.heads,
            self.head_dim,
            place
        )
    }
}

fn main() -> ExitCode {
    arguments::status(run(&Options::parse()))
}

fn run(options: &Options) -> Result<(), String> {
    let device = Device::open(options.device)?;
    let mechanisms = options.mechanisms()?;
    let svg = Output::create(&options.out, "length_scaling.svg")?;
    let json = Output::create(&options.out, "length_scaling.json")?;
    let threads = options.threads.unwrap_or(0);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| format!("--threads {threads}: {error}"))?;
    let mut rates = pool.install(|| Rates::of(device.name(), options.dtype));
    let records = pool.install(|| sweep(options, &device, &mechanisms, rates.as_mut()))?;
    let title = options.title(&device, pool.current_num_threads());
    println!("{title}\n{}", table::cases(&records));
    if let Some(rates) = &rates {
        println!("Bound: {}", rates.describe());
    }
    println!("{}", table::growth(&records));
    let picture = plot::draw(&title, &records)?;
    let list = serde_json::to_string_pretty(&records).map_err(|error| error.to_string())?;
    svg.write(&picture)?;
    json.write(&list)
}

fn sweep(
    options: &Options,
    device: &Device,
    mechanisms: &[Mechanism],
    mut rates: Option<&mut Rates>,
) -> Result<Vec<Record>, String> {
    let lengths = options.lengths();
    let cases = lengths.len() * mechanisms.len();
    eprintln!("{cases} cases: each is checked against the f64 reference, then timed; long ones come last");
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}").map_err(|error| error.to_string())?;
    let progress = ProgressBar::new(cases as u64).with_style(style);
    progress.enable_steady_tick(TICK);
    let mut records = Vec::new();
    for len in lengths {
        progress.set_message(format!("operands of length {len}"));
        if progress.is_hidden() {
            eprintln!("length {len} …");
        }
        let inputs =
            Inputs::random(options.dtype, options.shape(len)).map_err(|error| format!("length {len}: {error}"))?;
        for &mechanism in mechanisms {
            let case = format!("{}, length {len}", mechanism.name());
            progress.set_message(case.clone());
            let call = Call::new(mechanism, options.causal, &inputs).map_err(|error| format!("{case}: {error}"))?;
            let record = measure(options, device, &call, rates.as_deref_mut());
            records.push(record.map_err(|error| format!("{case}: {error}"))?);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    records.sort_by_key(|record| mechanisms.iter().position(|mechanism| mechanism.name() == record.mechanism));
    Ok(records)
}

/// Checks one case, then times it.
fn measure(options: &Options, device: &Device, call: &Call<'_>, rates: Option<&mut Rates>) -> Result<Record, String> {
    let pass = options.pass;
    let check = Expected::new(call, pass, Scope::Sample).check(device).map_err(|error| error.to_string())?;
    let check = check.into_result()?;
    let samples = device.timed(call, pass).and_then(|mut timed| timed.sample(options.samples, BUDGET));
    let Samples { seconds, extra_bytes, .. } = samples.map_err(|error| error.to_string())?;
    let (flops, bytes) = (cost::flops(call, pass), cost::bytes(call, pass));
    let bound = rates.map(|rates| rates.bound(flops, bytes));
    let (median, shape) = (median(&seconds), &call.inputs.shape);
    Ok(Record {
        mechanism: call.mechanism.name(),
        pass: pass.name(),
        causal: options.causal,
        dtype: options.dtype.to_string(),
        device: device.name().into(),
        batch: shape.batch,
        heads: shape.heads,
        head_dim: shape.width,
        len: shape.queries,
        median_ms: median * 1e3,
        min_ms: seconds[0] * 1e3,
        tokens_per_s: (shape.batch * shape.queries) as f64 / median,
        gflops: flops / median / 1e9,
        gbytes_per_s: bytes / median / 1e9,
        bound: bound.map(|bound| Share::new(&bound, median)),
        peak_bytes: extra_bytes,
        max_rel_error: check.worst_row(),
    })
}
