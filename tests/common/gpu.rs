//! Runs plans on a GPU, each tensor and workspace between bytes that must not change.

use std::sync::OnceLock;

use attn_kernels::gpu::plan::{Argument, Plan};
use attn_kernels::gpu::{Arguments, Device, info};

use super::executor::{Outputs, Tensor};

/// Bytes of 0xff on either side; keeps the alignment of allocations.
const GUARD: usize = 4096;

/// The first usable GPU, or why there is none.
pub fn device() -> Result<&'static Device, &'static str> {
    static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
    let open = || {
        let info = info();
        let first = info.devices.iter().position(|device| device.unused.is_none());
        match (info.unused, first) {
            (None, Some(ordinal)) => Device::new(ordinal).map_err(|error| error.to_string()),
            (why, _) => Err(why.unwrap_or("no usable device".into())),
        }
    };
    DEVICE.get_or_init(open).as_ref().map_err(String::as_str)
}

/// Runs the launches twice from the same contents; both runs must give the same bits.
pub fn run(plan: &Plan, tensors: &[Tensor]) -> Result<Outputs, String> {
    let device = device()?;
    let workspaces = plan.workspaces.iter().enumerate();
    let workspaces =
        workspaces.map(|(i, &bytes)| Tensor { is_output: false, ..Tensor::output(Argument::Workspace(i), bytes) });
    let tensors: Vec<Tensor> = tensors.iter().cloned().chain(workspaces).collect();
    let first = run_once(device, plan, &tensors)?;
    let second = run_once(device, plan, &tensors)?;
    for ((argument, x), y) in first.iter().zip(second.values()) {
        if let Some(at) = x.iter().zip(y).position(|(x, y)| x != y) {
            return Err(format!("{argument:?} differs on repeat from byte {at} on\n{plan}"));
        }
    }
    Ok(first)
}

fn run_once(device: &Device, plan: &Plan, tensors: &[Tensor]) -> Result<Outputs, String> {
    let failed = |error: String| format!("{error}\n{plan}");
    let stream = device.stream();
    let contents: Vec<Vec<u8>> = tensors.iter().map(guarded).collect();
    let upload = |content| stream.clone_htod(content).map_err(|error| failed(error.to_string()));
    let mut memory = contents.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
    let mut views: Vec<_> = memory.iter_mut().zip(tensors).map(|(m, t)| m.slice_mut(GUARD + t.start..)).collect();
    let mut arguments = Arguments::new(device, "test").map_err(|error| failed(error.to_string()))?;
    views.iter_mut().zip(tensors).for_each(|(view, tensor)| arguments.memory(tensor.argument, view));
    device.run("test", plan, arguments).map_err(|error| failed(error.to_string()))?;
    drop(views);
    let mut outputs = Outputs::new();
    for ((tensor, before), memory) in tensors.iter().zip(&contents).zip(&memory) {
        let after = stream.clone_dtoh(memory).map_err(|error| failed(error.to_string()))?;
        let own = GUARD..GUARD + tensor.bytes;
        // Outputs and workspaces may change, inputs and surroundings may not.
        let may_change = |at: &usize| tensor.content.is_none() && own.contains(at);
        if let Some(at) = (0..after.len()).find(|at| before[*at] != after[*at] && !may_change(at)) {
            let at = at as i64 - GUARD as i64;
            return Err(failed(format!("byte {at} of the {} of {:?} was written", tensor.bytes, tensor.argument)));
        }
        if tensor.is_output {
            outputs.insert(tensor.argument, after[own].to_vec());
        }
    }
    Ok(outputs)
}

/// The first content, with its surroundings.
fn guarded(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0xff; tensor.bytes + 2 * GUARD];
    if let Some(content) = &tensor.content {
        bytes[GUARD..][..tensor.bytes].copy_from_slice(content);
    }
    bytes
}
