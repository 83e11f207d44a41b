//! Runs plans.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg,
    SyncOnDrop,
};

use super::driver::{self, describe};
use super::module::Kernels;
use super::plan::{Argument, DeviceFacts, Launch, Plan};
use super::view::{DeviceSlice, DeviceSliceMut, DeviceView, each};
use crate::{Error, Result};

/// 4096 bytes, the largest parameters of a kernel, aligned as the strictest of them.
#[derive(Debug, PartialEq, Eq)]
#[repr(C, align(128))]
struct Params([u64; 512]);

// SAFETY: plain numbers, which the driver copies.
unsafe impl DeviceRepr for Params {}

/// Memory that plans work in, by index into [`Plan::workspaces`].
type Workspaces = Vec<CudaSlice<u8>>;

/// A GPU and the stream on which work is put.
#[derive(Clone)]
pub struct Device {
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
    kept: Option<Arc<Mutex<Workspaces>>>,
}

impl Device {
    /// A GPU by number, on its default stream.
    ///
    /// # Errors
    /// No driver or no such device; [`info`](super::info) says more.
    pub fn new(ordinal: usize) -> Result<Self> {
        let open = || {
            driver::open()?;
            CudaContext::new(ordinal).map_err(describe)
        };
        let failed = |why| failure("gpu::Device::new", format!("opening GPU {ordinal}"), why);
        Self::on(open().map_err(failed)?.default_stream())
    }

    /// The GPU of a stream.
    ///
    /// # Errors
    /// A device that does not answer.
    pub fn on(stream: Arc<CudaStream>) -> Result<Self> {
        let context = stream.context();
        let failed = |why| failure("gpu::Device::on", format!("asking GPU {}", context.ordinal()), why);
        let kernels = Kernels::of(context).map_err(failed)?;
        Ok(Self { stream, kernels, kept: None })
    }

    /// The same device, which allocates the memory that its plans work in once and keeps it for later ones, until it
    /// and its clones are dropped. Otherwise every call allocates its own, in the order of the stream.
    pub fn keeping_workspaces(&self) -> Self {
        Self { kept: Some(Arc::default()), ..self.clone() }
    }

    /// Bytes that [`keeping_workspaces`](Self::keeping_workspaces) keeps so far.
    pub fn workspace_bytes(&self) -> usize {
        let bytes = |kept: &Workspaces| kept.iter().map(CudaSlice::num_bytes).sum();
        self.kept.as_ref().map_or(0, |kept| bytes(&kept.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// What plans depend on.
    pub fn facts(&self) -> &DeviceFacts {
        self.kernels.facts()
    }

    /// The stream on which work is put.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Puts the launches of a plan on the stream. `function` is what errors name. Workspaces that are not among the
    /// arguments are allocated.
    ///
    /// The plan must be one that this crate made for tensors of the sizes and strides of `arguments`: as with any
    /// kernel, nothing checks that what it reads and writes lies in them.
    ///
    /// # Errors
    /// A launch that the device refuses, memory that it does not have.
    #[doc(hidden)]
    pub fn run(&self, function: &'static str, plan: &Plan, arguments: Arguments<'_>) -> Result<()> {
        let failed = |doing: String| move |why| failure(function, doing, why);
        plan.check(self.facts()).map_err(failed("checking the launches".into()))?;
        // Held until all launches are on the stream: those of two plans must not alternate on the same memory.
        let mut kept = self.kept.as_ref().map(|kept| kept.lock().unwrap_or_else(PoisonError::into_inner));
        let mut own = Workspaces::new();
        let workspaces = kept.as_deref_mut().unwrap_or(&mut own);
        let is_given = |i| arguments.address(Argument::Workspace(i)).is_some();
        for (i, &bytes) in plan.workspaces.iter().enumerate() {
            let bytes = if is_given(i) { 0 } else { bytes };
            let doing = || format!("allocating {bytes} bytes for {}", names(plan));
            self.reserve(workspaces, i, bytes).map_err(|why| failure(function, doing(), why))?;
        }
        let own = |argument| match argument {
            Argument::Workspace(i) => workspaces.get(i).map(|workspace| workspace.device_ptr(&self.stream).0),
            _ => None,
        };
        let address = |argument| arguments.address(argument).or_else(|| own(argument));
        for launch in &plan.launches {
            self.launch(launch, address).map_err(|why| failure(function, format!("launching {launch}"), why))?;
        }
        Ok(())
    }

    /// Makes a workspace at least so large; those before it are there.
    fn reserve(&self, workspaces: &mut Workspaces, index: usize, bytes: usize) -> std::result::Result<(), String> {
        match workspaces.get_mut(index) {
            Some(workspace) if workspace.len() >= bytes => {}
            Some(workspace) => *workspace = self.allocate(bytes)?,
            None => workspaces.push(self.allocate(bytes)?),
        }
        Ok(())
    }

    /// Memory of any content.
    fn allocate(&self, bytes: usize) -> std::result::Result<CudaSlice<u8>, String> {
        // SAFETY: every bit pattern is a u8, and only kernels see it, after the kernels of the plan that fill it.
        unsafe { self.stream.alloc(bytes.max(1)) }.map_err(describe)
    }

    fn launch(&self, launch: &Launch, address: impl Fn(Argument) -> Option<u64>) -> std::result::Result<(), String> {
        let kernel = self.kernels.function(&launch.kernel)?;
        let mut params = patched(launch, &address)?;
        for (offset, map) in &launch.tensor_maps {
            let address = address(map.argument).ok_or(format!("no tensor was given for {:?}", map.argument))?;
            params.0[offset / 8..][..16].copy_from_slice(&driver::tensor_map(map, address)?);
        }
        let [x, y, z] = launch.grid;
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        let mut builder = self.stream.launch_builder(&kernel);
        builder.arg(&params);
        // SAFETY:
        // - The kernel takes one parameter, a struct of at most 4096 bytes, which the driver copies from `params`
        //   during the call. Tests compare size and fields of the struct on both sides.
        // - Every address in it is of a live allocation on this context: `Arguments` borrows those of the caller, and
        //   workspaces are freed in stream order, behind this launch.
        // - Tensors that the kernel writes were lent mutably (`Arguments::write`), all others are only read.
        // - Accesses stay inside the tensors: `run` asks for a plan of this crate, and plans are made from the same
        //   sizes and strides that the tensors were checked against.
        // - Grid, threads and shared memory are within the limits of the device (`Plan::check`).
        unsafe { builder.launch(config) }.map(|_| ()).map_err(describe)
    }
}

/// Parameters with the addresses in their places.
fn patched(launch: &Launch, address: impl Fn(Argument) -> Option<u64>) -> std::result::Result<Params, String> {
    let mut params = Params([0; 512]);
    let words = launch.params.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    });
    params.0.iter_mut().zip(words).for_each(|(param, word)| *param = word);
    for &(offset, argument) in &launch.pointers {
        // Addresses are 8-byte fields, aligned as such.
        params.0[offset / 8] = address(argument).ok_or(format!("no tensor was given for {argument:?}"))?;
    }
    Ok(params)
}

fn names(plan: &Plan) -> String {
    let names: Vec<&str> = plan.launches.iter().map(|launch| launch.kernel.as_str()).collect();
    names.join(", ")
}

fn failure(function: &'static str, doing: String, why: String) -> Error {
    Error::Gpu { function, doing, why }
}

/// The tensors of a call, borrowed until its launches are on the stream.
#[doc(hidden)]
pub struct Arguments<'a> {
    stream: &'a CudaStream,
    given: Vec<(Argument, u64, SyncOnDrop<'a>)>,
}

impl<'a> Arguments<'a> {
    /// None so far, for work on a device.
    pub fn new(device: &'a Device) -> Self {
        Self { stream: &device.stream, given: Vec::new() }
    }

