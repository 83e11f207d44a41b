//! Every mechanism on tensors of a safetensors file.

use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::Outcome;
use crate::common::check::{Expected, Scope};
use crate::common::inputs::{Given, Shape};
use crate::common::table::table;
use crate::common::tensor::{Buffer, Tensor};
use crate::common::{Call, Device, Inputs, Mechanism, Pass};
use crate::operations::outcome;

/// Prints the table and returns its rows.
///
/// # Errors
/// If the file cannot be read, lacks a tensor or has one that does not fit.
pub fn run(device: &Device, file: &Path, causal: bool) -> Result<Vec<Outcome>, String> {
    let fail = |error: String| format!("--input {}: {error}", file.display());
    let bytes = std::fs::read(file).map_err(|error| fail(error.to_string()))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| fail(error.to_string()))?;
    let inputs = inputs(&tensors).map_err(fail)?;
    let wanted = match tensors.tensor("out") {
        Ok(_) => Some(tensor(&tensors, "out", &output_dims(&inputs.shape).map(Some)).map_err(fail)?),
        Err(_) => None,
    };
    let mechanisms: Vec<_> = Mechanism::ALL.into_iter().filter(|mechanism| mechanism.supports(causal)).collect();
    let mut outcomes = Vec::new();
    let mut softmax = Vec::new();
    for mechanism in mechanisms {
        let (outcome, out) =
            compare(device, mechanism, causal, &inputs, &softmax).map_err(|error| fail(error.to_string()))?;
        outcomes.push(outcome);
        if mechanism == Mechanism::Softmax {
            softmax = out;
            outcomes[0].max_difference_to_out = wanted.as_ref().map(|wanted| max_difference(&softmax, wanted));
        }
    }
    print(device, &inputs, &outcomes);
    Ok(outcomes)
}

/// Runs a mechanism; returns its output too. `softmax` is that of softmax, if already there.
fn compare(
    device: &Device,
    mechanism: Mechanism,
    causal: bool,
    inputs: &Inputs,
    softmax: &[f64],
) -> attn_kernels::Result<(Outcome, Vec<f64>)> {
    let call = Call::new(mechanism, causal, inputs)?;
    let mut outcome = outcome(mechanism, Pass::Fwd, inputs.float, device.path().name);
    outcome.add(&Expected::new(&call, Pass::Fwd, Scope::Whole).check(device)?.0);
    let results = device.results(&call, Pass::Fwd, &inputs.d_out)?;
    let out = results[0].data.to_f64();
    outcome.distance_to_softmax = Some(if softmax.is_empty() { 0.0 } else { distance(&out, softmax) });
    Ok((outcome, out))
}

/// ‖x − y‖/‖y‖
fn distance(x: &[f64], y: &[f64]) -> f64 {
    let squares: f64 = x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum();
    (squares / y.iter().map(|y| y * y).sum::<f64>()).sqrt()
}

fn max_difference(x: &[f64], y: &Tensor) -> f64 {
    x.iter()
        .zip(y.data.to_f64())
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |largest: f64, x| if x <= largest { largest } else { x })
}

fn print(device: &Device, inputs: &Inputs, outcomes: &[Outcome]) {
    let mut table = table(&["mechanism", "RMS error", "worst row's error", "distance to softmax"], 1);
    for outcome in outcomes {
        let distance = outcome.distance_to_softmax.map_or("-".into(), |distance| format!("{distance:.3}"));
        table.add_row([outcome.mechanism.to_string()].into_iter().chain(outcome.cells()).chain([distance]));
    }
    println!("{} on {}, {:?}\n{table}", inputs.float, device.path().name, inputs.shape);
    if let Some(difference) = outcomes[0].max_difference_to_out {
        println!("softmax: largest difference to `out` {difference:.2e}");
    }
}

fn output_dims(shape: &Shape) -> [usize; 4] {
    [shape.batch, shape.heads, shape.queries, shape.value_width]
}

fn inputs(tensors: &SafeTensors<'_>) -> Result<Inputs, String> {
    let [q, k, v] = ["q", "k", "v"].map(|name| tensor(tensors, name, &[None; 4]));
    let (q, k, v) = (q?, k?, v?);
    let shape = Shape {
        batch: q.dims[0],
        heads: q.dims[1],
        key_heads: k.dims[1],
        queries: q.dims[2],
        keys: k.dims[2],
        width: q.dims[3],
        value_width: v.dims[3],
    };
    let key_mask = match tensors.tensor("key_mask") {
        Ok(_) => Some(key_mask(tensors, &shape)?),
        Err(_) => None,
    };
    let d_out = Tensor::zeros(q.data.float(), &output_dims(&shape));
    Ok(Inputs { float: q.data.float(), shape, q, k, v, d_out, key_mask, given: Given::default() })
}

fn key_mask(tensors: &SafeTensors<'_>, shape: &Shape) -> Result<Vec<u8>, String> {
    let mask = tensors.tensor("key_mask").map_err(|error| error.to_string())?;
    let needs = [shape.batch, shape.keys];
    if mask.shape() != needs || !matches!(mask.dtype(), Dtype::U8 | Dtype::BOOL) {
        let (dtype, dims) = (mask.dtype(), mask.shape());
        return Err(format!("`key_mask` is {dtype:?} of shape {dims:?}, needs U8 or BOOL of shape {needs:?}"));
    }
    Ok(mask.data().to_vec())
}

/// A float tensor of the given sizes; `None` is any.
fn tensor(tensors: &SafeTensors<'_>, name: &str, needs: &[Option<usize>; 4]) -> Result<Tensor, String> {
    let tensor =
        tensors.tensor(name).map_err(|_| format!("no tensor `{name}`, only {}", tensors.names().join(", ")))?;
    let dims = tensor.shape();
    if dims.len() != 4 || dims.iter().zip(needs).any(|(&size, needs)| needs.is_some_and(|needs| needs != size)) {
        let needs: Vec<String> = needs.iter().map(|size| size.map_or("_".into(), |size| size.to_string())).collect();
        return Err(format!("`{name}` has shape {dims:?}, needs [{}]", needs.join(", ")));
    }
    if dims.contains(&0) {
        return Err(format!("`{name}` has shape {dims:?}, needs elements"));
    }
    let data = tensor.data();
    let data = match tensor.dtype() {
        Dtype::F32 => Buffer::F32(data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()),
        Dtype::F64 => Buffer::F64(data.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect()),
        Dtype::F16 => Buffer::F16(data.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes)).collect()),
        Dtype::BF16 => Buffer::Bf16(data.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes)).collect()),
        other => return Err(format!("`{name}` is {other:?}, needs F32, F64, F16 or BF16")),
    };
    Ok(Tensor { data, dims: dims.to_vec() })
}
