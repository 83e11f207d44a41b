//! Tensors of safetensors files, read one by one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Error, Result, Tensor, WithDType};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

/// Bytes that are read at a time: beside the tensors no more is held.
const CHUNK: usize = 1 << 20;

/// A header is not longer, by the format.
const LONGEST_HEADER: u64 = 100_000_000;

/// The safetensors files of a folder.
#[derive(Debug)]
pub struct Files {
    files: Vec<Open>,
    /// Where each tensor is: its file and place there.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: Mutex<File>,
    /// Where the numbers begin, in bytes.
    start: u64,
}

impl Files {
    /// `model.safetensors`, or the files that `model.safetensors.index.json` names.
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join("model.safetensors.index.json");
        let paths = match folder.join("model.safetensors") {
            single if single.exists() || !index.exists() => vec![single],
            _ => shards(folder, &index)?,
        };
        let mut opened = Self { files: Vec::new(), tensors: BTreeMap::new() };
        paths.into_iter().try_for_each(|path| opened.add(path))?;
        Ok(opened)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let fail = |error: &dyn std::fmt::Display| Error::msg(format!("{}: {error}", path.display()));
        let mut file = File::open(&path).map_err(|error| fail(&error))?;
        let whole = file.metadata().map_err(|error| fail(&error))?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|_| fail(&"too short for a safetensors file"))?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST_HEADER.min(whole.saturating_sub(8)) {
            return Err(fail(&format!("a header of {length} bytes in a file of {whole}: truncated or no safetensors")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(|error| fail(&error))?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|error| fail(&error))?;
        let (start, numbers) = (8 + length, header.data_len() as u64);
        if start + numbers != whole {
            let got = whole - start;
            return Err(fail(&format!("{got} bytes of numbers, needs {numbers} by its header: truncated or damaged")));
        }
        for (name, info) in header.tensors() {
            if let Some((other, _)) = self.tensors.insert(name.clone(), (self.files.len(), info.clone())) {
                let other = self.files.get(other).map_or(&path, |file| &file.path);
                return Err(fail(&format!("tensor `{name}` is in {} as well", other.display())));
            }
        }
        self.files.push(Open { path, file: Mutex::new(file), start });
        Ok(())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Numbers in all tensors.
    pub fn elements(&self) -> usize {
        self.tensors.values().map(|(_, info)| info.shape.iter().product::<usize>()).sum()
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor in a dtype.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        match dtype {
            DType::F32 => self.read::<f32>(name),
            DType::F64 => self.read::<f64>(name),
            DType::F16 => self.read::<f16>(name),
            DType::BF16 => self.read::<bf16>(name),
            other => candle_core::bail!("dtype {}, needs f32, f64, f16 or bf16", other.as_str()),
        }?
        .to_device(device)
    }

    fn read<T: WithDType>(&self, name: &str) -> Result<Tensor> {
        let Some((file, info)) = self.tensors.get(name) else { candle_core::bail!("no tensor `{name}`") };
        let file = &self.files[*file];
        let fail = |what: String| Error::msg(format!("{}: tensor `{name}`: {what}", file.path.display()));
        let decode: fn(&[u8], &mut Vec<T>) = match info.dtype {
            Dtype::F32 => {
                |bytes, to| to.extend(bytes.as_chunks().0.iter().map(|x| T::from_f64(f32::from_le_bytes(*x).into())))
            }
            Dtype::F64 => {
                |bytes, to| to.extend(bytes.as_chunks().0.iter().map(|x| T::from_f64(f64::from_le_bytes(*x))))
            }
            Dtype::F16 => {
                |bytes, to| to.extend(bytes.as_chunks().0.iter().map(|x| T::from_f64(f16::from_le_bytes(*x).into())))
            }
            Dtype::BF16 => {
                |bytes, to| to.extend(bytes.as_chunks().0.iter().map(|x| T::from_f64(bf16::from_le_bytes(*x).into())))
            }
            other => return Err(fail(format!("dtype {other:?}, needs F32, F64, F16 or BF16"))),
        };
        let (first, end) = info.data_offsets;
        let mut numbers = Vec::with_capacity(info.shape.iter().product());
        let mut bytes = vec![0; CHUNK.min(end - first)];
        let mut handle = file.file.lock().unwrap_or_else(PoisonError::into_inner);
        handle.seek(SeekFrom::Start(file.start + first as u64)).map_err(|error| fail(error.to_string()))?;
        let mut left = end - first;
        while left > 0 {
            let count = left.min(CHUNK);
            handle.read_exact(&mut bytes[..count]).map_err(|error| fail(error.to_string()))?;
            decode(&bytes[..count], &mut numbers);
            left -= count;
        }
        Tensor::from_vec(numbers, &info.shape[..], &Device::Cpu)
    }
}

/// The files that an index names.
fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let fail = |error: &dyn std::fmt::Display| Error::msg(format!("{}: {error}", index.display()));
    let text = std::fs::read_to_string(index).map_err(|error| fail(&error))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| fail(&error))?;
    let mut names: Vec<_> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    // A file beside the index, whatever it says.
    if let Some(name) = names.iter().find(|name| Path::new(name).file_name().is_none_or(|file| file != name.as_str())) {
        return Err(fail(&format!("`{name}` is not the name of a file in this folder")));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}
