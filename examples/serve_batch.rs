//! Many prompts through one running batch, against the same prompts one by one.
//!
//! ```sh
//! cargo run --release --example serve_batch
//! cargo run --release --example serve_batch -- --prompts my_prompts.txt --model target/train_lm/retention
//! cargo run --release --example serve_batch -- --mechanism softmax --at-once 32 --tokens 200 --temperature 0.7
//! ```
//!
//! Every line of the file is a prompt of a byte-level model: one that `train_lm` has written, or by default one with random
//! weights. At most `--at-once` sequences run at a time; where one ends, the next prompt joins while the others go on. Both
//! ways take turns, are timed, and must write the same bytes. Prints tokens/s and writes `serve_batch.json` to `--out`.

mod common;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use attn_kernels::nn::{
    LanguageModel, LanguageModelConfig, Request, RunningBatch, Sampler, SamplerConfig, seeded_weights,
};
use candle_core::{DType, Device, Result};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use clap::builder::PossibleValuesParser;
use common::arguments::{self, positive};
use common::candle_device;
use common::device::DeviceKind;
use common::files::Output;
use common::measure::median;
use common::table::table;
use serde::Serialize;

/// Tensors are large: the system's allocator maps and clears their memory anew each time, this one keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Continues many prompts at once.
#[derive(Parser)]
struct Options {
    /// File with a prompt in every line [default: 64 beginnings of this repository's README, of 1 to 500 bytes]
    #[arg(long)]
    prompts: Option<PathBuf>,
    /// Folder of a model of train_lm [default: random weights]
    #[arg(long)]
    model: Option<PathBuf>,
    #[arg(
        long, value_parser = PossibleValuesParser::new(LanguageModelConfig::NAMES), default_value = "retention",
        conflicts_with = "model"
    )]
    mechanism: String,
    #[arg(long, value_parser = positive, default_value = "256", conflicts_with = "model")]
    width: usize,
    #[arg(long, value_parser = positive, default_value = "4", conflicts_with = "model")]
    layers: usize,
    #[arg(long, value_parser = positive, default_value = "4", conflicts_with = "model")]
    heads: usize,
    /// Sequences that run at a time
    #[arg(long, value_parser = positive, default_value = "16")]
    at_once: usize,
    /// Bytes to write after each prompt
    #[arg(long, value_parser = positive, default_value = "64")]
    tokens: usize,
    /// Temperature of what is written; 0 takes the most likely byte
    #[arg(long, default_value = "0")]
    temperature: f64,
    /// Prompt i draws from seed + i
    #[arg(long, default_value = "0")]
    seed: u64,
    /// How often both ways are timed
    #[arg(long, value_parser = positive, default_value = "3")]
    samples: usize,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Directory for the JSON
    #[arg(long, default_value = "target/serve_batch")]
    out: PathBuf,
}

/// What is written.
#[derive(Serialize)]
struct Report {
    mechanism: String,
    prompts: usize,
    prompt_tokens: usize,
    written_tokens: usize,
    at_once: usize,
    one_by_one_tokens_per_s: f64,
    batch_tokens_per_s: f64,
    written: Vec<String>,
}

fn main() -> ExitCode {
    arguments::status(run(&Options::parse()))
}

fn run(options: &Options) -> std::result::Result<(), String> {
    let device = candle_device::open(options.device)?;
    let prompts = prompts(options.prompts.as_deref())?;
    let model = model(options, &device)?;
    let json = Output::create(&options.out, "serve_batch.json")?;
    let (mut alone_s, mut batch_s, mut written) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.samples {
        let fail = |error: candle_core::Error| error.to_string();
        let (alone, seconds) = timed(|| one_by_one(options, &model, &prompts)).map_err(fail)?;
        alone_s.push(seconds);
        let (batch, seconds) = timed(|| in_a_batch(options, &model, &prompts)).map_err(fail)?;
        batch_s.push(seconds);
        if let Some(at) = alone.iter().zip(&batch).position(|(alone, batch)| alone != batch) {
            return Err(format!("prompt {at} gives another text in the batch than alone"));
        }
        written = batch;
    }
    alone_s.sort_by(f64::total_cmp);
    batch_s.sort_by(f64::total_cmp);
    let count: usize = written.iter().map(Vec::len).sum();
    let rate = |seconds: &[f64]| count as f64 / median(seconds);
    let report = Report {
        mechanism: model.config().attention.mechanism.name().into(),
        prompts: prompts.len(),
        prompt_tokens: prompts.iter().map(Vec::len).sum(),
        written_tokens: count,
        at_once: options.at_once,
        one_by_one_tokens_per_s: rate(&alone_s),
        batch_tokens_per_s: rate(&batch_s),
        written: written.iter().map(|bytes| text(bytes)).collect(),
    };
    print(&report, [median(&alone_s), median(&batch_s)]);
    json.write(&serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?)
}

