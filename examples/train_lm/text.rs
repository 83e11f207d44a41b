//! Bytes to learn and bytes to test on.

use std::path::{Path, PathBuf};

use candle_core::{Device, Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The last tenth of every file is for validation, the rest for training.
pub struct Text {
    pub training: Vec<u8>,
    pub validation: Vec<u8>,
    pub files: usize,
}

impl Text {
    /// Reads files, and in folders all files that are text, except hidden ones and SVG.
    ///
    /// # Errors
    /// A path that cannot be read, and texts without room for a window of `window` bytes.
    pub fn load(paths: &[PathBuf], window: usize) -> std::result::Result<Self, String> {
        let mut text = Self { training: Vec::new(), validation: Vec::new(), files: 0 };
        for path in paths {
            if path.is_dir() {
                text.add_folder(path)?;
            } else {
                let bytes = std::fs::read(path);
                text.add(&bytes.map_err(|error| format!("--text: cannot read {}: {error}", path.display()))?);
            }
        }
        text.check(paths, window)
    }

    fn add(&mut self, bytes: &[u8]) {
        let (training, validation) = bytes.split_at(bytes.len() - bytes.len() / 10);
        self.training.extend_from_slice(training);
        self.validation.extend_from_slice(validation);
        self.files += 1;
    }

    fn add_folder(&mut self, folder: &Path) -> std::result::Result<(), String> {
        let fail = |error: std::io::Error| format!("--text: cannot read {}: {error}", folder.display());
        let entries = std::fs::read_dir(folder).map_err(fail)?.collect::<std::io::Result<Vec<_>>>().map_err(fail)?;
        let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
        // The order of a folder depends on the machine.
        paths.sort();
        for path in paths {
            let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if is_hidden || path.extension().is_some_and(|extension| extension == "svg") {
                continue;
            }
            if path.is_dir() {
                self.add_folder(&path)?;
                continue;
            }
            let bytes = std::fs::read(&path);
            let bytes = bytes.map_err(|error| format!("--text: cannot read {}: {error}", path.display()))?;
            if std::str::from_utf8(&bytes).is_ok() {
                self.add(&bytes);
            }
        }
        Ok(())
    }

    fn check(self, paths: &[PathBuf], window: usize) -> std::result::Result<Self, String> {
        let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        let names = names.join(", ");
        if self.training.is_empty() {
            return Err(format!("--text {names}: is empty, needs text to learn"));
        }
        let (training, validation) = (self.training.len(), self.validation.len());
        if training < window || validation < window {
            return Err(format!(
                "--text {names}: has {training} bytes to learn and {validation} for validation (the last tenth of every \
                 file), needs {window} of each: --context and the byte after it"
            ));
        }
        Ok(self)
    }

    /// A number that differs between texts (FNV-1a).
    pub fn fingerprint(&self) -> u64 {
        let bytes = self.training.iter().chain(&self.validation);
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
    }
}

/// Windows of text as inputs and targets, u32 `[windows, context]` both; targets are one byte further.
pub struct Windows {
    pub inputs: Tensor,
    pub targets: Tensor,
}

impl Windows {
    /// Windows anywhere in the text, a function of the seed and the step alone.
    pub fn random(text: &[u8], count: usize, context: usize, seed: u64, step: usize, device: &Device) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(step as u64);
        let choices = (text.len() - context) as u64;
        let starts = (0..count).map(|_| (random.next_u64() % choices) as usize);
        Self::at(text, starts, context, device)
    }

    /// At most `count` windows, spread evenly over the text.
    pub fn spread(text: &[u8], count: usize, context: usize, device: &Device) -> Result<Self> {
        let last = text.len() - context - 1;
        let count = count.min(last / context + 1);
        Self::at(text, (0..count).map(|i| i * last / (count - 1).max(1)), context, device)
    }

    fn at(text: &[u8], starts: impl Iterator<Item = usize>, context: usize, device: &Device) -> Result<Self> {
        let windows: Vec<u32> =
            starts.flat_map(|start| text[start..=start + context].iter().map(|&byte| byte.into())).collect();
        let windows = Tensor::new(windows, device)?.reshape(((), context + 1))?;
        Ok(Self { inputs: windows.narrow(1, 0, context)?, targets: windows.narrow(1, 1, context)?.contiguous()? })
    }
}
