//! Runs plans without a GPU, on the emulator of `tests/emulator` (its README has the format of requests).

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::JoinHandle;

use attn_kernels::gpu::plan::{Argument, Plan, TensorMap};

use super::executor::{Outputs, Tensor};
use super::extent;

/// Natural order with late copies, and three others: with copies at once, late, and at once.
pub const SEEDS: [u32; 4] = [0, 1, 2, 3];

/// What watches the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sanitizer {
    None,
    Address,
    Thread,
    /// Counts passes through the banks of shared memory.
    Counters,
}

/// What a launch did to the banks of shared memory.
#[derive(Debug, Clone)]
pub struct Banks {
    pub kernel: String,
    /// By all lanes of a warp at once, those of `ldmatrix` aside.
    pub accesses: u64,
    /// Passes beyond the first of each access, those of `ldmatrix` among them.
    pub extra_passes: u64,
}

/// The runner with a sanitizer, compiled when first asked for; or why there is none.
pub fn get(sanitizer: Sanitizer) -> Result<&'static Emulator, &'static str> {
    static ALL: [OnceLock<Result<Emulator, String>>; 4] = [const { OnceLock::new() }; 4];
    ALL[sanitizer as usize].get_or_init(|| Emulator::compile(sanitizer, "")).as_ref().map_err(String::as_str)
}

/// The runner with a sanitizer for the emulator's own checks: that of all kernels if these are tested with it.
pub fn for_checks(sanitizer: Sanitizer) -> Result<&'static Emulator, &'static str> {
    static SMALL: [OnceLock<Result<Emulator, String>>; 4] = [const { OnceLock::new() }; 4];
    if extent::is_all() || sanitizer == Sanitizer::None {
        return get(sanitizer);
    }
    let small = SMALL[sanitizer as usize].get_or_init(|| Emulator::compile(sanitizer, "checks"));
    small.as_ref().map_err(String::as_str)
}

/// Whether this machine can compile the emulator.
pub fn is_available() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let answers = |tool: &str| Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    *FOUND.get_or_init(|| answers("g++") && answers("make"))
}

/// Says on the terminal that a test was skipped, past the harness's capture; for machines without a C++ compiler.
pub fn skip(what: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED, needs g++ and make: {what}");
}

/// A runner, and its processes that have nothing to do.
pub struct Emulator {
    folder: PathBuf,
    idle: Mutex<Vec<Server>>,
}

impl Emulator {
    /// With all kernels, or `only` those of the checks.
    fn compile(sanitizer: Sanitizer, only: &str) -> Result<Self, String> {
        let name = match sanitizer {
            Sanitizer::None => "",
            Sanitizer::Address => "address",
            Sanitizer::Thread => "thread",
            Sanitizer::Counters => "counters",
        };
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator").join(name).join(only);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/build.sh");
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let mut command = Command::new("sh");
        command.arg(script).arg(&folder).args([name, only]).env("MAKEFLAGS", format!("-j{jobs}"));
        let output = command.output().map_err(|error| format!("build.sh: {error}"))?;
        if !output.status.success() {
            return Err(format!(
                "the emulator ({sanitizer:?}) does not compile:\n{}",
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        Ok(Self { folder, idle: Mutex::default() })
    }

    /// Name, bytes of parameters and threads of every kernel.
    pub fn list(&self) -> Vec<(String, usize, u32)> {
        let output = Command::new(self.folder.join("runner")).arg("--list").output().expect("the runner was compiled");
        let text = String::from_utf8_lossy(&output.stdout);
        let entry = |line: &str| {
            let mut words = line.split_whitespace();
            let mut word = || words.next().expect("three words");
            (word().to_string(), word().parse().expect("a size"), word().parse().expect("a number of threads"))
        };
        text.lines().map(entry).collect()
    }

    /// Runs the emulator's own checks: each instruction, and faults that must be noticed.
    pub fn check(&self) -> Result<(), String> {
        let output = Command::new(self.folder.join("runner")).arg("--check").output();
        let output = output.map_err(|error| format!("the emulator does not start: {error}"))?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(said.into_owned()) }
    }

    /// The suite of instructions, as `primitives` reads it.
    pub fn dump_primitives(&self) -> Result<Vec<u8>, String> {
        let file = self.folder.join(format!("primitives-{}", std::process::id()));
        let status = Command::new(self.folder.join("runner")).arg("--dump-primitives").arg(&file).status();
        let dumped = fs::read(&file);
        let _ = fs::remove_file(&file);
        match status {
            Ok(status) if status.success() => dumped.map_err(|error| format!("{}: {error}", file.display())),
            other => Err(format!("--dump-primitives: {other:?}")),
        }
    }

    /// Runs the launches once and says what each did to the banks of shared memory; the runner is that of `Counters`.
    pub fn count_banks(&self, plan: &Plan, tensors: &[Tensor]) -> Result<(Vec<Banks>, Outputs), String> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let [asked, answered] = ["request", "response"].map(|extension| {
            let name = format!("count-{}-{number}", std::process::id());
            self.folder.join(name).with_extension(extension)
        });
        let failed = |error| format!("the emulator gave no answer: {error}");
        fs::write(&asked, request(plan, tensors, &[0])?).map_err(failed)?;
        let ran = Command::new(self.folder.join("runner")).arg("--counters").args([&asked, &answered]).output();
        let response = fs::read(&answered);
        [asked, answered].iter().for_each(|file| drop(fs::remove_file(file)));
        let ran = ran.map_err(failed)?;
        if !ran.status.success() {
            return Err(format!("{}({})\n{plan}", String::from_utf8_lossy(&ran.stderr), ran.status));
        }
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        let banks = banks(&said).ok_or_else(|| format!("what the emulator says is no count of banks:\n{said}"))?;
        Ok((banks, outputs(&response.map_err(failed)?, tensors, &[0])?))
    }

