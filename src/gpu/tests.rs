//! Calls of the driver in order, on one that stands in for it (`tests/stand_in/driver.c`): it refuses what the driver
//! refuses and computes nothing. Each test runs in a process of its own, which finds the stand-in in place of the driver.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::{env, fs};

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaStream};

use super::launch::{Arguments, Device};
use super::module::{Fatbin, Kernels};
use super::params::Pointer;
use super::plan::{Argument, Launch, Plan, TensorMap};
use crate::problem::DType;

static KERNELS: &[Fatbin] = &[Fatbin::new("copy.cu", &["copy", "twice"], b"image\0")];

/// Whether this is the process of the test; in any other it is started, and its end awaited.
fn stands_in(test: &str, settings: &[(&str, &str)]) -> bool {
    if env::var_os("STAND_IN_LOG").is_some() {
        return true;
    }
    let folder = library();
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("gpu::tests::{test}"), "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .env("STAND_IN_LOG", folder.join(test))
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    false
}

/// The folder that the stand-in is in, compiled once.
fn library() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = PathBuf::from(env!("OUT_DIR")).join("stand_in");
        fs::create_dir_all(&folder).unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand_in/driver.c");
        let (library, compiler) = (folder.join("libcuda.so"), env::var("CC").unwrap_or("cc".into()));
        let status = Command::new(compiler).args(["-shared", "-fPIC", source, "-o"]).arg(library).status().unwrap();
        assert!(status.success());
        folder
    })
}

/// What the stand-in was asked since the last time.
fn asked() -> Vec<String> {
    let path = env::var("STAND_IN_LOG").unwrap();
    let lines = fs::read_to_string(&path).unwrap_or_default().lines().map(String::from).collect();
    let _ = fs::remove_file(path);
    lines
}

fn device(stream: impl Fn(&Arc<CudaContext>) -> Arc<CudaStream>) -> Device {
    let stream = stream(&CudaContext::new(0).unwrap());
    let kernels = Kernels::new(stream.context(), KERNELS).unwrap();
    Device { stream, kernels: Arc::new(kernels), kept: None }
}

crate::kernel_params! {
    struct CopyParams {
        q: Pointer,
        sums: Pointer,
    }
}

/// One launch, which takes a tensor by address and by map, and a workspace.
fn plan(kernel: &str) -> Plan {
    let mut plan = Plan::default();
    let params = CopyParams { q: Argument::Q.into(), sums: plan.workspace(512).into() };
    let map =
        TensorMap::of(Argument::Q, DType::F16, [64; 3], [64, 1, 1, 1], [64, 1]).expect("a map that the driver takes");
    let mut launch = Launch::new(kernel, [1; 3], 32, 0, &params);
    launch.params.resize(256, 0);
    launch.tensor_maps.push((128, map));
    plan.launches.push(launch);
    plan
}

fn run(device: &Device, kernel: &str) -> crate::Result<()> {
    // SAFETY: nothing reads it.
    let mut memory = unsafe { device.stream().alloc::<u8>(128) }.unwrap();
    run_on(device, kernel, &mut memory)
}

fn run_on(device: &Device, kernel: &str, memory: &mut cudarc::driver::CudaSlice<u8>) -> crate::Result<()> {
    let mut view = memory.as_view_mut();
    let mut arguments = Arguments::new(device, "copy")?;
    arguments.memory(Argument::Q, &mut view);
    device.run("copy", &plan(kernel), arguments)
}

/// Threads that have not seen the device: kernels that are loaded already and such that are not, memory that is kept.
#[test]
fn context_is_bound_first() {
    if !stands_in("context_is_bound_first", &[]) {
        return;
    }
    let device = device(CudaContext::default_stream).keeping_workspaces();
    // SAFETY: nothing reads it.
    let mut memory = unsafe { device.stream().alloc::<u8>(128) }.unwrap();
    run_on(&device, "copy", &mut memory).unwrap();
    for kernel in ["copy", "twice"] {
        asked();
        std::thread::scope(|scope| scope.spawn(|| run_on(&device, kernel, &mut memory)).join().unwrap()).unwrap();
        let asked = asked();
        assert_eq!(asked.first().map(String::as_str), Some("bind"), "{asked:?}");
        assert_eq!(asked.iter().filter(|line| line.starts_with("launch")).count(), 1, "{asked:?}");
    }
    assert_eq!(device.workspace_bytes(), 512);
}

