//! Compiles `kernels/**/*.cu` into one fatbin per file, for the feature `gpu`; without it there is nothing to do.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `NVCC` | the compiler; otherwise `$CUDA_HOME/bin/nvcc`, `$CUDA_PATH/bin/nvcc`, then `nvcc` |
//! | `ATTN_KERNELS_ARCHS` | what to compile for, `sm_80,sm_90a,compute_80` by default |
//! | `ATTN_KERNELS_FATBINS` | a folder of fatbins from an earlier build (`OUT_DIR`), used instead of nvcc; an absolute path |
//! | `ATTN_KERNELS_STUB` | 1: no kernels at all, enough for checks and documentation; loading one is an error |

#[path = "build/instances.rs"]
mod instances;
#[path = "build/nvcc.rs"]
mod nvcc;

use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

const ARCHITECTURES: &str = "sm_80,sm_90a,compute_80";

/// One kernel file.
struct Source {
    path: PathBuf,
    /// Below `kernels/`, with `/`.
    name: String,
    kernels: Vec<String>,
}

impl Source {
    fn read(path: PathBuf, root: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        let instances = instances::parse(&text).map_err(|error| format!("kernels/{name}: {error}"))?;
        Ok(Self { path, name, kernels: instances.into_iter().map(|instance| instance.kernel).collect() })
    }

    /// Name of its fatbin.
    fn fatbin(&self) -> String {
        self.name.trim_end_matches(".cu").replace('/', "-") + ".fatbin"
    }

    /// Those architectures of the list that it is for: `.sm90.cu` files are for one only.
    fn architectures<'a>(&self, all: &[&'a str]) -> Vec<&'a str> {
        let is_sm90 = self.name.ends_with(".sm90.cu");
        all.iter().copied().filter(|architecture| !is_sm90 || *architecture == "sm_90a").collect()
    }

    /// The expression for its fatbin's bytes: none when it was compiled for nothing.
    fn include(&self, folder: &Path, all: &[&str]) -> String {
        if self.architectures(all).is_empty() {
            return "&[]".into();
        }
        format!("include_bytes!({:?})", folder.join(self.fatbin()).display().to_string())
    }
}

fn main() {
    let folder = folder();
    println!("cargo::rerun-if-changed={}", folder.join("build.rs").display());
    println!("cargo::rerun-if-changed={}", folder.join("build").display());
    if env::var_os("CARGO_FEATURE_GPU").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={}", folder.join("kernels").display());
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "DOCS_RS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    for variable in ["ARCHS", "FATBINS", "STUB"] {
        println!("cargo::rerun-if-env-changed=ATTN_KERNELS_{variable}");
    }
    match build(&folder.join("kernels")) {
        Ok(what) => println!("cargo::warning={what}"),
        Err(error) => {
            for line in error.lines() {
                println!("cargo::error={line}");
            }
        }
    }
}

/// The folder of this file: that of the package, or above it for one that is made of the same sources.
fn folder() -> PathBuf {
    let package = PathBuf::from(variable("CARGO_MANIFEST_DIR").unwrap_or_default());
    package.ancestors().find(|folder| folder.join("kernels").is_dir()).unwrap_or(&package).to_path_buf()
}