    /// Runs the launches once per seed from the same contents; all seeds must give the same bits.
    pub fn run(&self, plan: &Plan, tensors: &[Tensor], seeds: &[u32]) -> Result<Outputs, String> {
        let idle = self.idle.lock().unwrap().pop();
        let mut server = idle.map_or_else(|| Server::start(&self.folder), Ok)?;
        let response = match server.answer(&request(plan, tensors, seeds)?) {
            Ok(response) => response,
            Err(error) => return Err(format!("{error}\n{}{plan}", server.last_words())),
        };
        self.idle.lock().unwrap().push(server);
        outputs(&response, tensors, seeds)
    }
}

/// A process that answers requests one after the other, and ends at the first that goes wrong.
struct Server {
    child: Child,
    requests: ChildStdin,
    done: BufReader<ChildStdout>,
    errors: JoinHandle<String>,
    /// Where request and response lie, without extension.
    files: PathBuf,
}

impl Server {
    fn start(folder: &Path) -> Result<Self, String> {
        let mut command = Command::new(folder.join("runner"));
        command.arg("--serve").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("the emulator does not start: {error}"))?;
        let pipe = "was asked for";
        let mut stderr = child.stderr.take().expect(pipe);
        let read = move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        };
        Ok(Self {
            requests: child.stdin.take().expect(pipe),
            done: BufReader::new(child.stdout.take().expect(pipe)),
            errors: std::thread::spawn(read),
            files: folder.join(format!("server-{}", child.id())),
            child,
        })
    }

    fn answer(&mut self, request: &[u8]) -> Result<Vec<u8>, String> {
        let [asked, answered] = ["request", "response"].map(|extension| self.files.with_extension(extension));
        let failed = |error| format!("the emulator gave no answer: {error}");
        fs::write(&asked, request).map_err(failed)?;
        // A process that has ended is noticed below.
        let _ = writeln!(self.requests, "{}\t{}", asked.display(), answered.display());
        let mut line = String::new();
        let read = self.done.read_line(&mut line).map_err(failed);
        let _ = fs::remove_file(&asked);
        let response = fs::read(&answered);
        let _ = fs::remove_file(&answered);
        match read? {
            0 => Err("the emulator stopped".into()),
            _ if line.trim() != "done" => Err(format!("the emulator says {line:?}")),
            _ => response.map_err(failed),
        }
    }

    /// What a process that ended has said, and how it ended.
    fn last_words(self) -> String {
        let Self { mut child, requests, errors, .. } = self;
        drop(requests);
        let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        format!("{}({status})\n", errors.join().unwrap_or_default())
    }
}

