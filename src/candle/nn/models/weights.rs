//! Weights by the names of this crate's layers, out of files that have them by others.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Error, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};

use super::files::Files;
use super::names::{Part, Rule, published};
use crate::candle::nn::mark::foreign_weights;

/// The weights of published files.
#[derive(Clone)]
pub struct Weights {
    pub files: Arc<Files>,
    pub rules: &'static [Rule],
    /// What their paths begin with, but for the head's.
    pub prefix: String,
    /// Takes the tensors as variables, by their published names.
    pub variables: Option<VarMap>,
    /// Published names of what has been asked for.
    used: Arc<Mutex<BTreeSet<String>>>,
    /// The last published tensors of which layers take parts, a matrix and its bias.
    shared: Arc<Mutex<VecDeque<(String, Tensor)>>>,
}

impl Weights {
    /// With one of the prefixes, that under which there is an embedding.
    pub fn new(
        files: Arc<Files>,
        rules: &'static [Rule],
        prefixes: &[&str],
        variables: Option<VarMap>,
    ) -> Result<Self> {
        let mut weights =
            Self { files, rules, prefix: String::new(), variables, used: Arc::default(), shared: Arc::default() };
        let embedding = |prefix: &&&str| weights.files.contains(&format!("{prefix}{}", published(rules, EMBEDDING).0));
        let Some(prefix) = prefixes.iter().find(embedding) else {
            let names = prefixes.iter().map(|prefix| format!("`{prefix}{}`", published(rules, EMBEDDING).0));
            let names: Vec<_> = names.collect();
            candle_core::bail!("no tensor {} among the weights", names.join(" or "))
        };
        weights.prefix = prefix.to_string();
        Ok(weights)
    }

    /// As layers take them.
    pub fn builder<'a>(&self, dtype: DType, device: &Device) -> VarBuilder<'a> {
        foreign_weights(VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone()))
    }

    /// Tensors that no layer has asked for.
    pub fn unused(&self) -> Vec<String> {
        let used = lock(&self.used);
        self.files.names().filter(|name| !used.contains(*name)).map(String::from).collect()
    }

    fn published(&self, name: &str) -> (String, Part) {
        let (theirs, part) = published(self.rules, name);
        if name.starts_with("lm_head.") { (theirs, part) } else { (format!("{}{theirs}", self.prefix), part) }
    }

    /// A published tensor, a variable if there are some.
    fn whole(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        lock(&self.used).insert(name.to_string());
        let read = || self.files.tensor(name, dtype, device);
        let Some(variables) = &self.variables else { return read() };
        let mut variables = lock(variables.data());
        if let Some(variable) = variables.get(name) {
            return Ok(variable.as_tensor().clone());
        }
        let variable = Var::from_tensor(&read()?)?;
        let tensor = variable.as_tensor().clone();
        variables.insert(name.to_string(), variable);
        Ok(tensor)
    }

    /// A published tensor of which several layers take parts: read once.
    fn shared(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut shared = lock(&self.shared);
        if let Some((_, tensor)) = shared.iter().find(|(other, _)| other == name) {
            return Ok(tensor.clone());
        }
        let tensor = self.whole(name, dtype, device)?;
        shared.push_back((name.to_string(), tensor.clone()));
        if shared.len() > 2 {
            shared.pop_front();
        }
        Ok(tensor)
    }
}

const EMBEDDING: &str = "embed_tokens.weight";

impl SimpleBackend for Weights {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            let (theirs, part) = self.published(name);
            let of = if part == Part::Whole { String::new() } else { format!(", as {name}, {part:?} of it") };
            let (got, needs) = (tensor.dims(), shape.dims());
            return Err(Error::msg(format!("tensor `{theirs}` has shape {got:?}, needs {needs:?}{of}")));
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let (theirs, part) = self.published(name);
        if !self.files.contains(&theirs) {
            return Err(Error::msg(format!("no tensor `{theirs}` among the weights")));
        }
        if part == Part::Whole {
            return self.whole(&theirs, dtype, device);
        }
        let fail = |error| Error::msg(format!("tensor `{theirs}`, {part:?} of it: {error}"));
        let view = part.of(&self.shared(&theirs, dtype, device)?).map_err(fail)?;
        // A variable's changes are seen in its views alone.
        if self.variables.is_some() { Ok(view) } else { view.contiguous() }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.files.contains(&self.published(name).0)
    }
}

impl Part {
    /// That part of a tensor, a view of it.
    fn of(self, tensor: &Tensor) -> Result<Tensor> {
        let is_matrix = tensor.rank() == 2;
        let (piece, is_across) = match self {
            Self::Whole => (None, false),
            Self::Across => (None, is_matrix),
            Self::PieceAcross(index, count) => (Some((index, count)), is_matrix),
        };
        let outputs = usize::from(is_across);
        let tensor = match piece {
            None => tensor.clone(),
            Some((index, count)) => {
                let width = tensor.dim(outputs)? / count;
                tensor.narrow(outputs, index * width, width)?
            }
        };
        if is_across { tensor.t() } else { Ok(tensor) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
