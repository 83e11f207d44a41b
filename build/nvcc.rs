//! Calls of the device compiler.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Instant, SystemTime};

use super::{Source, variable, write};

/// Compiles the files that are older than what they include, several at a time; says how, and the compiler's version.
pub fn compile(
    sources: &[Source],
    architectures: &[&str],
    root: &Path,
    out: &Path,
) -> Result<(String, String), String> {
    let started = Instant::now();
    let (nvcc, version) = find()?;
    let jobs = variable("NUM_JOBS").and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    let queue = Mutex::new(sources.iter());
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, sources.len().max(1)) {
            scope.spawn(|| {
                while let Some(source) = queue.lock().ok().and_then(|mut queue| queue.next()) {
                    let result = compile_one(source, architectures, root, out, &nvcc, &version);
                    done.lock().expect("no thread panics").push(result);
                }
            });
        }
    });
    let results = done.into_inner().expect("no thread panics");
    let compiled = results.iter().filter(|result| matches!(result, Ok(true))).count();
    let errors: Vec<String> = results.into_iter().filter_map(Result::err).collect();
    if !errors.is_empty() {
        return Err(errors.join("\n"));
    }
    let how = format!("{compiled} files compiled in {:.1} s by nvcc {version}", started.elapsed().as_secs_f32());
    Ok((how, version))
}

/// Major and minor version of the toolkit with a compiler of `version`, for the table; a driver must not be much older.
pub fn toolkit(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.trim().split('.').map(|number| number.parse().ok());
    numbers.next().flatten().zip(numbers.next().flatten())
}

/// The compiler and its version.
fn find() -> Result<(String, String), String> {
    let in_toolkit = |home: &str| variable(home).map(|home| format!("{home}/bin/nvcc"));
    let nvcc = variable("NVCC").or_else(|| in_toolkit("CUDA_HOME")).or_else(|| in_toolkit("CUDA_PATH"));
    let nvcc = nvcc.unwrap_or_else(|| "nvcc".into());
    let said = Command::new(&nvcc).arg("--version").output().map_err(|error| {
        format!(
            "the feature `gpu` needs nvcc, and {nvcc} cannot be run ({error}).\n\
             Set NVCC to the compiler or CUDA_HOME to a toolkit (scripts/cuda-toolchain.sh installs one without root), \
             or ATTN_KERNELS_FATBINS to a folder of ready fatbins, or ATTN_KERNELS_STUB=1 to build without kernels."
        )
    })?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = text.split(", V").nth(1).and_then(|rest| rest.split_whitespace().next());
    Ok((nvcc, version.unwrap_or("of unknown version").into()))
}

/// Whether there was anything to do. Leaves the fatbin, `.d` (what it was made from), `.log` (registers, spills) and
/// `.command`.
fn compile_one(
    source: &Source,
    architectures: &[&str],
    root: &Path,
    out: &Path,
    nvcc: &str,
    version: &str,
) -> Result<bool, String> {
    let fatbin = out.join(source.fatbin());
    let [depfile, log, stamp] = ["d", "log", "command"].map(|extension| fatbin.with_extension(extension));
    let mut command = Command::new(nvcc);
    command.args(["-O3", "-std=c++17", "-lineinfo", "-Xfatbin", "-compress-all", "-Xptxas", "-v", "-MD"]);
    let architectures = source.architectures(architectures);
    for architecture in &architectures {
        let virtual_one = architecture.replace("sm_", "compute_");
        command.arg("-gencode").arg(format!("arch={virtual_one},code={architecture}"));
    }
    command.arg("-MF").arg(&depfile).arg("-I").arg(root).arg("--fatbin").arg("-o").arg(&fatbin).arg(&source.path);
    let line = format!("{version}: {command:?}");
    if architectures.is_empty()
        || is_current(&fatbin, &depfile) && fs::read_to_string(&stamp).is_ok_and(|text| text == line)
    {
        return Ok(false);
    }
    // An interrupted call must not look like a finished one.
    let _ = fs::remove_file(&stamp);
    let output = command.output().map_err(|error| format!("{nvcc}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("kernels/{}: nvcc failed\n{said}", source.name));
    }
    write(&log, &said)?;
    write(&stamp, &line)?;
    Ok(true)
}

/// Whether the fatbin is newer than everything that its depfile lists; cargo is told what that is by folder.
fn is_current(fatbin: &Path, depfile: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|facts| facts.modified()).ok();
    let (Some(made), Ok(list)) = (time(fatbin), fs::read_to_string(depfile)) else { return false };
    let listed = list.split_once(": ").map_or("", |(_, listed)| listed);
    let older = |path: &str| time(Path::new(path)).is_some_and(|changed: SystemTime| changed < made);
    listed.split_whitespace().filter(|word| *word != "\\").all(older)
}
