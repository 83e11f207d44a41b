//! Sentence embeddings of a BERT checkpoint on this crate's attention.
//!
//! ```sh
//! cargo run --release --example embed -- --model FOLDER
//! cargo run --release --example embed -- --model FOLDER --sentences mine.txt --mechanism performer,linear,diag
//! cargo run --release --example embed -- --model FOLDER --bench
//! ```
//!
//! FOLDER has config.json, model.safetensors and tokenizer.json, as sentence-embedding models of the BERT family are
//! published (all-MiniLM-L6-v2, bge, e5 …). All sentences go through the model as one padded batch and are averaged over
//! their tokens. Other mechanisms than softmax take its place in every layer without training: the second table says how
//! far that moves the embeddings. With `--bench` it prints sentences per second, tokens at hand; `benches/peers/sentences.py`
//! runs PyTorch in turn with it.

mod common;
mod embed {
    pub mod attention;
    pub mod bench;
    pub mod bert;
    pub mod tokens;
}

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use candle_core::{Device, Result, Tensor};
use clap::Parser;
use common::Mechanism;
use common::arguments::{self, positive};
use common::candle_device;
use common::device::DeviceKind;
use common::table::table;
use embed::attention::Attention;
use embed::bench;
use embed::bert::{Bert, Config, mean_pool};
use embed::tokens::{Batch, tokenize};

/// Tensors are large: the system's allocator maps and clears their memory anew each time, this one keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SENTENCES: &str = include_str!("embed/sentences.txt");

/// Sentence embeddings of a BERT checkpoint, their similarities, and how far another attention moves them.
#[derive(Parser)]
struct Options {
    /// Folder with config.json, model.safetensors and tokenizer.json
    #[arg(long)]
    model: PathBuf,
    /// Text file, a sentence per line [default: ten sentences]
    #[arg(long)]
    sentences: Option<PathBuf>,
    /// Mechanisms to put in the place of softmax, or `softmax` for none
    #[arg(long, value_enum, value_delimiter = ',', default_value = "softmax")]
    mechanism: Vec<Mechanism>,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Times the passes of so many seconds instead [without a number: 3]
    #[arg(long, value_parser = positive, num_args = 0..=1, default_missing_value = "3")]
    bench: Option<usize>,
    /// Safetensors file for the embeddings, a tensor [sentences, width] per mechanism
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    arguments::status(run(&Options::parse()))
}

