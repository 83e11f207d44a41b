//! A byte-level language model on any text, with any attention of this crate.
//!
//! ```sh
//! cargo run --release --example train_lm -- --mechanism retention
//! cargo run --release --example train_lm -- --text my_folder,my_file.txt --width 256 --steps 2000
//! cargo run --release --example train_lm -- --resume target/train_lm/retention
//! cargo run --release --example train_lm -- --compare softmax,linear,retention,flash
//! ```
//!
//! By default it learns this repository's own sources and documentation. Every validation is followed by a checkpoint,
//! `<out>/<mechanism>`, from which `--resume` goes on to the very bits of an uninterrupted run. At the end the model
//! writes some text by recurrent decoding, and 256 greedy steps are compared with one pass over all bytes. Writes the
//! loss curves as `train_lm.svg` and `train_lm.json` to `--out`.

mod common;
mod train_lm {
    pub mod sample;
    pub mod text;
    pub mod training;
}

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use attn_kernels::nn::{LanguageModelConfig, SamplerConfig};
use clap::Parser;
use clap::builder::PossibleValuesParser;
use common::arguments::{self, positive};
use common::candle_device;
use common::chart::{Axis, Chart, Series};
use common::device::DeviceKind;
use common::files::Output;
use common::table::table;
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::SeriesLabelPosition;
use serde::Serialize;
use train_lm::sample;
use train_lm::text::Text;
use train_lm::training::{Point, Settings, Training};

/// Tensors are large: the system's allocator maps and clears their memory anew each time, this one keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Bytes of the validation text that the model continues at the end.
const PROMPT: usize = 64;

/// Trains a byte-level language model.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    settings: Settings,
    /// Mechanisms to train one after the other on the same data, drawn together [default: all]
    #[arg(
        long, value_delimiter = ',', num_args = 0.., conflicts_with = "mechanism", default_missing_values = LanguageModelConfig::NAMES,
        value_parser = PossibleValuesParser::new(LanguageModelConfig::NAMES)
    )]
    compare: Option<Vec<String>>,
    /// Folder of a checkpoint to go on from, with its settings
    #[arg(long, conflicts_with_all = ["Settings", "compare"])]
    resume: Option<PathBuf>,
    /// Stop after this step with a checkpoint, as an interruption would
    #[arg(long, value_parser = positive)]
    stop_at: Option<usize>,
    /// Bytes to write at the end
    #[arg(long, default_value = "256")]
    sample: usize,
    /// Temperature of what is written; 0 takes the most likely byte
    #[arg(long, default_value = "0.7")]
    temperature: f64,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Directory for checkpoints, the SVG and the JSON
    #[arg(long, default_value = "target/train_lm")]
    out: PathBuf,
}

fn main() -> ExitCode {
    arguments::status(run(&Options::parse()))
}

/// What is written about one run.
#[derive(Serialize)]
struct Report {
    settings: Settings,
    parameters: usize,
    curve: Vec<Point>,
    /// Training alone, of this process.
    bytes_per_second: f64,
}

fn run(options: &Options) -> Result<(), String> {
    let device = candle_device::open(options.device)?;
    let (training, text) = match &options.resume {
        Some(folder) => Training::load(folder, &device).map(|(training, text)| (Some(training), text))?,
        None => (None, options.settings.load_text()?),
    };
    let (svg, json) = (Output::create(&options.out, "train_lm.svg")?, Output::create(&options.out, "train_lm.json")?);
    println!("{} files, {} bytes to learn, {} for validation", text.files, text.training.len(), text.validation.len());
    let mechanisms = match (&training, &options.compare) {
        (Some(training), _) => vec![training.settings.mechanism.clone()],
        (None, Some(mechanisms)) => mechanisms.clone(),
        (None, None) => vec![options.settings.mechanism.clone()],
    };
    let mut resumed = training;
    let mut reports = Vec::new();
    for mechanism in mechanisms {
        let training = match resumed.take() {
            Some(training) => training,
            None => {
                let settings = Settings { mechanism: mechanism.clone(), ..options.settings.clone() };
                Training::new(&settings, &text, &device).map_err(|error| error.to_string())?
            }
        };
        let report = train(options, training, &text).map_err(|error| format!("{mechanism}: {error}"))?;
        reports.push(report);
    }
    print_summary(&reports);
    svg.write(&draw(&reports)?)?;
    json.write(&serde_json::to_string_pretty(&reports).map_err(|error| error.to_string())?)
}

