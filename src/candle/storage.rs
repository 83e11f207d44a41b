//! Elements of contiguous tensors, for operations on elements on the CPU.

use candle_core::{CpuStorage, Layout, Result, WithDType};

/// The elements of a contiguous tensor.
pub fn elements<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let all = storage.as_slice::<T>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => candle_core::bail!("elements of a tensor that is not contiguous"),
    }
}

/// A vector as a storage, computed with T the type of the elements of `$like`: f64, else f32.
macro_rules! by_dtype {
    ($like:expr, $t:ident => $vector:expr) => {
        match $like {
            candle_core::CpuStorage::F64(_) => {
                type $t = f64;
                <$t as candle_core::WithDType>::to_cpu_storage_owned($vector)
            }
            _ => {
                type $t = f32;
                <$t as candle_core::WithDType>::to_cpu_storage_owned($vector)
            }
        }
    };
}
pub(crate) use by_dtype;