fn run(options: &Options) -> std::result::Result<(), String> {
    let device = candle_device::open(options.device)?;
    let sentences = sentences(options.sentences.as_deref())?;
    let config = Config::load(&options.model.join("config.json"))?;
    let tokens = options.model.join("tokenizer.json");
    let batch = tokenize(&tokens, &sentences, config.max_position_embeddings, &device)?;
    let bert = Bert::load(&options.model.join("model.safetensors"), &config, &device)?;
    let embed = |mechanism| embeddings(&bert, &config, &batch, mechanism, &device);
    if let Some(seconds) = options.bench {
        let time = |&mechanism| bench::run(mechanism, &batch, Duration::from_secs(seconds as u64), || embed(mechanism));
        return options.mechanism.iter().try_for_each(time);
    }

    let softmax = embed(Mechanism::Softmax)?;
    print_similarities(&sentences, &batch, &softmax).map_err(|error| error.to_string())?;
    let mut all = HashMap::from([(Mechanism::Softmax.name(), softmax.clone())]);
    let mut moved = Vec::new();
    for &mechanism in options.mechanism.iter().filter(|&&mechanism| mechanism != Mechanism::Softmax) {
        let other = embed(mechanism)?;
        moved.push((mechanism, Moved::between(&softmax, &other).map_err(|error| error.to_string())?));
        all.insert(mechanism.name(), other);
    }
    if !moved.is_empty() {
        print_moved(&moved);
    }
    if let Some(path) = &options.out {
        candle_core::safetensors::save(&all, path).map_err(|e| format!("--out {}: {e}", path.display()))?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

/// The lines of a file that are not empty.
fn sentences(path: Option<&Path>) -> std::result::Result<Vec<String>, String> {
    let (name, text) = match path {
        None => ("embed/sentences.txt".into(), Ok(SENTENCES.into())),
        Some(path) => (path.display().to_string(), std::fs::read_to_string(path)),
    };
    let text = text.map_err(|error| format!("--sentences: cannot read {name}: {error}"))?;
    let sentences: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect();
    if sentences.is_empty() {
        return Err(format!("--sentences {name}: has no sentence, needs at least one line"));
    }
    Ok(sentences)
}

/// Embeddings of length 1, `[sentences, width]`.
fn embeddings(
    bert: &Bert,
    config: &Config,
    batch: &Batch,
    mechanism: Mechanism,
    device: &Device,
) -> std::result::Result<Tensor, String> {
    let attention = Attention::new(mechanism, config.hidden_size / config.num_attention_heads, device)?;
    let hidden = bert.forward(&batch.ids, &batch.key_mask, &attention);
    let pooled = hidden.and_then(|hidden| mean_pool(&hidden, &batch.key_mask));
    pooled.map_err(|error| format!("{}: {error}", mechanism.name()))
}

/// Cosines between all pairs of rows of length 1.
fn similarities(a: &Tensor, b: &Tensor) -> Result<Vec<Vec<f32>>> {
    a.matmul(&b.t()?)?.to_vec2()
}

fn print_similarities(sentences: &[String], batch: &Batch, embeddings: &Tensor) -> Result<()> {
    let similarities = similarities(embeddings, embeddings)?;
    let numbers: Vec<_> = (1..=sentences.len()).map(|number| number.to_string()).collect();
    let header: Vec<_> = ["sentence", "tokens"].into_iter().chain(numbers.iter().map(String::as_str)).collect();
    let mut table = table(&header, 1);
    for (i, sentence) in sentences.iter().enumerate() {
        let short: String = sentence.chars().take(40).collect();
        let mut row = vec![format!("{} {short}", i + 1), batch.lengths[i].to_string()];
        row.extend(similarities[i].iter().map(|similarity| format!("{similarity:.2}")));
        table.add_row(row);
    }
    println!("Cosine similarity of sentence embeddings, softmax attention\n{table}");
    Ok(())
}

/// How far embeddings move when softmax makes way for another mechanism.
struct Moved {
    /// Cosine of each sentence's embedding with what it was.
    cosines: Vec<f32>,
    /// Mean absolute change of the similarities between different sentences.
    similarity_change: f32,
    /// Sentences whose most similar other sentence stays the same.
    same_nearest: usize,
}

impl Moved {
    fn between(before: &Tensor, after: &Tensor) -> Result<Self> {
        let count = before.dim(0)?;
        let cosines = similarities(before, after)?.iter().enumerate().map(|(i, row)| row[i]).collect();
        let (before, after) = (similarities(before, before)?, similarities(after, after)?);
        let others = |i| (0..count).filter(move |&j| j != i);
        let pairs = (0..count).flat_map(|i| others(i).map(move |j| (i, j)));
        let change: f32 = pairs.map(|(i, j)| (before[i][j] - after[i][j]).abs()).sum();
        let nearest = |rows: &[Vec<f32>], i: usize| others(i).max_by(|&a, &b| rows[i][a].total_cmp(&rows[i][b]));
        Ok(Self {
            cosines,
            similarity_change: change / (count * (count - 1)).max(1) as f32,
            same_nearest: (0..count).filter(|&i| nearest(&before, i) == nearest(&after, i)).count(),
        })
    }
}

fn print_moved(moved: &[(Mechanism, Moved)]) {
    let header = ["mechanism", "mean cosine with softmax", "smallest", "mean change of similarity", "same nearest"];
    let mut table = table(&header, 1);
    for (mechanism, Moved { cosines, similarity_change, same_nearest }) in moved {
        let mean = cosines.iter().sum::<f32>() / cosines.len() as f32;
        let smallest = cosines.iter().copied().fold(f32::INFINITY, f32::min);
        table.add_row([
            mechanism.name().to_string(),
            format!("{mean:.4}"),
            format!("{smallest:.4}"),
            format!("{similarity_change:.4}"),
            format!("{same_nearest} of {}", cosines.len()),
        ]);
    }
    println!("In the place of softmax in every layer, without training\n{table}");
}