/// Reads what `--counters` prints: a line for each launch, one for its accesses, and one for each place in the code.
fn banks(said: &str) -> Option<Vec<Banks>> {
    let number = |words: &[&str], word: &str| -> Option<u64> {
        let at = words.iter().position(|&other| other == word)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    let mut lines = said.lines().filter(|line| !line.trim_start().starts_with("code "));
    let mut all = Vec::new();
    while let Some(launch) = lines.next() {
        let (kernel, products) = launch.split_once(',')?;
        let products: Vec<&str> = products.split_whitespace().collect();
        let accesses: Vec<&str> = lines.next()?.split_whitespace().collect();
        all.push(Banks {
            kernel: kernel.to_string(),
            accesses: number(&accesses, "ordinary")?,
            extra_passes: number(&accesses, "extra")? + number(&products, "bank")?,
        });
    }
    Some(all)
}

/// A request's bytes.
struct Request(Vec<u8>);

impl Request {
    fn u32(&mut self, value: usize) {
        self.0.extend(u32::try_from(value).expect("a small number").to_le_bytes());
    }

    fn u64(&mut self, value: usize) {
        self.0.extend((value as u64).to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.u32(bytes.len());
        self.0.extend(bytes);
    }

    /// Where it goes in the parameters, and the buffer and byte that it is the address of.
    fn pointer(&mut self, offset: usize, (buffer, start): (usize, usize)) {
        self.u32(offset);
        self.u32(buffer);
        self.u64(start);
    }

    fn map(&mut self, map: &TensorMap) {
        self.u32(map.dtype.size());
        map.sizes.iter().chain(&map.strides).for_each(|&number| self.u64(number as usize));
        map.block.iter().for_each(|&size| self.u32(size as usize));
        self.u32(if map.is_swizzled { 128 } else { 0 });
    }
}

fn request(plan: &Plan, tensors: &[Tensor], seeds: &[u32]) -> Result<Vec<u8>, String> {
    let mut request = Request(b"ATTN".to_vec());
    request.u32(2);
    request.u32(seeds.len());
    seeds.iter().for_each(|&seed| request.u32(seed as usize));
    request.u32(tensors.len() + plan.workspaces.len());
    for tensor in tensors {
        request.u64(tensor.bytes);
        request.u32(usize::from(tensor.content.is_some()) + 2 * usize::from(tensor.is_output));
        request.0.extend(tensor.content.iter().flatten());
    }
    for &bytes in &plan.workspaces {
        request.u64(bytes);
        request.u32(0);
    }
    request.u32(plan.launches.len());
    for launch in &plan.launches {
        request.bytes(launch.kernel.as_bytes());
        launch.grid.iter().for_each(|&blocks| request.u32(blocks as usize));
        request.u32(launch.threads as usize);
        request.u32(launch.shared_bytes as usize);
        request.bytes(&launch.params);
        let place = |argument| match argument {
            Argument::Workspace(i) => Ok((tensors.len() + i, 0)),
            _ => {
                let at = tensors.iter().position(|tensor| tensor.argument == argument);
                let at = at.ok_or_else(|| format!("no tensor was given for {argument:?} of {launch}"))?;
                Ok::<_, String>((at, tensors[at].start))
            }
        };
        request.u32(launch.pointers.len());
        for &(offset, argument) in &launch.pointers {
            request.pointer(offset, place(argument)?);
        }
        request.u32(launch.tensor_maps.len());
        for (offset, map) in &launch.tensor_maps {
            request.pointer(*offset, place(map.argument)?);
            request.map(map);
        }
    }
    Ok(request.0)
}

fn outputs(response: &[u8], tensors: &[Tensor], seeds: &[u32]) -> Result<Outputs, String> {
    let written = || tensors.iter().filter(|tensor| tensor.is_output);
    let size: usize = written().map(|tensor| tensor.bytes).sum();
    if response.len() != size * seeds.len() {
        return Err(format!("the emulator gave {} bytes, not {} × {size}", response.len(), seeds.len()));
    }
    let mut outputs = Outputs::new();
    let mut start = 0;
    for tensor in written() {
        let of = |index: usize| &response[index * size + start..][..tensor.bytes];
        for (index, seed) in seeds.iter().enumerate() {
            if let Some(at) = of(0).iter().zip(of(index)).position(|(x, y)| x != y) {
                return Err(format!(
                    "{:?} differs from byte {at} on with seeds {} and {seed}",
                    tensor.argument, seeds[0]
                ));
            }
        }
        outputs.insert(tensor.argument, of(0).to_vec());
        start += tensor.bytes;
    }
    Ok(outputs)
}
