//! What linear states forget: multi-query associative recall.
//!
//! ```sh
//! cargo run --release --example recall
//! cargo run --release --example recall -- --mechanisms softmax,retention --state-widths 16,64 --steps 2000
//! cargo run --release --example recall -- --quick
//! ```
//!
//! A model of one block reads pairs of keys and values and must answer every key with its value. Softmax looks each one
//! up in a cache that grows; a linear state has to hold all pairs in a fixed number of bytes, which is varied. Every
//! model learns on 4, 8, 16 … `--pairs` pairs and is tested on each. Prints accuracies and writes `recall.svg` and
//! `recall.json` to `--out`.

mod common;
mod recall {
    pub mod model;
    pub mod task;
}

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use attn_kernels::nn::{cross_entropy, seeded_weights};
use candle_core::{D, DType, Device, Result};
use candle_nn::VarMap;
use clap::{Parser, ValueEnum};
use common::arguments::{self, positive};
use common::candle_device;
use common::chart::{Axis, Chart, Series};
use common::device::DeviceKind;
use common::files::Output;
use common::optimizer::{AdamW, learning_rate};
use common::table::table;
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::SeriesLabelPosition;
use recall::model::{Recaller, config};
use recall::task::{KEYS, Task};
use serde::Serialize;

/// Tensors are large: the system's allocator maps and clears their memory anew each time, this one keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Sequences on which a model is tested, for each number of pairs.
const TESTED: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Mechanism {
    /// A cache of all keys and values
    Softmax,
    Linear,
    /// With four features per unit of `--state-widths`
    Performer,
    Norm,
    Retention,
    /// With keys as wide as values
    Gla,
    Deltanet,
    GatedDeltanet,
    Kda,
    /// With a state of that width
    Mamba2,
    /// With as many states of a channel
    Mamba,
    Lightning,
    Rwkv7,
    /// With as many complex numbers for a channel
    S4d,
    /// With half of its square of complex numbers
    Lru,
}

impl Mechanism {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
    }
}

/// Associative recall against the size of the state.
#[derive(Parser)]
struct Options {
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "softmax,linear,performer,norm,retention,gla,deltanet,gated_deltanet,kda,mamba2"
    )]
    mechanisms: Vec<Mechanism>,
    /// Widths of the head: a linear state has about the square of it numbers, the cache of softmax twice as many per token
    #[arg(long, value_parser = positive, value_delimiter = ',', default_value = "8,16,32,64")]
    state_widths: Vec<usize>,
    /// Largest number of pairs
    #[arg(long, value_parser = positive, default_value = "64")]
    pairs: usize,
    /// Width of the model
    #[arg(long, value_parser = positive, default_value = "64")]
    width: usize,
    #[arg(long, value_parser = positive, default_value = "600")]
    steps: usize,
    /// Tokens in a step
    #[arg(long, value_parser = positive, default_value = "2048")]
    tokens: usize,
    #[arg(long, default_value = "0.02")]
    learning_rate: f64,
    #[arg(long, default_value = "0")]
    seed: u64,
    /// Seconds instead of minutes: 8 pairs, softmax and linear, widths 8 and 16
    #[arg(long, conflicts_with_all = ["mechanisms", "state_widths", "pairs", "steps", "tokens"])]
    quick: bool,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Directory for the SVG and the JSON
    #[arg(long, default_value = "target/recall")]
    out: PathBuf,
}

impl Options {
    fn parse_and_check() -> std::result::Result<Self, String> {
        let mut options = Self::parse();
        if options.quick {
            options.mechanisms = vec![Mechanism::Softmax, Mechanism::Linear];
            (options.state_widths, options.pairs, options.steps, options.tokens) = (vec![8, 16], 8, 400, 768);
        }
        if options.pairs > KEYS {
            return Err(format!("--pairs {}: needs to be at most {KEYS}, the number of keys", options.pairs));
        }
        options.state_widths.sort_unstable();
        options.state_widths.dedup();
        Ok(options)
    }

    /// 4, 8, 16 … and `--pairs`.
    fn all_pairs(&self) -> Vec<usize> {
        let doubled = std::iter::successors(Some(4), |pairs| Some(2 * pairs));
        doubled.take_while(|&pairs| pairs < self.pairs).chain([self.pairs]).collect()
    }

    fn runs(&self) -> Vec<(Mechanism, usize)> {
        let widths = |mechanism| self.state_widths.iter().map(move |&width| (mechanism, width));
        self.mechanisms.iter().flat_map(|&mechanism| widths(mechanism)).collect()
    }
}

/// What one model recalls.
#[derive(Serialize)]
struct Record {
    mechanism: String,
    state_width: usize,
    /// Of one sequence with the largest number of pairs, once read.
    state_bytes: usize,
    /// Pairs and the share of keys that are answered right.
    accuracy: Vec<(usize, f64)>,
    seconds: f64,
}

