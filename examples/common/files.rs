//! Files that a program writes.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file of results, created before the work that fills it.
pub struct Output {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Output {
    /// Creates `folder` where it is missing, and the file in it.
    ///
    /// # Errors
    /// Names the folder or the file.
    pub fn create(folder: &Path, name: &str) -> Result<Self, String> {
        std::fs::create_dir_all(folder).map_err(|error| format!("--out {}: {error}", folder.display()))?;
        let path = folder.join(name);
        let file = File::create(&path).map_err(|error| format!("--out: cannot write {}: {error}", path.display()))?;
        Ok(Self { path, file: BufWriter::new(file) })
    }

    /// Writes the text, and prints where it went.
    ///
    /// # Errors
    /// Names the file.
    pub fn write(mut self, text: &str) -> Result<(), String> {
        let written = writeln!(self.file, "{text}").and_then(|()| self.file.flush());
        written.map_err(|error| format!("cannot write {}: {error}", self.path.display()))?;
        println!("wrote {}", self.path.display());
        Ok(())
    }
}
