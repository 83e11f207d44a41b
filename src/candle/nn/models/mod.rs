//! Published models, from the folders in which they are published: `config.json` and safetensors, by their own names.
//!
//! ```no_run
//! use attn_kernels::nn::models::Published;
//! use attn_kernels::nn::{Sampler, SamplerConfig};
//! use candle_core::{DType, Device};
//!
//! let model = Published::open("models/Qwen3-0.6B")?.language_model(DType::F32, &Device::Cpu)?;
//! let mut cache = model.cache()?;
//! let tokens = model.generate(&[151644, 872], Sampler::new(SamplerConfig::default())?, &mut cache)?;
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! | `model_type` | architecture |
//! | --- | --- |
//! | `llama` | LLaMA 2 and 3, with its rotary scalings |
//! | `mistral` | a window in every layer |
//! | `qwen2`, `qwen3` | biases of q, k, v; norms of the heads of q and k |
//! | `gemma2` | norms around the parts, soft caps, windows in every other layer |
//! | `gpt2` | layer norm, learned positions |
//! | `bert` | an [`Encoder`], as sentence embedders have it |
//!
//! An architecture is a function from the fields of `config.json` to a [`LanguageModelConfig`], and a table of what its
//! weights are called. A field that is not supported and a tensor that no layer takes are errors that name them.

mod bert;
mod fields;
mod files;
mod gpt2;
mod llama;
mod names;
mod rotary;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Error, Result};
use candle_nn::{VarBuilder, VarMap};

use self::fields::Fields;
use self::files::Files;
use self::names::Rule;
use self::weights::Weights;
use super::{Encoder, EncoderConfig, LanguageModel, LanguageModelConfig};

/// How an architecture is published.
struct Architecture {
    /// As `config.json` says it.
    model_type: &'static str,
    /// What the paths of its weights may begin with, but for the head's.
    prefixes: &'static [&'static str],
    /// Fields of `config.json` that change nothing here.
    idle: &'static [&'static str],
    /// What it calls weights, where that is not our name.
    rules: &'static [Rule],
    /// Ends of names of tensors that are no weights.
    buffers: &'static [&'static str],
    read: Read,
}

/// What `config.json` describes.
enum Read {
    LanguageModel(fn(&mut Fields) -> Result<LanguageModelConfig>),
    Encoder(fn(&mut Fields) -> Result<(LanguageModelConfig, EncoderConfig)>),
}

const fn like_llama(model_type: &'static str, read: fn(&mut Fields) -> Result<LanguageModelConfig>) -> Architecture {
    Architecture {
        model_type,
        prefixes: &["model.", ""],
        idle: &["is_llama_config"],
        rules: &[],
        buffers: &["rotary_emb.inv_freq"],
        read: Read::LanguageModel(read),
    }
}

const ARCHITECTURES: &[Architecture] = &[
    like_llama("llama", llama::llama),
    like_llama("mistral", llama::mistral),
    like_llama("qwen2", llama::qwen2),
    like_llama("qwen3", llama::qwen3),
    like_llama("gemma2", llama::gemma2),
    Architecture {
        model_type: "gpt2",
        prefixes: &["transformer.", ""],
        idle: &[
            "reorder_and_upcast_attn",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        ],
        rules: gpt2::RULES,
        buffers: &["attn.bias", "attn.masked_bias"],
        read: Read::LanguageModel(gpt2::gpt2),
    },
    Architecture {
        model_type: "bert",
        prefixes: &["bert.", ""],
        idle: &["tie_word_embeddings"],
        rules: bert::RULES,
        buffers: &["embeddings.position_ids"],
        read: Read::Encoder(bert::bert),
    },
];

/// A published model in a folder: its configuration has been read, its weights have not.
pub struct Published {
    folder: PathBuf,
    architecture: &'static Architecture,
    config: LanguageModelConfig,
    /// Whether it is another one than that of the folder.
    is_changed: bool,
    encoder: Option<EncoderConfig>,
    ends: Vec<u32>,
    files: Arc<Files>,
}

