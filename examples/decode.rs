//! What a token costs after many: decoding with a cache of keys and values against states of fixed size.
//!
//! ```sh
//! cargo run --release --example decode
//! cargo run --release --example decode -- --mechanisms softmax,retention --batch 8 --lengths 1024,32768
//! cargo run --release --features cuda --example decode -- --device gpu
//! ```
//!
//! A small language model with random weights has written 1 K … 64 K tokens and goes on: time of a step, tokens/s, share of
//! the bound (as in `length_scaling`), bytes of the cache and the most memory of a step beside it.
//! Steps at all lengths take turns, so that whatever else the machine does meets them alike. Prints tables and writes a
//! picture of the times per batch, one of the memory, and `decode.json` to `--out`.

mod common;
#[path = "decode/decoding.rs"]
mod decoding;
#[path = "decode/work.rs"]
mod work;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use attn_kernels::nn::LanguageModelConfig;
use candle_core::{Device, Result};
use clap::Parser;
use clap::builder::PossibleValuesParser;
use comfy_table::Table;
use common::Float;
use common::arguments::{self, positive};
use common::bound::{Bound, Rates, Share};
use common::candle_device;
use common::chart::{Axis, Chart, Series};
use common::device::DeviceKind;
use common::files::Output;
use common::measure::{CountingAllocator, median, peak_bytes};
use common::table::table;
use decoding::{Decoding, model};
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::SeriesLabelPosition;
use serde::Serialize;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Steps before those that are timed: caches of softmax get room for more rows in the first one.
const WARM_UP: usize = 3;

/// Time and memory of decoding against the length so far.
#[derive(Parser)]
struct Options {
    #[arg(
        long, value_delimiter = ',', value_parser = PossibleValuesParser::new(LanguageModelConfig::NAMES),
        default_value = "softmax,linear,performer,norm,retention,gated_deltanet,kda,mamba2"
    )]
    mechanisms: Vec<String>,
    /// Tokens before the steps that are timed
    #[arg(long, value_parser = positive, value_delimiter = ',', default_value = "1024,4096,16384,65536")]
    lengths: Vec<usize>,
    /// Sequences that are decoded together
    #[arg(long, value_parser = positive, value_delimiter = ',', default_value = "1,32")]
    batch: Vec<usize>,
    #[arg(long, value_parser = positive, default_value = "128")]
    width: usize,
    #[arg(long, value_parser = positive, default_value = "2")]
    layers: usize,
    #[arg(long, value_parser = positive, default_value = "2")]
    heads: usize,
    /// Timed steps at each length
    #[arg(long, value_parser = positive, default_value = "60")]
    samples: usize,
    /// Lengths whose caches take more megabytes than this are left out
    #[arg(long, value_parser = positive, default_value = "3072")]
    limit: usize,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Directory for the SVGs and the JSON
    #[arg(long, default_value = "target/decode")]
    out: PathBuf,
}

/// One length.
#[derive(Serialize)]
struct Record {
    mechanism: String,
    batch: usize,
    /// Tokens of each sequence before the first timed step.
    length: usize,
    median_ms: f64,
    tokens_per_s: f64,
    cache_bytes: usize,
    /// The most memory in use during a step beyond that before it; CPU only.
    step_bytes: Option<usize>,
    /// CPU only.
    #[serde(flatten)]
    bound: Option<Share>,
}

fn main() -> ExitCode {
    arguments::status(run(Options::parse()))
}

fn run(mut options: Options) -> std::result::Result<(), String> {
    for list in [&mut options.lengths, &mut options.batch] {
        list.sort_unstable();
        list.dedup();
    }
    let device = candle_device::open(options.device)?;
    let create = |name: &str| Output::create(&options.out, name);
    let times = options.batch.iter().map(|&batch| Ok((batch, create(&format!("decode_batch_{batch}.svg"))?)));
    let times: Vec<_> = times.collect::<std::result::Result<_, String>>()?;
    let (memory, json) = (create("decode_memory.svg")?, create("decode.json")?);
    let style = ProgressStyle::with_template("{bar:30} {msg} {elapsed}").map_err(|error| error.to_string())?;
    let progress = ProgressBar::new((options.mechanisms.len() * options.batch.len()) as u64).with_style(style);
    let mut rates = device.is_cpu().then(|| Rates::of("cpu", Float::F32)).flatten();
    let mut records = Vec::new();
    for mechanism in &options.mechanisms {
        progress.set_message(mechanism.clone());
        let measured = measure(&options, mechanism, &device, rates.as_mut(), &progress);
        records.extend(measured.map_err(|error| format!("{mechanism}: {error}"))?);
    }
    progress.finish_and_clear();
    let place = candle_device::name(&device);
    let model = format!("{} layers of width {}, {} heads, f32, {place}", options.layers, options.width, options.heads);
    println!("Decoding, {model}\n{}", cases(&records));
    if let Some(rates) = &rates {
        println!("Bound: {}", rates.describe());
    }
    println!("{}", growth(&records));
    for (batch, file) in times {
        file.write(&draw_times(&format!("Decoding, batch {batch}, {model}"), batch, &records)?)?;
    }
    memory.write(&draw_memory(&format!("Memory of decoding, {model}"), options.batch[0], &records)?)?;
    json.write(&serde_json::to_string_pretty(&records).map_err(|error| error.to_string())?)
}

