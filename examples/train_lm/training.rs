//! One model in training, and what has to be kept to go on later as if nothing had happened.

use std::path::{Path, PathBuf};
use std::time::Instant;

use attn_kernels::nn::{LanguageModel, LanguageModelConfig, Mechanism, cross_entropy, seeded_weights};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarMap;
use clap::Args;
use clap::builder::PossibleValuesParser;
use serde::{Deserialize, Serialize};

use super::text::{Text, Windows};
use crate::common::arguments::positive;
use crate::common::optimizer::{AdamW, learning_rate};

/// All that decides how a training run goes.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct Settings {
    /// Text files and folders [default: sources and documentation of this repository]
    #[arg(long, value_delimiter = ',')]
    pub text: Vec<PathBuf>,
    #[arg(long, value_parser = PossibleValuesParser::new(LanguageModelConfig::NAMES), default_value = "softmax")]
    pub mechanism: String,
    /// Width of the model
    #[arg(long, default_value = "128")]
    pub width: usize,
    /// Blocks; twice as many for gau and flash, whose blocks weigh half as much
    #[arg(long, default_value = "4")]
    pub layers: usize,
    /// Heads of each attention layer; gau and flash have one
    #[arg(long, default_value = "4")]
    pub heads: usize,
    /// Bytes that the model sees at once in training
    #[arg(long, value_parser = positive, default_value = "256")]
    pub context: usize,
    /// Windows of `context` bytes in a step
    #[arg(long, value_parser = positive, default_value = "4")]
    pub batch: usize,
    #[arg(long, value_parser = positive, default_value = "200")]
    pub steps: usize,
    /// Highest learning rate, after a tenth of the steps
    #[arg(long, default_value = "0.003")]
    pub learning_rate: f64,
    /// Steps between validations, each followed by a checkpoint
    #[arg(long, value_parser = positive, default_value = "25")]
    pub evaluate_every: usize,
    /// Windows of `context` bytes in a validation
    #[arg(long, value_parser = positive, default_value = "16")]
    pub evaluate_on: usize,
    /// Steps after which the Performer's random features are drawn anew [default: never]
    #[arg(long, value_parser = positive)]
    pub redraw_every: Option<usize>,
    #[arg(long, default_value = "0")]
    pub seed: u64,
}

impl Settings {
    pub fn load_text(&self) -> std::result::Result<Text, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let own = || ["README.md", "docs", "src", "examples"].map(|name| root.join(name)).to_vec();
        let paths = if self.text.is_empty() { own() } else { self.text.clone() };
        Text::load(&paths, self.context + 1)
    }

    fn model(&self) -> Result<LanguageModelConfig> {
        let name = self.mechanism.as_str();
        // Blocks without a feed-forward part weigh half as much.
        let layers = if matches!(name, "gau" | "flash" | "mamba2" | "mamba" | "s4d" | "lru") {
            2 * self.layers
        } else {
            self.layers
        };
        let mut config = LanguageModelConfig::named(name, 256, self.width, layers, self.heads)?;
        if let Mechanism::Flash { chunk, .. } = &mut config.attention.mechanism {
            // Four chunks in a window, so that the part between chunks learns too.
            *chunk = (self.context / 4).max(1);
        }
        Ok(config)
    }
}

/// A point of the loss curve.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Point {
    pub step: usize,
    /// Of the last batch, nats per byte; none before the first.
    pub training_loss: Option<f32>,
    pub bits_per_byte: f32,
    /// Since the start, training and validation.
    pub seconds: f32,
}

/// What a checkpoint holds beside tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Progress {
    settings: Settings,
    text_fingerprint: u64,
    step: usize,
    curve: Vec<Point>,
}

pub struct Training {
    pub settings: Settings,
    pub model: LanguageModel,
    /// Steps done.
    pub step: usize,
    pub curve: Vec<Point>,
    variables: VarMap,
    optimizer: AdamW,
    validation: Windows,
    device: Device,
    started: Instant,
}

impl Training {
    /// # Errors
    /// A model that cannot be.
    pub fn new(settings: &Settings, text: &Text, device: &Device) -> Result<Self> {
        let variables = VarMap::new();
        let weights = seeded_weights(&variables, settings.seed, DType::F32, device);
        Ok(Self {
            model: LanguageModel::new(&settings.model()?, weights)?,
            optimizer: AdamW::new(&variables),
            validation: Windows::spread(&text.validation, settings.evaluate_on, settings.context, device)?,
            settings: settings.clone(),
            variables,
            step: 0,
            curve: Vec::new(),
            device: device.clone(),
            started: Instant::now(),
        })
    }