/// Plans in the same memory, each on the default stream of its own thread.
#[test]
fn kept_workspaces_are_ordered() {
    if !stands_in("kept_workspaces_are_ordered", &[]) {
        return;
    }
    let device = device(CudaContext::per_thread_stream).keeping_workspaces();
    for kernel in ["copy", "copy", "twice", "no such kernel"] {
        let result = std::thread::scope(|scope| scope.spawn(|| run(&device, kernel)).join().unwrap());
        assert_eq!(result.is_err(), kernel == "no such kernel");
    }
    drop(device);
    let (mut working, mut done) = (false, None);
    for line in asked() {
        let (what, which) = line.split_once(' ').unwrap_or((&line, ""));
        match what {
            "record" => (working, done) = (false, Some(which.to_string())),
            "wait" => assert_eq!(done.take().as_deref(), Some(which), "waits for what was done last"),
            "launch" => {
                assert!(done.is_none() && !working, "launches behind the wait, and records behind the launch");
                working = true;
            }
            _ => {}
        }
    }
    assert!(!working && done.is_none(), "what is kept is freed behind the last plan");
}

#[test]
fn info_opens_no_device() {
    if !stands_in("info_opens_no_device", &[("STAND_IN_DEVICES", "3"), ("STAND_IN_BROKEN", "1")]) {
        return;
    }
    let info = crate::gpu::info();
    assert_eq!(
        info.devices.iter().map(|device| &device.name[..]).collect::<Vec<_>>(),
        ["Stand-in 0", "Stand-in 1", "Stand-in 2"]
    );
    let why = info.devices[1].unused.as_deref();
    assert_eq!(why, Some("the driver does not say what it is: CUDA_ERROR, number 46"));
    assert_eq!(info.devices[0].facts, info.devices[2].facts);
    assert_eq!(info.devices[2].facts.multiprocessors, 132);
    assert_eq!(asked(), [""; 0]);
}

#[test]
fn old_drivers_get_a_sentence() {
    if !stands_in("old_drivers_get_a_sentence", &[("STAND_IN_VERSION", "11080")]) {
        return;
    }
    let why = "the driver is for CUDA 11.8, one for CUDA 12.0 or later is needed";
    assert!(Device::new(0).is_err_and(|error| error.to_string().contains(why)));
    let info = crate::gpu::info();
    assert_eq!((info.driver, info.devices[0].unused.as_deref()), (Some((11, 8)), Some(why)));
    assert_eq!(asked(), [""; 0]);
}

/// A call joins a graph when all that it needs is there, and is refused otherwise without harm to the capture.
#[test]
fn graphs() {
    if !stands_in("graphs", &[]) {
        return;
    }
    let device = device(|context| context.new_stream().unwrap());
    let (kept, stream) = (device.keeping_workspaces(), device.stream());
    let begin = || stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let end = || {
        assert_eq!(stream.capture_status(), Ok(CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE));
        assert!(stream.end_capture(CUgraphInstantiate_flags(0)).is_ok());
    };
    let refused = |device: &Device, memory: &mut _, why: &str| {
        begin();
        asked();
        let error = run_on(device, "copy", memory).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert!(!asked().iter().any(|line| line.starts_with("wait") || line.starts_with("launch")));
        end();
    };
    // SAFETY: nothing reads it.
    let mut memory = unsafe { stream.alloc::<u8>(128) }.unwrap();
    refused(&kept, &mut memory, "CudaContext::disable_event_tracking");
    // SAFETY: there is one stream.
    unsafe { stream.context().disable_event_tracking() };
    refused(&kept, &mut memory, "on a device that keeps workspaces");
    run_on(&device, "copy", &mut memory).unwrap();
    refused(&device, &mut memory, "on a device that keeps workspaces");
    run_on(&kept, "twice", &mut memory).unwrap();
    let fresh = Device { kernels: Arc::new(Kernels::new(stream.context(), KERNELS).unwrap()), ..kept.clone() };
    refused(&fresh, &mut memory, "not loaded yet");
    begin();
    asked();
    run_on(&kept, "copy", &mut memory).unwrap();
    assert_eq!(asked(), ["encode", "launch copy"]);
    end();
}
