//! Where a call runs, as a value.

use std::time::Duration;

use attn_kernels::Result;
use attn_kernels::cpu::Isa;
use attn_kernels::gpu::{Info, info};
use clap::ValueEnum;

use super::backend::Cpu;
use super::call::Call;
#[cfg(feature = "gpu")]
use super::gpu::{Gpu, Rotation};
use super::measure;
use super::mechanism::Pass;
use super::run::Run;
use super::tensor::Tensor;

/// The choice of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The CPU backend
    Cpu,
    /// The first GPU that the kernels of this build run on; needs the feature `gpu`
    Gpu,
}

#[derive(Clone)]
pub enum Device {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu(Gpu),
}

impl Device {
    /// # Errors
    /// Why there is no such device.
    pub fn open(kind: DeviceKind) -> std::result::Result<Self, String> {
        match kind {
            DeviceKind::Cpu => Ok(Self::Cpu),
            DeviceKind::Gpu => open_gpu(&info()).map_err(|why| format!("--device gpu: {why}")),
        }
    }

    /// `cpu`, or what the driver calls the GPU.
    pub fn name(&self) -> &str {
        match self {
            Self::Cpu => "cpu",
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => gpu.name(),
        }
    }

    /// All ways in which it computes.
    pub fn paths(&self) -> Vec<Path> {
        match self {
            Self::Cpu => {
                let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
                available.map(|isa| Path { name: isa.name(), forced: Some(isa) }).collect()
            }
            #[cfg(feature = "gpu")]
            Self::Gpu(_) => vec![self.path()],
        }
    }

    /// The way in which it computes if nothing is forced.
    pub fn path(&self) -> Path {
        match self {
            Self::Cpu => Path { name: Isa::current().name(), forced: None },
            #[cfg(feature = "gpu")]
            Self::Gpu(_) => Path { name: "gpu", forced: None },
        }
    }

    /// Runs a call and brings its results to main memory, in the order of [`results`](super::reference::results).
    ///
    /// # Errors
    /// Those of the device.
    pub fn results(&self, call: &Call<'_>, pass: Pass, d_out: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Self::Cpu => Run::new(Cpu, call, pass, d_out)?.both_passes(),
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => Run::new(gpu.clone(), call, pass, d_out)?.both_passes(),
        }
    }

    /// Makes a call ready to be timed.
    ///
    /// # Errors
    /// Those of the device.
    pub fn timed<'c>(&self, call: &'c Call<'c>, pass: Pass) -> Result<Timed<'c>> {
        match self {
            Self::Cpu => {
                let mut run = Run::new(Cpu, call, pass, &call.inputs.d_out)?;
                if pass == Pass::Bwd {
                    run.forward()?;
                }
                Ok(Timed::Cpu(Box::new(run)))
            }
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => Ok(Timed::Gpu(Box::new(Rotation::new(gpu, call, pass.alone())?))),
        }
    }
}

#[cfg(not(feature = "gpu"))]
fn open_gpu(info: &Info) -> std::result::Result<Device, String> {
    Err(info.unused.clone().unwrap_or_default())
}

#[cfg(feature = "gpu")]
fn open_gpu(info: &Info) -> std::result::Result<Device, String> {
    Gpu::open(info).map(Device::Gpu)
}

/// One way in which a device computes.
#[derive(Clone, Copy)]
pub struct Path {
    pub name: &'static str,
    forced: Option<Isa>,
}

impl Path {
    /// # Errors
    /// If the processor lacks what is forced.
    pub fn run<R>(self, compute: impl FnOnce() -> R) -> std::result::Result<R, String> {
        match self.forced {
            None => Ok(compute()),
            Some(isa) => isa.force(compute).ok_or_else(|| format!("{} is not available", isa.name())),
        }
    }
}

/// A call with operands and room for results in place.
pub enum Timed<'c> {
    Cpu(Box<Run<'c, Cpu>>),
    #[cfg(feature = "gpu")]
    Gpu(Box<Rotation<'c>>),
}

pub struct Samples {
    /// Of one run each, sorted.
    pub seconds: Vec<f64>,
    /// What the host is busy for with one run: on the CPU all of it, for a GPU putting it on the stream.
    pub host_seconds: f64,
    /// Memory beyond operands and results: what is allocated on the CPU, what the plans of a GPU ask for.
    pub extra_bytes: usize,
}

impl Timed<'_> {
    /// At least `samples` runs, fewer once `budget` is spent; 20 or more on a GPU.
    ///
    /// # Errors
    /// Those of the device.
    pub fn sample(&mut self, samples: usize, budget: Duration) -> Result<Samples> {
        match self {
            Self::Cpu(run) => {
                let (seconds, extra_bytes) = measure::peak_bytes(|| measure::sample(samples, budget, || run.pass()));
                let seconds = seconds?;
                Ok(Samples { host_seconds: measure::median(&seconds), seconds, extra_bytes })
            }
            #[cfg(feature = "gpu")]
            Self::Gpu(rotation) => rotation.sample(samples, budget),
        }
    }
}