/// The bytes of every prompt.
fn prompts(file: Option<&Path>) -> std::result::Result<Vec<Vec<u32>>, String> {
    let bytes = |text: &[u8]| text.iter().map(|&byte| byte.into()).collect::<Vec<u32>>();
    let Some(file) = file else {
        let readme = include_bytes!("../README.md");
        return Ok((0..64).map(|i| bytes(&readme[..1 + 499 * i / 63])).collect());
    };
    let fail = |what: String| format!("--prompts {}: {what}", file.display());
    let read = std::fs::read(file).map_err(|error| fail(error.to_string()))?;
    let prompts: Vec<_> = read.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(bytes).collect();
    if prompts.is_empty() { Err(fail("has no line, needs a prompt at least".into())) } else { Ok(prompts) }
}

fn model(options: &Options, device: &Device) -> std::result::Result<LanguageModel, String> {
    let Some(folder) = &options.model else {
        let Options { mechanism, width, layers, heads, .. } = options;
        let random = || {
            let config = LanguageModelConfig::named(mechanism, 256, *width, *layers, *heads)?;
            LanguageModel::new(&config, seeded_weights(&VarMap::new(), 0, DType::F32, device))
        };
        return random().map_err(|error| error.to_string());
    };
    let fail = |name: &str, error: &dyn std::fmt::Display| format!("--model: {}: {error}", folder.join(name).display());
    let config = std::fs::read_to_string(folder.join("config.json")).map_err(|error| fail("config.json", &error))?;
    let config: LanguageModelConfig = serde_json::from_str(&config).map_err(|error| fail("config.json", &error))?;
    let name = "model.safetensors";
    let tensors = candle_core::safetensors::load(folder.join(name), device).map_err(|error| fail(name, &error))?;
    LanguageModel::new(&config, VarBuilder::from_tensors(tensors, DType::F32, device))
        .map_err(|error| fail(name, &error))
}

fn sampler(options: &Options, prompt: usize) -> Result<Sampler> {
    let seed = options.seed.wrapping_add(prompt as u64);
    Sampler::new(SamplerConfig { temperature: options.temperature, seed, ..Default::default() })
}

fn one_by_one(options: &Options, model: &LanguageModel, prompts: &[Vec<u32>]) -> Result<Vec<Vec<u32>>> {
    let continued = prompts.iter().enumerate().map(|(index, prompt)| {
        let mut cache = model.cache()?;
        model.generate(prompt, sampler(options, index)?, &mut cache)?.take(options.tokens).collect()
    });
    continued.collect()
}

fn in_a_batch(options: &Options, model: &LanguageModel, prompts: &[Vec<u32>]) -> Result<Vec<Vec<u32>>> {
    let mut batch = RunningBatch::new(model);
    let mut waiting = prompts.iter().enumerate();
    let mut written = vec![Vec::new(); prompts.len()];
    loop {
        // Numbers of the batch are those of the prompts, which come in their order.
        for (index, prompt) in waiting.by_ref().take(options.at_once - batch.len()) {
            batch.add(Request { limit: Some(options.tokens), ..Request::new(prompt, sampler(options, index)?) })?;
        }
        if batch.is_empty() {
            return Ok(written);
        }
        for (index, token) in batch.step()? {
            written[index].push(token?);
        }
    }
}

fn timed<R>(work: impl FnOnce() -> Result<R>) -> Result<(R, f64)> {
    let started = Instant::now();
    work().map(|result| (result, started.elapsed().as_secs_f64()))
}

fn print(report: &Report, seconds: [f64; 2]) {
    let Report { mechanism, prompts, prompt_tokens, written_tokens, at_once, .. } = report;
    println!("{mechanism}: {prompts} prompts of {prompt_tokens} tokens, {written_tokens} written after them");
    let mut table = table(&["sequences at a time", "seconds", "tokens/s written", "times as fast"], 1);
    for (count, seconds) in [1, *at_once].into_iter().zip(seconds) {
        let rate = *written_tokens as f64 / seconds;
        let times = rate / report.one_by_one_tokens_per_s;
        table.add_row([count.to_string(), format!("{seconds:.2}"), format!("{rate:.0}"), format!("{times:.2}")]);
    }
    println!("{table}\nBoth write the same bytes.");
}

fn text(bytes: &[u32]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|&byte| byte as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
