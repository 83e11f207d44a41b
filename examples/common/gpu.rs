//! The GPU backend, and its timing by events on the device.

use std::sync::Arc;
use std::time::{Duration, Instant};

use attn_kernels::gpu::{self, DeviceSlice, DeviceSliceMut, Info, linear, quadratic};
use attn_kernels::problem::{Linear, Quadratic, Slice};
use attn_kernels::{Error, Result};
use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags};
use cudarc::driver::{CudaSlice, CudaStream, DriverError};
use half::{bf16, f16};

use super::backend::Backend;
use super::call::Call;
use super::cost;
use super::device::Samples;
use super::mechanism::Pass;
use super::run::Run;
use super::tensor::{Buffer, Float};

/// Runs that are put on the stream at once, and the fewest that are timed.
const BATCH: usize = 20;
/// Bytes that the device clears, and how often, while the host puts a batch on the stream: about a millisecond. So the
/// times are those of the device, without gaps in which it waits for the host, and the first run finds no operand in
/// the cache.
const CLEARED: (usize, usize) = (1 << 28, 16);

#[derive(Clone)]
pub struct Gpu {
    device: gpu::Device,
    name: String,
    cache_bytes: usize,
}

fn failed(doing: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Gpu { function: "--device gpu", doing: doing.into(), why: error.to_string() }
}

impl Gpu {
    /// The first that the kernels of this build run on.
    ///
    /// # Errors
    /// Why there is none.
    pub fn open(info: &Info) -> std::result::Result<Self, String> {
        if let Some(why) = &info.unused {
            return Err(why.clone());
        }
        // Before, `cuEventElapsedTime` has another name.
        if info.driver.is_some_and(|version| version < (12, 8)) {
            return Err("timing by events on the GPU needs a driver for CUDA 12.8 or later".into());
        }
        let usable = info.devices.iter().enumerate().find(|(_, device)| device.unused.is_none());
        let (ordinal, found) = usable.ok_or("the driver has no device")?;
        let device = gpu::Device::new(ordinal).map_err(|error| error.to_string())?;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        let cache_bytes = device.stream().context().attribute(attribute).map_err(|error| error.to_string())?;
        Ok(Self { device, name: found.name.clone(), cache_bytes: cache_bytes.unsigned_abs() as usize })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.device.stream()
    }
}

/// Float elements on the device.
pub enum DeviceBuffer {
    F32(CudaSlice<f32>),
    Bf16(CudaSlice<bf16>),
    F16(CudaSlice<f16>),
    F64(CudaSlice<f64>),
}

pub enum DeviceOperand {
    Floats(DeviceBuffer),
    Mask(CudaSlice<u8>),
}

/// Evaluates `$body` with `$x` bound to the elements, whatever their type.
macro_rules! each {
    ($buffer:expr, $x:ident => $body:expr) => {
        match $buffer {
            DeviceBuffer::F32($x) => $body,
            DeviceBuffer::Bf16($x) => $body,
            DeviceBuffer::F16($x) => $body,
            DeviceBuffer::F64($x) => $body,
        }
    };
}

impl Backend for Gpu {
    type Operand<'a> = DeviceOperand;
    type Room = DeviceBuffer;
    type Slice<'a> = DeviceSlice<'a>;
    type SliceMut<'a> = DeviceSliceMut<'a>;

