//! Memory that plans work in.

use std::collections::BTreeMap;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr};

use super::driver::describe;

/// By index into [`Plan::workspaces`](super::plan::Plan::workspaces).
#[derive(Default)]
pub struct Workspaces {
    memory: BTreeMap<usize, CudaSlice<u8>>,
    /// Behind the last plan that worked in kept memory, on whatever stream that was.
    done: Option<CudaEvent>,
}

impl Workspaces {
    pub fn bytes(&self) -> usize {
        self.memory.values().map(CudaSlice::num_bytes).sum()
    }

    /// Lets a stream wait for the last plan. The stream object may stand for another stream in every thread.
    pub fn enter(&self, stream: &CudaStream) -> Result<(), String> {
        self.done.as_ref().map_or(Ok(()), |done| stream.wait(done)).map_err(describe)
    }

    /// Marks the end of a plan on a stream.
    pub fn leave(&mut self, stream: &CudaStream) -> Result<(), String> {
        let done = match self.done.take() {
            Some(done) => done,
            None => stream.context().new_event(None).map_err(describe)?,
        };
        self.done.insert(done).record(stream).map_err(describe)
    }

    /// Makes a workspace at least so large, if it may be allocated.
    pub fn reserve(
        &mut self,
        index: usize,
        bytes: usize,
        stream: &Arc<CudaStream>,
        may_allocate: bool,
    ) -> Result<(), String> {
        if self.memory.get(&index).is_some_and(|workspace| workspace.len() >= bytes) {
            return Ok(());
        }
        if !may_allocate {
            return Err("memory must be there before a graph is captured: make the same call once, on a device that \
                        keeps workspaces"
                .into());
        }
        // Given back first: both need not fit.
        self.memory.remove(&index);
        // SAFETY: every bit pattern is a u8, and only kernels see it, after the kernels of the plan that fill it.
        let workspace = unsafe { stream.alloc(bytes.max(1)) }.map_err(describe)?;
        self.memory.insert(index, workspace);
        Ok(())
    }

    pub fn address(&self, index: usize, stream: &CudaStream) -> Option<u64> {
        self.memory.get(&index).map(|workspace| workspace.device_ptr(stream).0)
    }
}

impl Drop for Workspaces {
    /// Memory is given back in the order of the stream that the calling thread sees, behind the last plan.
    fn drop(&mut self) {
        if let (Some(done), Some(workspace)) = (&self.done, self.memory.values().next()) {
            let stream = workspace.stream();
            stream.context().record_err(stream.wait(done));
        }
    }
}
