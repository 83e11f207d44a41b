//! Calls on a GPU as programs make them: from threads of their own, in the same memory, as part of a CUDA graph. Without a
//! GPU they are skipped; `src/gpu/tests.rs` has them on a driver's stand-in.

use std::io::Write;

use attn_kernels::SoftmaxOptions;
use attn_kernels::gpu::{Device, DeviceView, quadratic};
use cudarc::driver::CudaSlice;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::f16;

use crate::common::gpu;

const WIDTH: usize = 64;
const KEYS: usize = 4096;

/// Heads whose keys are divided among blocks, so that their parts lie in a workspace.
const HEADS: usize = 2;

fn device() -> Option<&'static Device> {
    let skip = |why| writeln!(std::io::stderr(), "SKIPPED: {why}");
    gpu::device().map_err(skip).ok()
}

fn numbers(device: &Device) -> CudaSlice<f16> {
    let numbers = (0..HEADS * KEYS * WIDTH).map(|i| f16::from_f32((i * i % 97) as f32 / 97.0 - 0.5));
    device.stream().clone_htod(&numbers.collect::<Vec<_>>()).unwrap()
}

fn room(device: &Device) -> CudaSlice<f16> {
    device.stream().alloc_zeros(HEADS * WIDTH).unwrap()
}

/// The first key of each head asks all of them.
fn attend(device: &Device, x: &CudaSlice<f16>, out: &mut CudaSlice<f16>) -> attn_kernels::Result<()> {
    let strides = [HEADS * KEYS * WIDTH, KEYS * WIDTH, WIDTH, 1];
    let view = |rows| DeviceView::new(x, &[1, HEADS, rows, WIDTH], &strides);
    let inputs = quadratic::QuadraticInputs::new(view(1)?, view(KEYS)?, view(KEYS)?);
    let problem = SoftmaxOptions::default().problem("test", &inputs.q, &inputs.k, &inputs.v)?;
    quadratic::forward(device, &problem, &inputs, out.into(), None)
}

#[test]
fn threads_share_a_device() {
    let Some(device) = device() else { return };
    let device = device.keeping_workspaces();
    let (x, mut out) = (numbers(&device), room(&device));
    attend(&device, &x, &mut out).unwrap();
    let expected = device.stream().clone_dtoh(&out).unwrap();
    assert!(expected.iter().any(|&number| number != f16::ZERO) && device.workspace_bytes() > 0);
    let rooms: Vec<_> = (0..8).map(|_| room(&device)).collect();
    let threads: Vec<_> = std::thread::scope(|scope| {
        let call = |mut out| {
            attend(&device, &x, &mut out).unwrap();
            out
        };
        let threads: Vec<_> = rooms.into_iter().map(|out| scope.spawn(move || call(out))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for out in threads {
        assert_eq!(device.stream().clone_dtoh(&out).unwrap(), expected);
    }
}

#[test]
fn graphs_replay() {
    let Some(device) = device() else { return };
    let stream = device.stream().context().new_stream().unwrap();
    // SAFETY: all that follows is on one stream.
    unsafe { stream.context().disable_event_tracking() };
    let device = Device::on(stream).unwrap().keeping_workspaces();
    let (stream, x, mut out) = (device.stream(), numbers(&device), room(&device));
    attend(&device, &x, &mut out).unwrap();
    let expected = stream.clone_dtoh(&out).unwrap();
    stream.memset_zeros(&mut out).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    attend(&device, &x, &mut out).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a graph");
    assert!(stream.clone_dtoh(&out).unwrap().iter().all(|&number| number == f16::ZERO));
    for _ in 0..2 {
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&out).unwrap(), expected);
        stream.memset_zeros(&mut out).unwrap();
    }
}