/// All batches and lengths of a mechanism.
fn measure(
    options: &Options,
    mechanism: &str,
    device: &Device,
    mut rates: Option<&mut Rates>,
    progress: &ProgressBar,
) -> Result<Vec<Record>> {
    let (model, weights) = model(mechanism, options.width, options.layers, options.heads, device)?;
    let mut single = Decoding::new(&model, device)?;
    let mut at_lengths = Vec::new();
    for &length in &options.lengths {
        single.read_to(length)?;
        at_lengths.push(single.repeated(1)?);
    }
    let mut records = Vec::new();
    for &batch in &options.batch {
        let decodings = copies(options, mechanism, &at_lengths, batch, progress)?;
        // Before the first step, when caches have no room to grow.
        let mut bound = |decoding: &Decoding<'_>| {
            let (flops, bytes) = work::of_step(decoding, weights);
            rates.as_deref_mut().map(|rates| rates.bound(flops, bytes))
        };
        let bounds: Vec<_> = decodings.iter().map(&mut bound).collect();
        records.extend(measure_batch(options, mechanism, decodings, bounds, batch)?);
        progress.inc(1);
    }
    Ok(records)
}

/// A batch at every length, as far as --limit allows.
fn copies<'m>(
    options: &Options,
    mechanism: &str,
    at_lengths: &[Decoding<'m>],
    batch: usize,
    progress: &ProgressBar,
) -> Result<Vec<Decoding<'m>>> {
    let mut decodings = Vec::new();
    let mut bytes = 0;
    for single in at_lengths {
        // With the room that a growing cache takes.
        bytes += 2 * batch * single.cache.bytes();
        if bytes > options.limit << 20 {
            let length = single.cache.len();
            progress.suspend(|| println!("{mechanism}, batch {batch}, {length} tokens: beyond --limit, left out"));
            break;
        }
        decodings.push(single.repeated(batch)?);
    }
    Ok(decodings)
}

fn measure_batch(
    options: &Options,
    mechanism: &str,
    mut decodings: Vec<Decoding<'_>>,
    bounds: Vec<Option<Bound>>,
    batch: usize,
) -> Result<Vec<Record>> {
    for decoding in &mut decodings {
        (0..WARM_UP).try_for_each(|_| decoding.step().map(|_| ()))?;
    }
    let mut seconds = vec![Vec::new(); decodings.len()];
    for _ in 0..options.samples {
        for (decoding, seconds) in decodings.iter_mut().zip(&mut seconds) {
            let started = Instant::now();
            decoding.step()?;
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    let is_cpu = options.device == DeviceKind::Cpu;
    let samples = decodings.iter_mut().zip(&mut seconds).zip(bounds).zip(&options.lengths);
    let records = samples.map(|(((decoding, seconds), bound), &length)| {
        seconds.sort_by(f64::total_cmp);
        let (stepped, step_bytes) = peak_bytes(|| decoding.step());
        stepped?;
        Ok(Record {
            mechanism: mechanism.into(),
            batch,
            length,
            median_ms: median(seconds) * 1e3,
            tokens_per_s: batch as f64 / median(seconds),
            cache_bytes: decoding.cache.bytes(),
            step_bytes: is_cpu.then_some(step_bytes),
            bound: bound.map(|bound| Share::new(&bound, median(seconds))),
        })
    });
    records.collect()
}

fn cases(records: &[Record]) -> Table {
    let header = [
        "mechanism",
        "batch",
        "tokens before",
        "ms a step",
        "tokens/s",
        "of bound",
        "cache kB",
        "beside it in a step kB",
    ];
    let mut table = table(&header, 1);
    for record in records {
        table.add_row([
            record.mechanism.clone(),
            record.batch.to_string(),
            record.length.to_string(),
            format!("{:.3}", record.median_ms),
            format!("{:.0}", record.tokens_per_s),
            record.bound.as_ref().map_or("-".into(), Share::to_string),
            format!("{:.1}", record.cache_bytes as f64 / 1e3),
            record.step_bytes.map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 / 1e3)),
        ]);
    }
    table
}

/// The records of one mechanism and batch.
fn curves(records: &[Record]) -> impl Iterator<Item = &[Record]> {
    records.chunk_by(|a, b| (&a.mechanism, a.batch) == (&b.mechanism, b.batch))
}

fn growth(records: &[Record]) -> Table {
    let mut table = table(&["mechanism", "batch", "from", "to", "time of a step", "cache"], 1);
    for curve in curves(records) {
        let [first, .., last] = curve else { continue };
        table.add_row([
            first.mechanism.clone(),
            first.batch.to_string(),
            first.length.to_string(),
            last.length.to_string(),
            format!("× {:.2}", last.median_ms / first.median_ms),
            format!("× {:.2}", last.cache_bytes as f64 / first.cache_bytes as f64),
        ]);
    }
    table
}

fn draw_times(title: &str, batch: usize, records: &[Record]) -> std::result::Result<String, String> {
    draw(title, "time of a step (ms)", batch, records, |record| record.median_ms)
}

fn draw_memory(title: &str, batch: usize, records: &[Record]) -> std::result::Result<String, String> {
    let name = "cache (kB a sequence)";
    draw(title, name, batch, records, |record| record.cache_bytes as f64 / record.batch as f64 / 1e3)
}

/// A value against the length, for one batch.
fn draw(
    title: &str,
    name: &str,
    batch: usize,
    records: &[Record],
    value: impl Fn(&Record) -> f64,
) -> std::result::Result<String, String> {
    let series = curves(records).filter(|curve| curve[0].batch == batch).map(|curve| {
        let points = curve.iter().map(|record| (record.length as f64, value(record))).collect();
        Series::new(curve[0].mechanism.clone(), points)
    });
    let (x, y) = (Axis::log("tokens before", 2.0), Axis::log(name, 10.0));
    Chart { title, x, y, legend: SeriesLabelPosition::UpperLeft }.draw(&series.collect::<Vec<_>>())
}
