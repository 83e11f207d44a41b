//! The kernels of this build, loaded on a device when they are first used.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use super::driver::{self, describe};
use super::plan::DeviceFacts;

/// A kernel file as the build compiled it.
pub struct Fatbin {
    file: &'static str,
    kernels: &'static [&'static str],
    /// Empty when it was compiled for none of the architectures.
    image: &'static [u8],
}

#[cfg(test)]
impl Fatbin {
    pub const fn new(file: &'static str, kernels: &'static [&'static str], image: &'static [u8]) -> Self {
        Self { file, kernels, image }
    }
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Architectures, and the number of kernels.
pub fn built() -> (&'static [&'static str], usize) {
    let present = FATBINS.iter().filter(|fatbin| !fatbin.image.is_empty());
    (ARCHITECTURES, present.map(|fatbin| fatbin.kernels.len()).sum())
}

/// Opens the driver, once.
pub fn open_driver() -> Result<(), String> {
    driver::refusal(driver::open()?, TOOLKIT).map_or(Ok(()), Err)
}

/// Why the kernels of this build do not run on a device, as far as the driver's version is known. A driver that is older
/// than the toolkit runs code for a processor, but cannot compile that for later ones.
pub fn unsupported(capability: (u32, u32), driver: Option<(u32, u32)>) -> Option<String> {
    let is_older = driver.zip(TOOLKIT).is_some_and(|(driver, toolkit)| driver < toolkit);
    let runs = |architecture: &&&str| !is_older || architecture.starts_with("sm_");
    without_code(&ARCHITECTURES.iter().filter(runs).copied().collect::<Vec<_>>(), capability)
}

/// Why code for `architectures` does not run on a device.
fn without_code(architectures: &[&str], (major, minor): (u32, u32)) -> Option<String> {
    let runs = |architecture: &&str| {
        let (kind, number) = architecture.split_once('_').unwrap_or_default();
        let exact = number.ends_with('a');
        let Ok(number) = number.trim_end_matches('a').parse::<u32>() else { return false };
        match kind {
            "sm" if exact => number == major * 10 + minor,
            "sm" => number / 10 == major && number % 10 <= minor,
            _ => number <= major * 10 + minor,
        }
    };
    let list = if architectures.is_empty() { "nothing".into() } else { architectures.join(", ") };
    let needs = || format!("compute capability {major}.{minor}, but kernels are built for {list}");
    (!architectures.iter().any(runs)).then(needs)
}

/// The kernels on one device.
pub struct Kernels {
    context: Arc<CudaContext>,
    files: &'static [Fatbin],
    facts: DeviceFacts,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    /// By file.
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// By name.
    functions: HashMap<&'static str, CudaFunction>,
}

impl Kernels {
    /// Those of a context, the same every time that it is asked for.
    pub fn of(context: &Arc<CudaContext>) -> Result<Arc<Self>, String> {
        static ALL: OnceLock<Mutex<Vec<Arc<Kernels>>>> = OnceLock::new();
        let mut all = ALL.get_or_init(Default::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = all.iter().find(|kernels| kernels.context == *context) {
            return Ok(kernels.clone());
        }
        let kernels = Arc::new(Self::new(context, FATBINS)?);
        all.push(kernels.clone());
        Ok(kernels)
    }

    pub fn new(context: &Arc<CudaContext>, files: &'static [Fatbin]) -> Result<Self, String> {
        open_driver()?;
        let facts = driver::facts(context.cu_device()).map_err(describe)?;
        Ok(Self { context: context.clone(), files, facts, loaded: Mutex::default() })
    }

    /// What plans depend on.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// A kernel, allowed to use all shared memory that a block can have. The context is bound to the calling thread; one
    /// that is not loaded yet is refused if it must not be now.
    pub fn function(&self, name: &str, may_load: bool) -> Result<CudaFunction, String> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = loaded.functions.get(name) {
            return Ok(function.clone());
        }
        if !may_load {
            return Err("it is not loaded yet, and must be before a graph is captured: make the same call once".into());
        }
        let of = |fatbin: &'static Fatbin| Some((fatbin, *fatbin.kernels.iter().find(|kernel| **kernel == name)?));
        let (fatbin, name) = self.files.iter().find_map(of).ok_or("this build has no such kernel")?;
        let module = match loaded.modules.get(fatbin.file) {
            Some(module) => module.clone(),
            None => self.load(fatbin)?,
        };
        let function = module.load_function(name).map_err(describe)?;
        let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(limit, self.facts.shared_bytes_per_block as i32).map_err(describe)?;
        loaded.modules.insert(fatbin.file, module);
        loaded.functions.insert(name, function.clone());
        Ok(function)
    }

    fn load(&self, fatbin: &Fatbin) -> Result<Arc<CudaModule>, String> {
        if fatbin.image.is_empty() {
            return Err(format!("kernels/{} is not in this build", fatbin.file));
        }
        let image = Ptx::from_binary(fatbin.image.to_vec());
        let hint = || {
            let why = unsupported(self.facts.compute_capability, driver::open().ok());
            why.map_or(String::new(), |why| format!(" ({why})"))
        };
        self.context.load_module(image).map_err(|error| describe(error) + &hint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures() {
        let built = ["sm_80", "sm_90a", "compute_86"];
        let runs = |built: &[&str], capability| without_code(built, capability).is_none();
        for capability in [(8, 0), (8, 9), (9, 0), (10, 0)] {
            assert!(runs(&built, capability), "{capability:?}");
        }
        assert!(
            !runs(&built, (7, 5)) && !runs(&["sm_90a"], (10, 0)) && !runs(&["sm_86"], (8, 0)) && !runs(&[], (9, 0))
        );
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = FATBINS.iter().flat_map(|fatbin| fatbin.kernels).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
