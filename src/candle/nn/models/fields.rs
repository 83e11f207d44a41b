//! The fields of a published `config.json`.

use candle_core::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Fields that change nothing of what a model computes: how it is trained or made, what writes it, which tokens a program
/// that uses it treats as special. Dropout is not applied.
const IDLE: [&str; 43] = [
    "_name_or_path",
    "_attn_implementation_autoset",
    "_num_labels",
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "bos_token_id",
    "cache_implementation",
    "classifier_dropout",
    "cls_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "label2id",
    "language",
    "mask_token_id",
    "max_length",
    "model_type",
    "n_ctx",
    "name",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "vocab_file",
];

/// Fields that have not been read yet.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
    /// Of what they are, for errors.
    what: String,
}

impl Fields {
    pub fn parse(text: &str) -> Result<Self> {
        let map: Map<String, Value> = serde_json::from_str(text).map_err(Error::wrap)?;
        let what = match map.get("model_type") {
            Some(Value::String(kind)) => kind.clone(),
            _ => candle_core::bail!("no field `model_type` says which architecture it is"),
        };
        Ok(Self { map, what })
    }

    /// What `model_type` says.
    pub fn model_type(&self) -> &str {
        &self.what
    }

    /// A field; none where it is missing or null.
    pub fn optional<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        self.unless_missing(name, None)
    }

    /// A field that has a usual value where it is missing; none where it is null.
    pub fn unless_missing<T: DeserializeOwned>(&mut self, name: &str, usual: Option<T>) -> Result<Option<T>> {
        match self.map.remove(name) {
            None => Ok(usual),
            Some(Value::Null) => Ok(None),
            Some(value) => {
                let shown = value.to_string();
                let fail = |error| Error::msg(format!("field `{name}` of {} is {shown}: {error}", self.what));
                serde_json::from_value(value).map(Some).map_err(fail)
            }
        }
    }

    pub fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let value = self.optional(name)?;
        value.ok_or_else(|| Error::msg(format!("field `{name}` of {} is missing", self.what)))
    }

    pub fn or<T: DeserializeOwned>(&mut self, name: &str, default: T) -> Result<T> {
        Ok(self.optional(name)?.unwrap_or(default))
    }

    /// The fields in a field.
    pub fn nested(&mut self, name: &str) -> Result<Option<Self>> {
        let map: Option<Map<String, Value>> = self.optional(name)?;
        Ok(map.map(|map| Self { map, what: format!("`{name}` of {}", self.what) }))
    }

    /// Refuses a field that says something else.
    pub fn only<T: DeserializeOwned + PartialEq + std::fmt::Debug>(&mut self, name: &str, allowed: &[T]) -> Result<()> {
        match self.optional::<T>(name)? {
            Some(value) if !allowed.contains(&value) => {
                Err(Error::msg(format!("field `{name}` of {} is {value:?}: supported is {allowed:?}", self.what)))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what is left, but for fields that change nothing.
    pub fn finish(self, idle: &[&str]) -> Result<()> {
        let is_idle = |name: &&String| IDLE.contains(&name.as_str()) || idle.contains(&name.as_str());
        let left = self.map.iter().filter(|(name, value)| !is_idle(name) && !value.is_null());
        let left: Vec<_> = left.map(|(name, value)| format!("`{name}` = {value}")).collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(Error::msg(format!("{} is not supported in a configuration of {}", left.join(", "), self.what)))
    }
}
