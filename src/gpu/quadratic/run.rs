//! The quadratic engine on tensors in a device's memory.

use super::super::launch::{Arguments, Device};
use super::super::plan::Argument;
use super::super::view::{DeviceSliceMut, DeviceView, strides};
use super::{QuadraticLayout, QuadraticOutputs, QuadraticSavedLayout, plan_backward, plan_forward};
use crate::Result;
use crate::problem::{Elements, Operand, Quadratic, ensure_value};

/// The operands, as views of device memory.
pub type QuadraticInputs<'a> = crate::problem::QuadraticInputs<DeviceView<'a>>;
/// What the forward pass left behind, as views of device memory.
pub type QuadraticSaved<'a> = crate::problem::QuadraticSaved<DeviceView<'a>>;
/// Device memory that receives the gradients.
pub type QuadraticGradients<'a> = crate::problem::QuadraticGradients<DeviceSliceMut<'a>>;

/// Puts the computation of the output [B, H, N, E] and, on demand, of the row statistic [B, H, N] that the backward pass
/// needs on the device's stream.
///
/// # Errors
/// Operands that do not match the problem, outputs of another length or dtype, and what the device refuses.
pub fn forward(
    device: &Device,
    problem: &Quadratic,
    inputs: &QuadraticInputs<'_>,
    mut out: DeviceSliceMut<'_>,
    mut statistic: Option<DeviceSliceMut<'_>>,
) -> Result<()> {
    inputs.check(problem)?;
    problem.ensure_on_gpu()?;
    problem.check_outputs(&out, statistic.as_ref())?;
    let asked = QuadraticOutputs { wide_out: out.dtype() != problem.shapes.dtype, statistic: statistic.is_some() };
    let mut arguments = Arguments::new(device, problem.function)?;
    read_inputs(&mut arguments, inputs);
    let plan = plan_forward(problem, &layout(inputs, &arguments), asked, device.facts());
    arguments.write(Argument::Out, &mut out);
    if let Some(statistic) = &mut statistic {
        arguments.write(Argument::Statistic, statistic);
    }
    device.run(problem.function, &plan, arguments)
}

/// Puts the computation of the gradients of q, k, v and the bias on the device's stream.
///
/// # Errors
/// Operands that do not match the problem, gradients of another length or dtype, and what the device refuses.
pub fn backward(
    device: &Device,
    problem: &Quadratic,
    inputs: &QuadraticInputs<'_>,
    saved: &QuadraticSaved<'_>,
    mut gradients: QuadraticGradients<'_>,
) -> Result<()> {
    inputs.check(problem)?;
    problem.ensure_on_gpu()?;
    saved.check(problem)?;
    gradients.check(problem)?;
    let dtype = gradients.v.dtype();
    ensure_value(dtype == problem.shapes.dtype, problem.function, "gradient of v", dtype, "the dtype of v on a GPU")?;
    if let Some(bias) = &gradients.bias {
        let (dtype, needs) = (bias.dtype(), "the dtype of the bias on a GPU");
        ensure_value(dtype == problem.shapes.dtype, problem.function, "gradient of bias", dtype, needs)?;
    }
    let mut arguments = Arguments::new(device, problem.function)?;
    read_inputs(&mut arguments, inputs);
    arguments.read(Argument::Out, &saved.out);
    arguments.read(Argument::Statistic, &saved.statistic);
    arguments.read(Argument::DOut, &saved.d_out);
    if let Some(d_statistic) = &saved.d_statistic {
        arguments.read(Argument::DStatistic, d_statistic);
    }
    let saved_layout = QuadraticSavedLayout {
        out: strides(&saved.out),
        d_out: strides(&saved.d_out),
        statistic: strides(&saved.statistic),
        d_statistic: saved.d_statistic.as_ref().map(strides),
        wide_out: saved.out.dtype() != problem.shapes.dtype,
        d_bias: gradients.bias.is_some(),
        is_aligned: arguments.are_aligned(&[Argument::DOut]),
    };
    let plan = plan_backward(problem, &layout(inputs, &arguments), &saved_layout, device.facts());
    arguments.write(Argument::DQ, &mut gradients.q);
    arguments.write(Argument::DK, &mut gradients.k);
    arguments.write(Argument::DV, &mut gradients.v);
    if let Some(bias) = &mut gradients.bias {
        arguments.write(Argument::DBias, bias);
    }
    device.run(problem.function, &plan, arguments)
}

fn layout(inputs: &QuadraticInputs<'_>, arguments: &Arguments<'_>) -> QuadraticLayout {
    QuadraticLayout {
        q: strides(&inputs.q),
        k: strides(&inputs.k),
        v: strides(&inputs.v),
        key_mask: inputs.key_mask.as_ref().map(|mask| strides::<1>(mask)[0]),
        bias: inputs.bias.as_ref().map_or(0, |bias| strides::<1>(bias)[0]),
        is_aligned: arguments.are_aligned(&[Argument::Q, Argument::K, Argument::V]),
    }
}

fn read_inputs<'a>(arguments: &mut Arguments<'a>, inputs: &'a QuadraticInputs<'_>) {
    let given = [
        (Argument::Q, Some(&inputs.q)),
        (Argument::K, Some(&inputs.k)),
        (Argument::V, Some(&inputs.v)),
        (Argument::KeyMask, inputs.key_mask.as_ref()),
        (Argument::Bias, inputs.bias.as_ref()),
    ];
    for (argument, view) in given {
        view.into_iter().for_each(|view| arguments.read(argument, view));
    }
}
