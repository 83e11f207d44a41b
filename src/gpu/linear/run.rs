//! The linear engine on tensors in a device's memory.

use super::super::launch::{Arguments, Device};
use super::super::plan::Argument;
use super::super::view::{DeviceSliceMut, DeviceView, strides};
use super::{ForwardOutputs, LinearLayout, SavedLayout, StateLayout, plan_backward, plan_forward};
use crate::Result;
use crate::problem::{Elements, Linear, Operand, StateMut, StateView, ensure_alone, ensure_value};

/// The operands, as views of device memory.
pub type LinearInputs<'a> = crate::problem::LinearInputs<DeviceView<'a>>;
/// Device memory that receives the results.
pub type LinearOutputs<'a> = crate::problem::LinearOutputs<DeviceSliceMut<'a>>;
/// What the forward pass left behind, as views of device memory.
pub type LinearSaved<'a> = crate::problem::LinearSaved<DeviceView<'a>>;
/// Device memory that receives the gradients.
pub type LinearGradients<'a> = crate::problem::LinearGradients<DeviceSliceMut<'a>>;

/// Puts the computation of the output and, on demand, of the row statistic and the final state on the device's stream.
///
/// The numbers of the log-decay are not looked at: positive ones and NaN give results without meaning.
///
/// # Errors
/// Operands that do not match the problem, outputs of another length or dtype, and what the device refuses.
pub fn forward(
    device: &Device,
    problem: &Linear,
    inputs: &LinearInputs<'_>,
    mut outputs: LinearOutputs<'_>,
) -> Result<()> {
    inputs.check(problem)?;
    ensure_alone(problem.function, problem.shapes.sequences.as_ref())?;
    outputs.check(problem)?;
    let asked = ForwardOutputs {
        wide_out: outputs.out.dtype() != problem.shapes.dtype,
        statistic: outputs.statistic.is_some() && problem.statistic_len() > 0,
        state: outputs.state.is_some(),
    };
    let mut arguments = Arguments::new(device, problem.function)?;
    read_inputs(&mut arguments, inputs);
    let plan = plan_forward(problem, &layout(inputs, &arguments), asked, device.facts());
    arguments.write(Argument::Out, &mut outputs.out);
    if let Some(statistic) = &mut outputs.statistic {
        arguments.write(Argument::Statistic, statistic);
    }
    if let Some(StateMut { s, z, stabilizer }) = &mut outputs.state {
        arguments.write(Argument::FinalS, s);
        arguments.write(Argument::FinalZ, z);
        if let Some(stabilizer) = stabilizer {
            arguments.write(Argument::FinalStabilizer, stabilizer);
        }
    }
    device.run(problem.function, &plan, arguments)
}

/// Puts the computation of the gradients of q, k, v and of the log-decay per token on the device's stream. A state
/// handed in is taken as constant.
///
/// # Errors
/// Operands that do not match the problem, gradients of another length or dtype, and what the device refuses.
pub fn backward(
    device: &Device,
    problem: &Linear,
    inputs: &LinearInputs<'_>,
    saved: &LinearSaved<'_>,
    mut gradients: LinearGradients<'_>,
) -> Result<()> {
    inputs.check(problem)?;
    ensure_alone(problem.function, problem.shapes.sequences.as_ref())?;
    saved.check(problem)?;
    gradients.check(problem, inputs)?;
    let given = saved.d_state.is_some() || gradients.state.is_some();
    ensure_value(!given, problem.function, "gradient of state", "given or asked for", "none on a GPU")?;
    let dtype = gradients.v.dtype();
    ensure_value(dtype == problem.shapes.dtype, problem.function, "gradient of v", dtype, "the dtype of v on a GPU")?;
    let statistic = saved.statistic.as_ref().map_or([0; 3], |statistic| match statistic.strides() {
        [batch, row] => [*batch as i64, 0, *row as i64],
        _ => strides(statistic),
    });
    let mut arguments = Arguments::new(device, problem.function)?;
    read_inputs(&mut arguments, inputs);
    arguments.read(Argument::Out, &saved.out);
    arguments.read(Argument::DOut, &saved.d_out);
    let saved_layout = SavedLayout {
        out: strides(&saved.out),
        d_out: strides(&saved.d_out),
        statistic,
        wide_out: saved.out.dtype() != problem.shapes.dtype,
        d_log_decay: gradients.log_decay.is_some(),
        is_aligned: arguments.are_aligned(&[Argument::DOut]),
    };
    let plan = plan_backward(problem, &layout(inputs, &arguments), &saved_layout, device.facts());
    if let Some(statistic) = &saved.statistic {
        arguments.read(Argument::Statistic, statistic);
    }
    arguments.write(Argument::DQ, &mut gradients.q);
    arguments.write(Argument::DK, &mut gradients.k);
    arguments.write(Argument::DV, &mut gradients.v);
    if let Some(log_decay) = &mut gradients.log_decay {
        arguments.write(Argument::DLogDecay, log_decay);
    }
    device.run(problem.function, &plan, arguments)
}

fn layout(inputs: &LinearInputs<'_>, arguments: &Arguments<'_>) -> LinearLayout {
    LinearLayout {
        q: strides(&inputs.q),
        k: strides(&inputs.k),
        v: strides(&inputs.v),
        key_mask: inputs.key_mask.as_ref().map(|mask| strides::<1>(mask)[0]),
        log_decay: inputs.log_decay.as_ref().map_or([0; 3], |log_decay| match log_decay.strides() {
            [head] => [0, *head as i64, 0],
            _ => strides(log_decay),
        }),
        omega: inputs.omega.as_ref().map_or(0, |omega| strides::<1>(omega)[0]),
        state: inputs.state.as_ref().map(|StateView { s, z, stabilizer, position }| StateLayout {
            s: strides(s),
            z: strides(z),
            stabilizer: stabilizer.as_ref().map_or([0; 2], strides),
            position: *position,
        }),
        is_aligned: arguments.are_aligned(&[Argument::Q, Argument::K, Argument::V]),
    }
}

fn read_inputs<'a>(arguments: &mut Arguments<'a>, inputs: &'a LinearInputs<'_>) {
    let state = inputs.state.as_ref();
    let given = [
        (Argument::Q, Some(&inputs.q)),
        (Argument::K, Some(&inputs.k)),
        (Argument::V, Some(&inputs.v)),
        (Argument::KeyMask, inputs.key_mask.as_ref()),
        (Argument::LogDecay, inputs.log_decay.as_ref()),
        (Argument::Omega, inputs.omega.as_ref()),
        (Argument::StateS, state.map(|state| &state.s)),
        (Argument::StateZ, state.map(|state| &state.z)),
        (Argument::StateStabilizer, state.and_then(|state| state.stabilizer.as_ref())),
    ];
    for (argument, view) in given {
        view.into_iter().for_each(|view| arguments.read(argument, view));
    }
}
