//! The driver: whether it is there, and what devices it has.

use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Attribute};
use cudarc::driver::{DriverError, result};

use super::info::DeviceInfo;
use super::module;
use super::plan::{DeviceFacts, TensorMap};
use crate::problem::DType;

/// The oldest CUDA whose drivers have every function that is called: tensor maps came with it.
const OLDEST: (u32, u32) = (12, 0);

/// Opens the driver, once, and gives the newest CUDA that it supports. To be called before anything else of the
/// driver: a library or function that is missing makes the bindings panic.
pub fn open() -> Result<(u32, u32), String> {
    static OPENED: OnceLock<Result<(u32, u32), String>> = OnceLock::new();
    OPENED.get_or_init(|| find_library().and_then(|()| version())).clone()
}

fn find_library() -> Result<(), String> {
    let names = if cfg!(windows) { ["nvcuda.dll", "nvcuda"] } else { ["libcuda.so.1", "libcuda.so"] };
    // SAFETY: these names are the CUDA driver's, whose initialisers and finalisers any program may run.
    let found = names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok());
    if found { Ok(()) } else { Err(format!("no CUDA driver ({}) on this machine", names[0])) }
}

fn version() -> Result<(u32, u32), String> {
    let mut version = 0;
    // SAFETY: the function writes an int to the address, which is that of a live local; it needs no initialisation.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    status.result().map_err(|error| format!("the CUDA driver does not answer: {}", describe(error)))?;
    let version = version.unsigned_abs();
    Ok((version / 1000, version % 1000 / 10))
}

/// Why kernels that a toolkit compiled do not run on a driver, which may be of an earlier minor version, not of an
/// earlier major one.
pub fn refusal(driver: (u32, u32), toolkit: Option<(u32, u32)>) -> Option<String> {
    let named = |(major, minor): (u32, u32)| format!("CUDA {major}.{minor}");
    let toolkit = toolkit.filter(|toolkit| toolkit.0 > driver.0);
    match toolkit {
        _ if driver < OLDEST => {
            Some(format!("the driver is for {}, one for {} or later is needed", named(driver), named(OLDEST)))
        }
        Some(toolkit) => Some(format!(
            "the driver is for {}, the kernels were compiled by {} and need one for CUDA {}.0 or later",
            named(driver),
            named(toolkit),
            toolkit.0
        )),
        None => None,
    }
}

/// All devices of an open driver, none of which is opened. What one of them does not say is in [`DeviceInfo::unused`].
pub fn devices() -> Result<Vec<DeviceInfo>, String> {
    let count = result::init().and_then(|()| result::device::get_count());
    let count = count.map_err(|error| format!("the CUDA driver has no usable device: {}", describe(error)))?;
    Ok((0..count).map(device).collect())
}

fn device(ordinal: i32) -> DeviceInfo {
    let mut info = DeviceInfo { name: "?".into(), facts: DeviceFacts::default(), memory: 0, unused: None };
    let mut ask = || -> Result<(), DriverError> {
        let device = result::device::get(ordinal)?;
        info.name = result::device::get_name(device)?;
        info.facts = facts(device)?;
        // SAFETY: the device is one that the driver named.
        info.memory = unsafe { result::device::total_mem(device) }?;
        Ok(())
    };
    let unused = ask().err().map(|error| format!("the driver does not say what it is: {}", describe(error)));
    DeviceInfo { unused, ..info }
}

/// What plans depend on; no context is needed.
pub fn facts(device: CUdevice) -> Result<DeviceFacts, DriverError> {
    // SAFETY: a device's number, which the driver checks.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) }.map(i32::unsigned_abs);
    let compute_capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    Ok(DeviceFacts {
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        compute_capability,
        runs_sm90a: compute_capability == (9, 0) && module::built().0.contains(&"sm_90a"),
    })
}

/// The copy engine's form of a tensor map, for a tensor at an address.
pub fn tensor_map(map: &TensorMap, address: u64) -> Result<[u64; 16], String> {
    use sys::CUtensorMapDataType as Kind;
    let kind = match map.dtype {
        DType::F16 => Kind::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => Kind::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F32 => Kind::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        other => return Err(format!("there are no tensor maps of {other}")),
    };
    let swizzle = match map.is_swizzled {
        true => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        false => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    let every = [1u32; 4];
    let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the driver is open, since there is an address, and has the function (`OLDEST`). It reads four sizes, three strides, four sizes of the box
    // and four steps, writes 128 bytes to a live local that is aligned as its type asks, and does not access the address.
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut encoded,
            kind,
            4,
            address as *mut std::ffi::c_void,
            map.sizes.as_ptr(),
            map.strides.as_ptr(),
            map.block.as_ptr(),
            every.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    status.result().map_err(|error| format!("encoding {map}: {}", describe(error)))?;
    Ok(encoded.opaque)
}

/// Name and meaning of a driver's error.
pub fn describe(error: DriverError) -> String {
    let text = |text: Result<&std::ffi::CStr, _>| text.map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(meaning)) => format!("{name}, {meaning}"),
        _ => format!("{:?}", error.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_drivers_are_refused_in_words() {
        assert_eq!(refusal((12, 4), Some((12, 8))), None);
        assert_eq!(refusal((13, 0), Some((12, 8))), None);
        assert_eq!(refusal((12, 0), None), None);
        let old = refusal((11, 8), Some((13, 0)));
        assert_eq!(old.as_deref(), Some("the driver is for CUDA 11.8, one for CUDA 12.0 or later is needed"));
        let other =
            "the driver is for CUDA 12.9, the kernels were compiled by CUDA 13.2 and need one for CUDA 13.0 or later";
        assert_eq!(refusal((12, 9), Some((13, 2))).as_deref(), Some(other));
    }
}