fn main() -> ExitCode {
    arguments::status(Options::parse_and_check().and_then(|options| run(&options)))
}

fn run(options: &Options) -> std::result::Result<(), String> {
    let device = candle_device::open(options.device)?;
    let (svg, json) = (Output::create(&options.out, "recall.svg")?, Output::create(&options.out, "recall.json")?);
    let runs = options.runs();
    let style = ProgressStyle::with_template("{bar:30} {msg} {eta} left").map_err(|error| error.to_string())?;
    let progress = ProgressBar::new((runs.len() * options.steps) as u64).with_style(style);
    let mut records = Vec::new();
    for (mechanism, width) in runs {
        let name = format!("{}, width {width}", mechanism.name());
        progress.set_message(name.clone());
        let record = measure(options, mechanism, width, &device, &progress);
        records.push(record.map_err(|error| format!("{name}: {error}"))?);
    }
    progress.finish_and_clear();
    print(options, &records);
    svg.write(&draw(options, &records)?)?;
    json.write(&serde_json::to_string_pretty(&records).map_err(|error| error.to_string())?)
}

/// Trains one model and tests it.
fn measure(
    options: &Options,
    mechanism: Mechanism,
    state_width: usize,
    device: &Device,
    progress: &ProgressBar,
) -> Result<Record> {
    let started = Instant::now();
    let variables = VarMap::new();
    let weights = seeded_weights(&variables, options.seed, DType::F32, device);
    let model = Recaller::new(&config(&mechanism.name(), options.width, state_width)?, &weights)?;
    let mut optimizer = AdamW::new(&variables);
    let all_pairs = options.all_pairs();
    for step in 0..options.steps {
        // The first half begins with few pairs and adds more: mechanisms without a positive weight start slowly.
        let known = (1 + 2 * step * all_pairs.len() / options.steps).min(all_pairs.len());
        let pairs = all_pairs[step % known];
        let batch = (options.tokens / (3 * pairs)).max(1);
        let task = Task::random(batch, pairs, options.seed, step as u64, device)?;
        let scores = model.forward(&task.tokens, pairs)?;
        let loss = cross_entropy(&scores, &task.answers)?;
        optimizer.step(&loss.backward()?, step, learning_rate(options.learning_rate, step, options.steps))?;
        progress.inc(1);
    }
    let accuracy = all_pairs.iter().map(|&pairs| Ok((pairs, accuracy(&model, pairs, options.seed, device)?)));
    let task = Task::random(1, options.pairs, options.seed, u64::MAX, device)?;
    Ok(Record {
        mechanism: mechanism.name(),
        state_width,
        state_bytes: model.state_bytes(&task.tokens)?,
        accuracy: accuracy.collect::<Result<_>>()?,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The share of right answers, on sequences that training does not draw.
fn accuracy(model: &Recaller, pairs: usize, seed: u64, device: &Device) -> Result<f64> {
    let task = Task::random(TESTED, pairs, seed, u64::MAX, device)?;
    let chosen = model.forward(&task.tokens, pairs)?.argmax(D::Minus1)?;
    let right = chosen.eq(&task.answers)?.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?;
    Ok(right.into())
}

fn print(options: &Options, records: &[Record]) {
    let pairs: Vec<_> = options.all_pairs().iter().map(|pairs| format!("{pairs} pairs")).collect();
    let mut header = vec!["mechanism", "head width", "state bytes"];
    header.extend(pairs.iter().map(String::as_str));
    header.push("seconds");
    let mut table = table(&header, 1);
    for record in records {
        let mut row = vec![record.mechanism.clone(), record.state_width.to_string(), record.state_bytes.to_string()];
        row.extend(record.accuracy.iter().map(|(_, accuracy)| format!("{:.1} %", accuracy * 100.0)));
        row.push(format!("{:.1}", record.seconds));
        table.add_row(row);
    }
    println!("Share of keys answered with their value; guessing gives {:.1} %\n{table}", 100.0 / KEYS as f64);
}

fn draw(options: &Options, records: &[Record]) -> std::result::Result<String, String> {
    let point = |record: &Record| {
        let accuracy = record.accuracy.last().map_or(0.0, |(_, accuracy)| *accuracy);
        (record.state_bytes as f64, accuracy * 100.0)
    };
    let series = records
        .chunk_by(|a, b| a.mechanism == b.mechanism)
        .map(|records| Series::new(records[0].mechanism.clone(), records.iter().map(point).collect()));
    let title =
        format!("Recall of {} pairs, one block of width {}, {} steps", options.pairs, options.width, options.steps);
    let chart = Chart {
        title: &title,
        x: Axis::log("state of a sequence (bytes)", 2.0),
        y: Axis::linear("keys answered right (%)"),
        legend: SeriesLabelPosition::UpperLeft,
    };
    chart.draw(&series.collect::<Vec<_>>())
}
