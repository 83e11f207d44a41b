//! candle's devices.

use candle_core::Device;

use super::device::DeviceKind;

/// The CPU, or the first CUDA device.
///
/// # Errors
/// Why there is no such device.
pub fn open(kind: DeviceKind) -> Result<Device, String> {
    match kind {
        DeviceKind::Cpu => Ok(Device::Cpu),
        DeviceKind::Gpu if !cfg!(feature = "cuda") => {
            Err("--device gpu: candle's CUDA tensors need the feature `cuda`".into())
        }
        DeviceKind::Gpu => Device::new_cuda(0).map_err(|error| format!("--device gpu: {error}")),
    }
}

/// What a table calls the device.
pub fn name(device: &Device) -> &'static str {
    if device.is_cuda() { "gpu" } else { "cpu" }
}
