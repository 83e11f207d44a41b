//! Runs plans.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PushKernelArg, SyncOnDrop,
};

use super::driver::{self, describe};
use super::module::{self, Kernels};
use super::plan::{Argument, DeviceFacts, Launch, Plan};
use super::view::{DeviceSlice, DeviceSliceMut, DeviceView, each};
use super::workspaces::Workspaces;
use crate::{Error, Result};

/// 4096 bytes, the largest parameters of a kernel, aligned as the strictest of them.
#[derive(Debug, PartialEq, Eq)]
#[repr(C, align(64))]
struct Params([u64; 512]);

// SAFETY: plain numbers, which the driver copies.
unsafe impl DeviceRepr for Params {}

/// A GPU and the stream on which work is put. Any thread may use it and its clones.
///
/// The first call of a kind loads its kernels, and memory for a plan's own use is allocated on the stream unless it is
/// [kept](Self::keeping_workspaces). Neither can be part of a CUDA graph: calls join a graph that is being captured from
/// the stream if the device keeps workspaces, the same call was made before the capture, and the context does not track
/// events (`CudaContext::disable_event_tracking`); otherwise they are refused and the capture goes on. A graph replays on
/// the addresses of the capture. It is not ordered with other uses of the same workspaces, so give it a device of its own,
/// which lives as long as the graph.
#[derive(Clone)]
pub struct Device {
    pub(super) stream: Arc<CudaStream>,
    pub(super) kernels: Arc<Kernels>,
    pub(super) kept: Option<Arc<Mutex<Workspaces>>>,
}

impl Device {
    /// A GPU by number, on its default stream.
    ///
    /// # Errors
    /// No driver or no such device; [`info`](super::info) says more.
    pub fn new(ordinal: usize) -> Result<Self> {
        let open = || {
            module::open_driver()?;
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
    /// and its clones are dropped. Otherwise every call allocates its own, in the order of the stream. Plans of clones in
    /// other threads, whose default streams may differ, wait for each other on the device.
    pub fn keeping_workspaces(&self) -> Self {
        Self { kept: Some(Arc::default()), ..self.clone() }
    }

    /// Bytes that [`keeping_workspaces`](Self::keeping_workspaces) keeps so far.
    pub fn workspace_bytes(&self) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.lock().unwrap_or_else(PoisonError::into_inner).bytes())
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
        let (mut own, is_kept) = (Workspaces::default(), kept.is_some());
        let workspaces = kept.as_deref_mut().unwrap_or(&mut own);
        if !is_kept || arguments.is_captured {
            return self.put(function, plan, &arguments, workspaces);
        }
        let ordering = || failed(format!("ordering {} with others in the same memory", names(plan)));
        workspaces.enter(&self.stream).map_err(ordering())?;
        let put = self.put(function, plan, &arguments, workspaces);
        // Also after an error: launches before it may be on the stream.
        let left = workspaces.leave(&self.stream).map_err(ordering());
        put.and(left)
    }

    /// Allocates what is missing and launches.
    fn put(
        &self,
        function: &'static str,
        plan: &Plan,
        arguments: &Arguments<'_>,
        workspaces: &mut Workspaces,
    ) -> Result<()> {
        let is_given = |i| arguments.address(Argument::Workspace(i)).is_some();
        for (i, &bytes) in plan.workspaces.iter().enumerate().filter(|(i, _)| !is_given(*i)) {
            let doing = || format!("allocating {bytes} bytes for {}", names(plan));
            let reserved = workspaces.reserve(i, bytes, &self.stream, !arguments.is_captured);
            reserved.map_err(|why| failure(function, doing(), why))?;
        }
        let own = |argument| match argument {
            Argument::Workspace(i) => workspaces.address(i, &self.stream),
            _ => None,
        };
        let address = |argument| arguments.address(argument).or_else(|| own(argument));
        let find = |launch: &Launch| {
            let kernel = self.kernels.function(&launch.kernel, !arguments.is_captured);
            kernel.map_err(|why| failure(function, format!("finding {}", launch.kernel), why))
        };
        // All of them first: a call that is refused leaves no part of itself in a graph.
        let kernels = plan.launches.iter().map(find).collect::<Result<Vec<_>>>()?;
        for (launch, kernel) in plan.launches.iter().zip(&kernels) {
            let launched = self.launch(launch, kernel, address);
            launched.map_err(|why| failure(function, format!("launching {launch}"), why))?;
        }
        Ok(())
    }

    /// The context is bound to the calling thread.
    fn launch(
        &self,
        launch: &Launch,
        kernel: &CudaFunction,
        address: impl Fn(Argument) -> Option<u64>,
    ) -> std::result::Result<(), String> {
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
        let mut builder = self.stream.launch_builder(kernel);
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
    /// Whether the stream's work goes into a graph.
    is_captured: bool,
}

impl<'a> Arguments<'a> {
    /// None so far, for work on a device, whose context is bound to the calling thread. `function` is what errors name.
    ///
    /// # Errors
    /// A device that does not answer, and a stream that is being captured while the context tracks events: tensors would
    /// make the graph wait for work outside of it.
    pub fn new(device: &'a Device, function: &'static str) -> Result<Self> {
        let (stream, context) = (&device.stream, device.stream.context());
        let asking =
            |error| failure(function, format!("asking the stream of GPU {}", context.ordinal()), describe(error));
        context.bind_to_thread().map_err(asking)?;
        let status = stream.capture_status().map_err(asking)?;
        let is_captured = status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        if is_captured && context.is_managing_stream_synchronization() {
            let why = "the context tracks events: CudaContext::disable_event_tracking turns that off";
            return Err(failure(function, "joining the graph that is being captured".into(), why.into()));
        }
        Ok(Self { stream, given: Vec::new(), is_captured })
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