    fn operand<'a>(&self, elements: Slice<'a>) -> Result<DeviceOperand> {
        let (stream, failed) = (self.stream(), failed("copying an operand to the device"));
        let floats = match elements {
            Slice::F32(x) => DeviceBuffer::F32(stream.clone_htod(x).map_err(failed)?),
            Slice::BF16(x) => DeviceBuffer::Bf16(stream.clone_htod(x).map_err(failed)?),
            Slice::F16(x) => DeviceBuffer::F16(stream.clone_htod(x).map_err(failed)?),
            Slice::F64(x) => DeviceBuffer::F64(stream.clone_htod(x).map_err(failed)?),
            Slice::U8(x) => return Ok(DeviceOperand::Mask(stream.clone_htod(x).map_err(failed)?)),
        };
        Ok(DeviceOperand::Floats(floats))
    }

    fn room(&self, float: Float, len: usize) -> Result<DeviceBuffer> {
        let (stream, failed) = (self.stream(), failed("allocating memory for a result"));
        Ok(match float {
            Float::F32 => DeviceBuffer::F32(stream.alloc_zeros(len).map_err(failed)?),
            Float::Bf16 => DeviceBuffer::Bf16(stream.alloc_zeros(len).map_err(failed)?),
            Float::F16 => DeviceBuffer::F16(stream.alloc_zeros(len).map_err(failed)?),
            Float::F64 => DeviceBuffer::F64(stream.alloc_zeros(len).map_err(failed)?),
        })
    }

    fn fetch(&self, room: DeviceBuffer) -> Result<Buffer> {
        let (stream, copying) = (self.stream(), failed("copying a result from the device"));
        let buffer = match &room {
            DeviceBuffer::F32(x) => Buffer::F32(stream.clone_dtoh(x).map_err(copying)?),
            DeviceBuffer::Bf16(x) => Buffer::Bf16(stream.clone_dtoh(x).map_err(copying)?),
            DeviceBuffer::F16(x) => Buffer::F16(stream.clone_dtoh(x).map_err(copying)?),
            DeviceBuffer::F64(x) => Buffer::F64(stream.clone_dtoh(x).map_err(copying)?),
        };
        stream.synchronize().map_err(failed("waiting for a result"))?;
        Ok(buffer)
    }

    fn read<'a>(operand: &'a DeviceOperand) -> DeviceSlice<'a> {
        match operand {
            DeviceOperand::Floats(floats) => Self::read_room(floats),
            DeviceOperand::Mask(mask) => mask.into(),
        }
    }

    fn read_room(room: &DeviceBuffer) -> DeviceSlice<'_> {
        each!(room, x => x.into())
    }

    fn write(room: &mut DeviceBuffer) -> DeviceSliceMut<'_> {
        each!(room, x => x.into())
    }

    /// There is no kernel for it.
    fn add(&self, _: &mut DeviceBuffer, y: DeviceBuffer) -> Option<DeviceBuffer> {
        Some(y)
    }

    fn quadratic_forward(
        &self,
        problem: &Quadratic,
        inputs: &quadratic::QuadraticInputs<'_>,
        out: DeviceSliceMut<'_>,
        statistic: Option<DeviceSliceMut<'_>>,
    ) -> Result<()> {
        quadratic::forward(&self.device, problem, inputs, out, statistic)
    }

    fn quadratic_backward(
        &self,
        problem: &Quadratic,
        inputs: &quadratic::QuadraticInputs<'_>,
        saved: &quadratic::QuadraticSaved<'_>,
        gradients: quadratic::QuadraticGradients<'_>,
    ) -> Result<()> {
        quadratic::backward(&self.device, problem, inputs, saved, gradients)
    }

    fn linear_forward(
        &self,
        problem: &Linear,
        inputs: &linear::LinearInputs<'_>,
        outputs: linear::LinearOutputs<'_>,
    ) -> Result<()> {
        linear::forward(&self.device, problem, inputs, outputs)
    }

    fn linear_backward(
        &self,
        problem: &Linear,
        inputs: &linear::LinearInputs<'_>,
        saved: &linear::LinearSaved<'_>,
        gradients: linear::LinearGradients<'_>,
    ) -> Result<()> {
        linear::backward(&self.device, problem, inputs, saved, gradients)
    }
}

/// Copies of a call that are run in turn, enough for none to find its operands in the cache, on the same workspaces.
pub struct Rotation<'c> {
    gpu: Gpu,
    runs: Vec<Run<'c, Gpu>>,
    cleared: CudaSlice<u8>,
    passes: &'static [Pass],
    extra_bytes: usize,
}

impl<'c> Rotation<'c> {
    /// Runs every copy once, so that kernels are loaded and memory is allocated. `passes` are run one after the other in
    /// each sample.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(gpu: &Gpu, call: &'c Call<'c>, passes: &'static [Pass]) -> Result<Self> {
        let pass = if passes.contains(&Pass::Bwd) { Pass::Bwd } else { Pass::Fwd };
        let plain = gpu;
        let gpu = Gpu { device: plain.device.keeping_workspaces(), ..plain.clone() };
        let copies = (2.0 * gpu.cache_bytes as f64 / cost::bytes(call, pass)).ceil() as usize;
        let mut runs = Vec::new();
        for _ in 0..copies.clamp(1, BATCH) {
            let mut run = Run::new(plain.clone(), call, pass, &call.inputs.d_out)?;
            if pass == Pass::Bwd {
                run.forward()?;
            }
            run.set_backend(gpu.clone());
            passes.iter().try_for_each(|&pass| run.one(pass))?;
            runs.push(run);
        }
        let cleared = gpu.stream().alloc_zeros(CLEARED.0).map_err(failed("allocating memory to clear"))?;
        let extra_bytes = gpu.device.workspace_bytes() + runs[0].rest_bytes();
        Ok(Self { gpu, runs, cleared, passes, extra_bytes })
    }

    /// # Errors
    /// Those of the device.
    pub fn sample(&mut self, samples: usize, budget: Duration) -> Result<Samples> {
        let start = Instant::now();
        let (mut seconds, mut host_seconds) = (Vec::new(), f64::INFINITY);
        while seconds.is_empty() || (seconds.len() < samples && start.elapsed() < budget) {
            let (batch, host) = self.batch()?;
            seconds.extend(batch);
            host_seconds = host_seconds.min(host);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(Samples { seconds, host_seconds, extra_bytes: self.extra_bytes })
    }

    /// Seconds of each run on the device, and of putting one on the stream.
    fn batch(&mut self) -> Result<(Vec<f64>, f64)> {
        let Self { gpu, runs, cleared, passes, .. } = self;
        let (stream, timing) = (gpu.stream(), failed("timing"));
        let now = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(&timing);
        for _ in 0..CLEARED.1 {
            stream.memset_zeros(cleared).map_err(&timing)?;
        }
        let mut spans = Vec::with_capacity(BATCH);
        let before = Instant::now();
        for i in 0..BATCH {
            let copy = i % runs.len();
            let start = now()?;
            passes.iter().try_for_each(|&pass| runs[copy].one(pass))?;
            spans.push((start, now()?));
        }
        let host_seconds = before.elapsed().as_secs_f64() / BATCH as f64;
        let seconds = spans.iter().map(|(start, end)| Ok(f64::from(start.elapsed_ms(end).map_err(&timing)?) / 1e3));
        Ok((seconds.collect::<Result<_>>()?, host_seconds))
    }
}