/// Builds and says what was built. `root` is the folder `kernels`.
fn build(root: &Path) -> Result<String, String> {
    let out = PathBuf::from(variable("OUT_DIR").ok_or("no OUT_DIR: this is to be run by cargo")?);
    let (mut paths, mut digest) = (Vec::new(), Digest::new());
    files(root, &mut paths)?;
    for path in &paths {
        digest.add(&fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?);
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    let sources = paths.into_iter().map(|path| Source::read(path, root)).collect::<Result<Vec<_>, _>>()?;
    let kernels: usize = sources.iter().map(|source| source.kernels.len()).sum();
    let counted = format!("{kernels} kernels in {} files", sources.len());

    if variable("ATTN_KERNELS_STUB").is_some_and(|value| value != "0") || variable("DOCS_RS").is_some() {
        write_table(&out, &sources, &[], None, |source| source.include(&out, &[]))?;
        return Ok(format!("built without GPU kernels ({counted} left out): they were asked to be stubs"));
    }
    if let Some(folder) = variable("ATTN_KERNELS_FATBINS").map(PathBuf::from) {
        if !folder.is_absolute() {
            return Err(format!("ATTN_KERNELS_FATBINS: {} is not an absolute path", folder.display()));
        }
        println!("cargo::rerun-if-changed={}", folder.display());
        let Stamp { architectures, digest: of, version } = Stamp::read(&folder)?;
        if of != digest.0 {
            return Err(format!("the fatbins in {} were built from other kernel sources", folder.display()));
        }
        let list: Vec<&str> = architectures.split(',').collect();
        write_table(&out, &sources, &list, nvcc::toolkit(&version), |source| source.include(&folder, &list))?;
        return Ok(format!("{counted} taken from {}, for {architectures}", folder.display()));
    }
    let architectures = variable("ATTN_KERNELS_ARCHS").unwrap_or_else(|| ARCHITECTURES.into());
    let list: Vec<&str> = architectures.split(',').map(str::trim).collect();
    let (how, version) = nvcc::compile(&sources, &list, root, &out)?;
    write(&out.join("stamp"), &format!("{architectures}\n{}\n{version}\n", digest.0))?;
    write_table(&out, &sources, &list, nvcc::toolkit(&version), |source| source.include(&out, &list))?;
    Ok(format!("{counted} for {architectures}, {how}"))
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Kernel files and what they include, sorted.
fn files(folder: &Path, into: &mut Vec<PathBuf>) -> Result<(), String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            files(&path, into)?;
        } else if path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
            into.push(path);
        }
    }
    Ok(())
}

/// FNV-1a of the sources, to tell fatbins of other sources.
struct Digest(u64);

impl Digest {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        // Checkouts differ in line ends.
        for &byte in bytes.iter().filter(|byte| **byte != b'\r') {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// What [`build`] has left beside fatbins.
struct Stamp {
    architectures: String,
    /// Of the sources.
    digest: u64,
    /// Of the compiler.
    version: String,
}

impl Stamp {
    fn read(folder: &Path) -> Result<Self, String> {
        let path = folder.join("stamp");
        let text =
            fs::read_to_string(&path).map_err(|error| format!("ATTN_KERNELS_FATBINS: {}: {error}", path.display()))?;
        let stamp = match text.lines().collect::<Vec<_>>()[..] {
            [architectures, digest, version] => digest.parse().ok().map(|digest| Self {
                architectures: architectures.into(),
                digest,
                version: version.into(),
            }),
            _ => None,
        };
        stamp.ok_or(format!("ATTN_KERNELS_FATBINS: {} is not architectures, digest, version", path.display()))
    }
}

/// The table that the library includes: what was compiled by which toolkit, and which fatbin holds which kernels.
fn write_table(
    out: &Path,
    sources: &[Source],
    architectures: &[&str],
    toolkit: Option<(u32, u32)>,
    image: impl Fn(&Source) -> String,
) -> Result<(), String> {
    let mut table = format!("pub(super) static ARCHITECTURES: &[&str] = &{architectures:?};\n");
    let _ = writeln!(table, "pub(super) const TOOLKIT: Option<(u32, u32)> = {toolkit:?};");
    table += "pub(super) static FATBINS: &[Fatbin] = &[\n";
    for source in sources {
        let (file, kernels, image) = (&source.name, &source.kernels, image(source));
        let _ = writeln!(table, "    Fatbin {{ file: {file:?}, kernels: &{kernels:?}, image: {image} }},");
    }
    write(&out.join("kernels.rs"), &(table + "];\n"))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