    /// Adds a tensor that is read.
    pub fn read(&mut self, argument: Argument, tensor: &'a DeviceView<'_>) {
        let elements = tensor.elements();
        let (address, guard) = each!(elements, DeviceSlice { F16, BF16, F32, F64, U8 }, x => x.device_ptr(self.stream));
        self.given.push((argument, address, guard));
    }

    /// Adds a tensor that is written.
    pub fn write(&mut self, argument: Argument, tensor: &'a mut DeviceSliceMut<'_>) {
        let (address, guard) =
            each!(tensor, DeviceSliceMut { F16, BF16, F32, F64 }, x => x.device_ptr_mut(self.stream));
        self.given.push((argument, address, guard));
    }

    /// Adds memory of any type, from its first byte on, that is read or written.
    pub fn memory(&mut self, argument: Argument, bytes: &'a mut CudaViewMut<'_, u8>) {
        let (address, guard) = bytes.device_ptr_mut(self.stream);
        self.given.push((argument, address, guard));
    }

    /// Whether the tensors that are given of a list start at multiples of 16 bytes.
    pub fn are_aligned(&self, arguments: &[Argument]) -> bool {
        arguments.iter().filter_map(|&argument| self.address(argument)).all(|address| address % 16 == 0)
    }

    fn address(&self, argument: Argument) -> Option<u64> {
        self.given.iter().find(|(given, ..)| *given == argument).map(|(_, address, _)| *address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::params::Pointer;

    crate::kernel_params! {
        struct CopyParams {
            count: u32,
            q: Pointer,
            out: Pointer,
            scale: f32,
        }
    }

    #[test]
    fn addresses_go_to_their_places() {
        let params = CopyParams { count: 3, q: Argument::Q.into(), out: Argument::Out.into(), scale: 1.0 };
        let launch = Launch::new("copy", [1; 3], 32, 0, &params);
        let address = |argument| (argument == Argument::Q).then_some(0x1234);
        assert_eq!(patched(&launch, address), Err("no tensor was given for Out".into()));
        let patched = patched(&launch, |argument| Some(if argument == Argument::Q { 0x1234 } else { 0x5678 }));
        assert_eq!(patched.unwrap().0[..4], [3, 0x1234, 0x5678, u64::from(1f32.to_bits())]);
    }
}
