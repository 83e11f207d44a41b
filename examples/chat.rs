//! A published language model goes on from a text.
//!
//! ```sh
//! cargo run --release --example chat -- --model FOLDER --prompt "The capital of France is"
//! cargo run --release --example chat -- --model FOLDER --prompt "…" --temperature 0.7 --top-p 0.9 --dtype bf16
//! cargo run --release --example chat -- --tokens 64 --context 4096
//! ```
//!
//! FOLDER has config.json, model.safetensors (or several of them with their index) and tokenizer.json, as models of the
//! architectures in `attn_kernels::nn::models` are published. Without one it is a LLaMA of 100 million random weights whose
//! tokens are bytes: it writes nonsense, and tells how fast. Text is printed as it comes; then tokens/s of prompt and
//! continuation, and bytes of weights that were read a second beside the rate of a copy. `--mechanism` and `--window` put other
//! attention in the place of softmax: that is another model, which would have to be trained.

mod common;
mod chat {
    pub mod model;
    pub mod text;
}

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use attn_kernels::nn::{Mechanism, Sampler, SamplerConfig};
use candle_core::{DType, Result};
use chat::model::Model;
use chat::text::Text;
use clap::builder::PossibleValuesParser;
use clap::{Parser, ValueEnum};
use common::arguments::{self, positive};
use common::device::DeviceKind;
use common::measure::median;
use common::table::table;
use common::{candle_device, rates};

/// Tensors are large: the system's allocator maps and clears their memory anew each time, this one keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A published language model goes on from a text.
#[derive(Parser)]
struct Options {
    /// Folder with config.json, model.safetensors and tokenizer.json [default: random weights]
    #[arg(long)]
    model: Option<PathBuf>,
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// Repeats the prompt until it has so many tokens
    #[arg(long, value_parser = positive)]
    context: Option<usize>,
    /// Tokens to write at most
    #[arg(long, value_parser = positive, default_value = "100")]
    tokens: usize,
    /// 0 takes the most likely token
    #[arg(long, default_value = "0")]
    temperature: f64,
    #[arg(long)]
    top_p: Option<f64>,
    #[arg(long, default_value = "0")]
    seed: u64,
    /// Dtype of weights, rows and caches
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Another mechanism in the place of softmax, in every block that has it
    #[arg(long, value_parser = PossibleValuesParser::new(["linear", "performer", "norm", "diag", "retention"]))]
    mechanism: Option<String>,
    /// Tokens that softmax sees at most, in every block that has it
    #[arg(long, value_parser = positive, conflicts_with = "mechanism")]
    window: Option<usize>,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::BF16,
        }
    }
}

/// What a run took.
struct Times {
    prompt: Duration,
    prompt_tokens: usize,
    /// Seconds of each token behind the first.
    tokens_s: Vec<f64>,
    cache_bytes: usize,
}

fn main() -> ExitCode {
    arguments::status(run(&Options::parse()))
}

fn run(options: &Options) -> std::result::Result<(), String> {
    let device = candle_device::open(options.device)?;
    let sampler = SamplerConfig {
        temperature: options.temperature,
        top_p: options.top_p,
        seed: options.seed,
        ..Default::default()
    };
    let sampler = Sampler::new(sampler).map_err(|error| error.to_string())?;
    let swap = match (&options.mechanism, options.window) {
        (Some(name), _) => Some(ungated(Mechanism::named(name).map_err(|error| error.to_string())?)),
        (None, Some(window)) => Some(Mechanism::Softmax { window: Some(window), soft_cap: None }),
        (None, None) => None,
    };
    if swap.is_some() {
        eprintln!("warning: with other attention these weights are another model, which has not been trained");
    }
    let text = Text::open(options.model.as_deref())?;
    let started = Instant::now();
    let model = Model::open(options.model.as_deref(), swap.as_ref(), options.dtype.into(), &device)
        .map_err(|error| error.to_string())?;
    let loaded = started.elapsed();
    let mut prompt = text.tokens(&options.prompt)?;
    if let Some(context) = options.context {
        prompt = prompt.iter().copied().cycle().take(context).collect();
    }
    let times = write(options, &model, &text, &prompt, sampler).map_err(|error| error.to_string())?;
    print(&model, loaded, &times);
    Ok(())
}

/// Without a gate, for which a model of softmax has no weights.
fn ungated(mechanism: Mechanism) -> Mechanism {
    match mechanism {
        Mechanism::Retention { log_decay, epsilon, .. } => Mechanism::Retention { log_decay, gate: false, epsilon },
        other => other,
    }
}

/// Prints the continuation as it comes.
fn write(options: &Options, model: &Model, text: &Text, prompt: &[u32], sampler: Sampler) -> Result<Times> {
    let mut cache = model.language_model.cache()?;
    print!("{}", if options.context.is_some() { "…" } else { &options.prompt });
    let (mut written, mut tokens_s) = (text.writer(), Vec::new());
    let mut started = Instant::now();
    let mut taken = || std::mem::replace(&mut started, Instant::now()).elapsed();
    let mut tokens = model.language_model.generate(prompt, sampler, &mut cache)?.until(&model.ends);
    let mut prompt_time = Duration::ZERO;
    for index in 0..options.tokens {
        let Some(token) = tokens.next() else { break };
        let (token, time) = (token?, taken());
        match index {
            0 => prompt_time = time,
            _ => tokens_s.push(time.as_secs_f64()),
        }
        print!("{}", written(token));
        // A closed pipe is no reason to fail.
        let _ = std::io::stdout().flush();
    }
    println!();
    drop(tokens);
    Ok(Times { prompt: prompt_time, prompt_tokens: prompt.len(), tokens_s, cache_bytes: cache.bytes() })
}

fn print(model: &Model, loaded: Duration, times: &Times) {
    let Times { prompt, prompt_tokens, tokens_s, cache_bytes } = times;
    let megabytes = |bytes: usize| format!("{:.0} MB", bytes as f64 / 1e6);
    let mut rows = table(&["", ""], 1);
    rows.add_row(["weights".into(), format!("{}, read in {:.2} s", megabytes(model.bytes), loaded.as_secs_f64())]);
    let rate = *prompt_tokens as f64 / prompt.as_secs_f64();
    rows.add_row(["prompt".into(), format!("{prompt_tokens} tokens, {rate:.1} tokens/s")]);
    if !tokens_s.is_empty() {
        let mut sorted = tokens_s.clone();
        sorted.sort_by(f64::total_cmp);
        let token = median(&sorted);
        rows.add_row(["a token".into(), format!("{:.2} ms, {:.1} tokens/s", token * 1e3, 1.0 / token)]);
        // A copy reads half of the bytes that it moves.
        let (read, copied) = (model.read_bytes as f64 / token, rates::copy(2 * model.read_bytes) / 2.0);
        let share = format!("{:.1} GB/s of weights; a copy reads {:.1} GB/s", read / 1e9, copied / 1e9);
        rows.add_row(["memory".into(), share]);
    }
    rows.add_row(["cache".into(), megabytes(*cache_bytes)]);
    println!("{rows}");
}
