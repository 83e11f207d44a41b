//! Calls of the linear engine.

use attn_kernels::Result;
use attn_kernels::cpu::linear::{self, LinearGradients, LinearInputs, LinearOutputs, LinearSaved};
use attn_kernels::problem::Linear;

use super::call::{Call, Gradients, Outputs};
use super::inputs::Inputs;
use super::tensor::Tensor;

fn inputs<'a>(call: &'a Call<'_>) -> Result<LinearInputs<'a>> {
    let Inputs { q, k, v, .. } = call.inputs;
    Ok(LinearInputs {
        q: q.view()?,
        k: k.view()?,
        v: v.view()?,
        key_mask: call.key_mask()?,
        log_decay: call.log_decay.as_ref().map(Tensor::view).transpose()?,
        omega: call.omega.as_ref().map(Tensor::view).transpose()?,
        state: None,
    })
}

pub fn forward(call: &Call<'_>, problem: &Linear, outputs: &mut Outputs) -> Result<()> {
    let statistic = outputs.statistic.as_mut().map(|statistic| statistic.data.slice_mut());
    let outputs = LinearOutputs { out: outputs.out.data.slice_mut(), statistic, state: None };
    linear::forward(problem, &inputs(call)?, outputs)
}

pub fn backward(
    call: &Call<'_>,
    problem: &Linear,
    outputs: &Outputs,
    d_out: &Tensor,
    gradients: &mut Gradients,
) -> Result<()> {
    let statistic = outputs.statistic.as_ref().filter(|_| problem.statistic_len() > 0);
    let statistic = statistic.map(Tensor::view).transpose()?;
    let saved = LinearSaved { out: outputs.out.view()?, statistic, d_out: d_out.view()? };
    let gradients = LinearGradients {
        q: gradients.q.data.slice_mut(),
        k: gradients.k.data.slice_mut(),
        v: gradients.v.data.slice_mut(),
        log_decay: None,
    };
    linear::backward(problem, &inputs(call)?, &saved, gradients)
}
