//! Caches in safetensors files.

use std::collections::HashMap;
use std::path::Path;

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{Error, Result, Tensor};

use super::{Cache, Contents, Recurrence, Rows, kept_rows};
use crate::candle::LinearState;
use crate::candle::nn::mechanism::Mechanism;

const FORMAT: &str = "attn-kernels cache 1";

/// Writes the caches of the layers of a model.
pub fn save(caches: &[Cache], path: &Path) -> Result<()> {
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (index, cache) in caches.iter().enumerate() {
        for (name, tensor) in named(&cache.contents)? {
            tensors.push((format!("layers.{index}.{name}"), tensor.contiguous()?));
        }
    }
    let entries = [
        ("format", FORMAT.to_string()),
        ("layers", signature(caches)?),
        ("positions", json(&caches.iter().map(|cache| cache.position).collect::<Vec<_>>())?),
    ];
    let metadata = HashMap::from(entries.map(|(key, value)| (key.to_string(), value)));
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| at(path, error))
}

/// Replaces the contents of caches by those of a file.
pub fn load(caches: &mut [Cache], path: &Path) -> Result<()> {
    let bytes = std::fs::read(path).map_err(|error| at(path, error))?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|error| at(path, error))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    if metadata.get("format").map(String::as_str) != Some(FORMAT) {
        return Err(at(path, format!("not a file of the format `{FORMAT}`")));
    }
    let (theirs, ours) = (metadata.get("layers").cloned().unwrap_or_default(), signature(caches)?);
    if theirs != ours {
        return Err(at(path, format!("the state of another configuration, {theirs}; the layers here are {ours}")));
    }
    let positions = metadata.get("positions").map_or("[]", String::as_str);
    let positions: Vec<usize> = serde_json::from_str(positions).map_err(|error| at(path, error))?;
    if positions.len() != caches.len() {
        return Err(at(path, format!("{} positions for {} layers", positions.len(), caches.len())));
    }
    let file = BufferedSafetensors::new(bytes).map_err(|error| at(path, error))?;
    let mut loaded = Vec::with_capacity(caches.len());
    for (index, (cache, position)) in caches.iter().zip(positions).enumerate() {
        let mut loading = cache.clone();
        loading.clear();
        let get = |name: &str| -> Result<Option<Tensor>> {
            let name = format!("layers.{index}.{name}");
            let is_there = file.tensors().iter().any(|(other, _)| *other == name);
            is_there.then(|| file.load(&name, &cache.device)).transpose()
        };
        loading.contents = contents(&cache.contents, &get, position)?;
        check_rows(&loading, position).map_err(|error| at(path, error))?;
        loading.position = position;
        loading.batch = named(&loading.contents)?.first().map(|(_, tensor)| tensor.dim(0)).transpose()?;
        loaded.push(loading);
    }
    caches.iter_mut().zip(loaded).for_each(|(cache, loaded)| *cache = loaded);
    Ok(())
}

/// Refuses another number of rows than a cache has after `position` tokens.
fn check_rows(cache: &Cache, position: usize) -> std::result::Result<(), String> {
    let (rows, expected) = match (&cache.contents, &cache.config.mechanism) {
        (Contents::Rows(rows), _) => (rows.len(), kept_rows(&cache.config, position).unwrap_or(position)),
        (Contents::Chunk(rows, _), Mechanism::Flash { chunk, .. }) => (rows.len(), position % chunk),
        _ => return Ok(()),
    };
    if rows == expected { Ok(()) } else { Err(format!("{rows} rows after {position} tokens, not {expected}")) }
}

/// What must agree for a state to be continued.
fn signature(caches: &[Cache]) -> Result<String> {
    let layers: Vec<_> = caches.iter().map(|cache| (&cache.config, cache.dtype.as_str())).collect();
    json(&layers)
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(Error::wrap)
}

fn at(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::msg(format!("{}: {error}", path.display()))
}

const ROWS: [&str; 2] = ["keys", "values"];
/// Names of a state and of the last inputs of up to three short convolutions.
const RECURRENCE: [&str; 4] = ["s", "inputs.0", "inputs.1", "inputs.2"];
const CHUNK: [&str; 3] = ["local_keys", "global_keys", "values"];

fn named(contents: &Contents) -> Result<Vec<(&'static str, Tensor)>> {
    let sums = |state: &Option<LinearState>| {
        let tensors = state.as_ref().map(|state| {
            let stabilizer = state.stabilizer().map(|c| ("stabilizer", c.clone()));
            [Some(("s", state.s().clone())), Some(("z", state.z().clone())), stabilizer]
        });
        tensors.into_iter().flatten().flatten()
    };
    Ok(match contents {
        Contents::Rows(rows) => ROWS.into_iter().zip(rows.tensors()?).collect(),
        Contents::Sums(state) => sums(state).collect(),
        Contents::Chunk(rows, state) => CHUNK.into_iter().zip(rows.tensors()?).chain(sums(state)).collect(),
        Contents::Recurrent(recurrence) => {
            let tensors = recurrence.iter().flat_map(Recurrence::tensors).cloned();
            RECURRENCE.into_iter().zip(tensors).collect()
        }
    })
}

/// Contents of the kind of `like`.
fn contents(like: &Contents, get: &dyn Fn(&str) -> Result<Option<Tensor>>, position: usize) -> Result<Contents> {
    let rows = |names: &[&str]| -> Result<Rows> {
        let tensors: Vec<_> = names.iter().map(|name| get(name)).collect::<Result<_>>()?;
        Rows::new(tensors.into_iter().flatten().collect())
    };
    let sums = |position| -> Result<Option<LinearState>> {
        let (s, z, stabilizer) = (get("s")?, get("z")?, get("stabilizer")?);
        Ok(s.zip(z).map(|(s, z)| LinearState::new(s, z, stabilizer, position)))
    };
    Ok(match like {
        Contents::Rows(_) => Contents::Rows(rows(&ROWS)?),
        Contents::Sums(_) => Contents::Sums(sums(position)?),
        Contents::Recurrent(_) => {
            let [s, inputs @ ..] = RECURRENCE.map(get);
            let inputs = inputs.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
            Contents::Recurrent(s?.map(|s| Recurrence { s, inputs }))
        }
        Contents::Chunk(..) => {
            let rows = rows(&CHUNK)?;
            let finished = position.saturating_sub(rows.len());
            Contents::Chunk(rows, sums(finished)?)
        }
    })
}