    pub fn parameters(&self) -> usize {
        self.variables.all_vars().iter().map(|variable| variable.elem_count()).sum()
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// One step of AdamW on the next batch: the loss before it, in nats per byte.
    pub fn step(&mut self, text: &Text) -> Result<f32> {
        let Settings { batch, context, seed, learning_rate: peak, steps, redraw_every, .. } = self.settings;
        if redraw_every.is_some_and(|every| self.step > 0 && self.step.is_multiple_of(every)) {
            self.model.redraw(seed.wrapping_add(self.step as u64))?;
        }
        let windows = Windows::random(&text.training, batch, context, seed, self.step, &self.device)?;
        let loss = self.loss(&windows)?;
        let gradients = loss.backward()?;
        self.optimizer.step(&gradients, self.step, learning_rate(peak, self.step, steps))?;
        self.step += 1;
        loss.to_scalar()
    }

    /// Adds a point to the curve.
    pub fn evaluate(&mut self, training_loss: Option<f32>) -> Result<Point> {
        let bits_per_byte = self.loss(&self.validation)?.to_scalar::<f32>()? / std::f32::consts::LN_2;
        let seconds = self.started.elapsed().as_secs_f32();
        let point = Point { step: self.step, training_loss, bits_per_byte, seconds };
        self.curve.push(point);
        Ok(point)
    }

    /// Mean over all bytes, in nats.
    fn loss(&self, windows: &Windows) -> Result<Tensor> {
        let logits = self.model.forward(&windows.inputs)?;
        cross_entropy(&logits, &windows.targets)
    }

    /// Writes `config.json` and `model.safetensors`, which are the model, and `optimizer.safetensors` and
    /// `progress.json`, which are the rest. The folder changes as a whole: an interrupted write leaves the old one.
    ///
    /// # Errors
    /// Names what cannot be written.
    pub fn save(&self, folder: &Path, text: &Text) -> std::result::Result<(), String> {
        let new = folder.with_extension("new");
        let write = || -> std::result::Result<(), Box<dyn std::error::Error>> {
            std::fs::create_dir_all(&new)?;
            self.variables.save(new.join("model.safetensors"))?;
            candle_core::safetensors::save(&self.optimizer.tensors(), new.join("optimizer.safetensors"))?;
            let config = serde_json::to_string_pretty(self.model.config())?;
            std::fs::write(new.join("config.json"), config)?;
            let (settings, curve) = (self.settings.clone(), self.curve.clone());
            let progress = Progress { settings, text_fingerprint: text.fingerprint(), step: self.step, curve };
            std::fs::write(new.join("progress.json"), serde_json::to_string_pretty(&progress)?)?;
            if folder.exists() {
                std::fs::remove_dir_all(folder)?;
            }
            Ok(std::fs::rename(&new, folder)?)
        };
        write().map_err(|error| format!("cannot write the checkpoint {}: {error}", folder.display()))
    }

    /// Goes on where [`Self::save`] left off.
    ///
    /// # Errors
    /// Names what cannot be read or does not fit; a text that has changed.
    pub fn load(folder: &Path, device: &Device) -> std::result::Result<(Self, Text), String> {
        let path = folder.join("progress.json");
        let fail = |error: &dyn std::fmt::Display| format!("--resume: {}: {error}", path.display());
        let progress = std::fs::read_to_string(&path).map_err(|error| fail(&error))?;
        let progress: Progress = serde_json::from_str(&progress).map_err(|error| fail(&error))?;
        let text = progress.settings.load_text()?;
        if text.fingerprint() != progress.text_fingerprint {
            return Err(fail(&"the text is not the one that the run began with"));
        }
        let mut training = Self::new(&progress.settings, &text, device).map_err(|error| fail(&error))?;
        (training.step, training.curve) = (progress.step, progress.curve);
        let path = folder.join("model.safetensors");
        let fail = |error: &dyn std::fmt::Display| format!("--resume: {}: {error}", path.display());
        training.variables.load(&path).map_err(|error| fail(&error))?;
        let path = folder.join("optimizer.safetensors");
        let fail = |error: &dyn std::fmt::Display| format!("--resume: {}: {error}", path.display());
        let moments = candle_core::safetensors::load(&path, device).map_err(|error| fail(&error))?;
        training.optimizer.load(moments).map_err(|error| fail(&error))?;
        let before = training.curve.last().map_or(0.0, |point| point.seconds);
        let before = std::time::Duration::try_from_secs_f32(before).unwrap_or_default();
        training.started = Instant::now().checked_sub(before).unwrap_or_else(Instant::now);
        Ok((training, text))
    }
}