/// Trains to the end, or to `--stop-at`, and lets the model write.
fn train(options: &Options, mut training: Training, text: &Text) -> Result<Report, String> {
    let settings = training.settings.clone();
    let fail = |error: candle_core::Error| error.to_string();
    let folder = options.out.join(&settings.mechanism);
    let last = options.stop_at.unwrap_or(settings.steps).min(settings.steps);
    let parameters = training.parameters();
    println!("\n{}, {parameters} parameters, steps {} to {last}", settings.mechanism, training.step);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta} left").map_err(|e| e.to_string())?;
    let progress = ProgressBar::new(settings.steps as u64).with_style(style).with_position(training.step as u64);
    let (mut seconds, start) = (0.0, training.step);
    if training.step == 0 {
        let first = training.evaluate(None).map_err(fail)?;
        progress.suspend(|| println!("{}", line(&first)));
    }
    while training.step < last {
        let started = Instant::now();
        let loss = training.step(text).map_err(fail)?;
        seconds += started.elapsed().as_secs_f64();
        if !loss.is_finite() {
            return Err(format!("the loss is {loss} at step {}: try a lower --learning-rate", training.step));
        }
        let rate = ((training.step - start) * settings.batch * settings.context) as f64 / seconds;
        progress.set_message(format!("loss {loss:.3}, {rate:.0} tokens/s"));
        progress.set_position(training.step as u64);
        if training.step.is_multiple_of(settings.evaluate_every) || training.step == settings.steps {
            let point = training.evaluate(Some(loss)).map_err(fail)?;
            progress.suspend(|| println!("{}, {rate:.0} tokens/s", line(&point)));
            training.save(&folder, text)?;
        }
    }
    progress.finish_and_clear();
    training.save(&folder, text)?;
    if training.step == settings.steps {
        write_some(options, &training, text)?;
    }
    let bytes_per_second = ((training.step - start) * settings.batch * settings.context) as f64 / seconds;
    Ok(Report { settings, parameters, curve: training.curve, bytes_per_second })
}

fn line(point: &Point) -> String {
    let Point { step, bits_per_byte, seconds, .. } = point;
    format!("step {step:5}: validation {bits_per_byte:.3} bits per byte, {seconds:.1} s")
}

/// Continues the beginning of the validation text.
fn write_some(options: &Options, training: &Training, text: &Text) -> Result<(), String> {
    let prompt: Vec<u32> = text.validation.iter().take(PROMPT).map(|&byte| byte.into()).collect();
    let config = SamplerConfig { temperature: options.temperature, seed: training.settings.seed, ..Default::default() };
    let written = sample::continuation(&training.model, &prompt, options.sample, config);
    let written = written.map_err(|error| format!("sampling: {error}"))?;
    println!("--- {} ---\n{}|{}\n---", training.settings.mechanism, sample::text(&prompt), sample::text(&written));
    sample::check_steps(&training.model, &prompt, training.device())?;
    println!("{} greedy steps from the cache choose what one pass over all bytes chooses", sample::CHECKED);
    Ok(())
}

fn print_summary(reports: &[Report]) {
    let header = ["mechanism", "parameters", "first bits per byte", "last", "ratio", "seconds", "tokens/s"];
    let mut table = table(&header, 1);
    for Report { settings, parameters, curve, bytes_per_second } in reports {
        let (Some(first), Some(last)) = (curve.first(), curve.last()) else { continue };
        table.add_row([
            settings.mechanism.clone(),
            parameters.to_string(),
            format!("{:.3}", first.bits_per_byte),
            format!("{:.3}", last.bits_per_byte),
            format!("{:.2}", last.bits_per_byte / first.bits_per_byte),
            format!("{:.1}", last.seconds),
            format!("{bytes_per_second:.0}"),
        ]);
    }
    println!("\n{table}");
}

fn draw(reports: &[Report]) -> Result<String, String> {
    let points = |curve: &[Point]| curve.iter().map(|point| (point.step as f64, point.bits_per_byte.into())).collect();
    let series: Vec<_> = reports.iter().map(|r| Series::new(r.settings.mechanism.clone(), points(&r.curve))).collect();
    let Settings { width, context, batch, .. } = &reports[0].settings;
    let title = format!("Validation loss, width {width}, {batch} windows of {context} bytes a step");
    let chart = Chart {
        title: &title,
        x: Axis::linear("step"),
        y: Axis::linear("bits per byte"),
        legend: SeriesLabelPosition::UpperRight,
    };
    chart.draw(&series)
}