impl Published {
    /// The model in a folder with `config.json` and `model.safetensors`, or several files and their index.
    ///
    /// # Errors
    /// Files that cannot be read, are cut short or are no safetensors; an architecture that is not supported, a field of the
    /// configuration that is not supported. The error names the file or the field.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref().to_path_buf();
        let path = folder.join("config.json");
        let fail = |error: &dyn std::fmt::Display| Error::msg(format!("{}: {error}", path.display()));
        let text = std::fs::read_to_string(&path).map_err(|error| fail(&error))?;
        let (architecture, config, encoder) = described(&text).map_err(|error| fail(&error))?;
        // The second is not always there.
        let generation = std::fs::read_to_string(folder.join("generation_config.json")).unwrap_or_default();
        let ends = [generation, text].iter().map(|text| end_tokens(text)).find(|ends| !ends.is_empty());
        let files = Arc::new(Files::open(&folder)?);
        let ends = ends.unwrap_or_default();
        Ok(Self { folder, architecture, config, is_changed: false, encoder, ends, files })
    }

    /// The architecture, as `config.json` names it.
    pub fn model_type(&self) -> &'static str {
        self.architecture.model_type
    }

    /// The configuration of the blocks.
    pub fn config(&self) -> &LanguageModelConfig {
        &self.config
    }

    /// Tokens that end a text, as `config.json` or `generation_config.json` names them.
    pub fn end_tokens(&self) -> &[u32] {
        &self.ends
    }

    /// Numbers in all weights.
    pub fn elements(&self) -> usize {
        self.files.elements()
    }

    /// The same weights in a model of another configuration, with other mechanisms for example: that is another model, which
    /// needs training.
    pub fn with_config(self, config: LanguageModelConfig) -> Self {
        Self { is_changed: config != self.config, config, ..self }
    }

    /// The language model, its weights in a dtype.
    ///
    /// # Errors
    /// An encoder; weights that are missing, of another shape, or that no layer takes; files that cannot be read. The error
    /// names the tensors.
    pub fn language_model(&self, dtype: DType, device: &Device) -> Result<LanguageModel> {
        self.build(None, dtype, device, |weights| self.as_language_model(weights))
    }

    /// The language model, its weights variables in `variables`, by their published names: those that are there already are
    /// taken from there.
    ///
    /// # Errors
    /// As [`Self::language_model`].
    pub fn trainable_language_model(&self, variables: &VarMap, dtype: DType, device: &Device) -> Result<LanguageModel> {
        self.build(Some(variables), dtype, device, |weights| self.as_language_model(weights))
    }

    /// The encoder, its weights in a dtype.
    ///
    /// # Errors
    /// A language model; as [`Self::language_model`].
    pub fn encoder(&self, dtype: DType, device: &Device) -> Result<Encoder> {
        self.build(None, dtype, device, |weights| self.as_encoder(weights))
    }

    /// The encoder, as [`Self::trainable_language_model`].
    ///
    /// # Errors
    /// As [`Self::encoder`].
    pub fn trainable_encoder(&self, variables: &VarMap, dtype: DType, device: &Device) -> Result<Encoder> {
        self.build(Some(variables), dtype, device, |weights| self.as_encoder(weights))
    }

    fn as_language_model(&self, weights: VarBuilder) -> Result<LanguageModel> {
        match self.encoder {
            Some(_) => candle_core::bail!("{} is an encoder: needs `Published::encoder`", self.model_type()),
            None => LanguageModel::new(&self.config, weights),
        }
    }

    fn as_encoder(&self, weights: VarBuilder) -> Result<Encoder> {
        match &self.encoder {
            Some(parts) => {
                // No field says whether there is one.
                let parts = EncoderConfig { pooler: weights.contains_tensor("pooler.weight"), ..parts.clone() };
                Encoder::new(&self.config, &parts, weights)
            }
            None => candle_core::bail!("{} is a language model: needs `Published::language_model`", self.model_type()),
        }
    }

    fn build<M>(
        &self,
        variables: Option<&VarMap>,
        dtype: DType,
        device: &Device,
        model: impl FnOnce(VarBuilder) -> Result<M>,
    ) -> Result<M> {
        let Architecture { prefixes, rules, buffers, .. } = self.architecture;
        let build = || {
            let weights = Weights::new(self.files.clone(), rules, prefixes, variables.cloned())?;
            let model = model(weights.builder(dtype, device))?;
            let unused = weights.unused().into_iter().filter(|name| !buffers.iter().any(|end| name.ends_with(end)));
            let unused: Vec<_> = unused.map(|name| format!("`{name}`")).collect();
            if !unused.is_empty() {
                let kind = self.model_type();
                candle_core::bail!("a {kind} model of this configuration has no part for {}", unused.join(", "));
            }
            Ok(model)
        };
        build().map_err(|error| Error::msg(format!("{}: {error}", self.folder.display())))
    }

    /// Writes the variables of a model of this folder to another one, with `config.json` as it is.
    ///
    /// # Errors
    /// Another configuration than that of the folder, the same folder, what cannot be written.
    pub fn save(&self, variables: &VarMap, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let fail = |error: &dyn std::fmt::Display| Error::msg(format!("{}: {error}", folder.display()));
        if self.is_changed {
            return Err(fail(
                &"is to hold a model of another configuration than `config.json` has: `VarMap::save` stores it",
            ));
        }
        std::fs::create_dir_all(folder).map_err(|error| fail(&error))?;
        let same = |folder: &Path| folder.canonicalize().ok();
        if same(folder) == same(&self.folder) {
            return Err(fail(&"is the folder that the model comes from, needs another one"));
        }
        std::fs::copy(self.folder.join("config.json"), folder.join("config.json")).map_err(|error| fail(&error))?;
        let variables = variables.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let tensors: Vec<_> = variables.iter().map(|(name, variable)| (name, variable.as_tensor())).collect();
        let metadata = [("format".to_string(), "pt".to_string())].into();
        let path = folder.join("model.safetensors");
        safetensors::serialize_to_file(tensors, Some(metadata), &path).map_err(|error| fail(&error))
    }
}

/// Architecture and configuration of a `config.json`.
fn described(text: &str) -> Result<(&'static Architecture, LanguageModelConfig, Option<EncoderConfig>)> {
    let mut fields = Fields::parse(text)?;
    let kind = fields.model_type();
    let Some(architecture) = ARCHITECTURES.iter().find(|architecture| architecture.model_type == kind) else {
        let known: Vec<_> = ARCHITECTURES.iter().map(|architecture| architecture.model_type).collect();
        candle_core::bail!("`model_type` is `{kind}`, supported are {}", known.join(", "))
    };
    let (config, encoder) = match architecture.read {
        Read::LanguageModel(read) => (read(&mut fields)?, None),
        Read::Encoder(read) => read(&mut fields).map(|(config, encoder)| (config, Some(encoder)))?,
    };
    fields.finish(architecture.idle)?;
    config.check()?;
    Ok((architecture, config, encoder))
}

/// `eos_token_id`, a number or several.
fn end_tokens(text: &str) -> Vec<u32> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Tokens {
        One(u32),
        Several(Vec<u32>),
    }
    #[derive(serde::Deserialize)]
    struct Ends {
        eos_token_id: Option<Tokens>,
    }
    match serde_json::from_str(text) {
        Ok(Ends { eos_token_id: Some(Tokens::One(token)) }) => vec![token],
        Ok(Ends { eos_token_id: Some(Tokens::Several(tokens)) }) => tokens,
        _ => Vec::new(),
    }
}
