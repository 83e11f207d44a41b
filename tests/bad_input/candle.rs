//! The table on candle tensors.

use attn_kernels::candle::*;
use candle_core::{Device, Result};

use super::call::{Call, Tensor};
use crate::common::backends::candle::candle_dtype;
use crate::common::cases::Operation;
use crate::common::options::{Extras, With};

fn tensor(described: &Tensor) -> Result<candle_core::Tensor> {
    candle_core::Tensor::full(described.fill, &described.dims[..], &Device::Cpu)?
        .to_dtype(candle_dtype(described.dtype))
}

fn optional(described: &Option<Tensor>) -> Result<Option<candle_core::Tensor>> {
    described.as_ref().map(tensor).transpose()
}

/// The output of a call; through the form with state when one is given.
fn run(call: &Call) -> Result<candle_core::Tensor> {
    let (q, k, v) = (&tensor(&call.q)?, &tensor(&call.k)?, &tensor(&call.v)?);
    let omega = &tensor(&call.omega)?;
    let extras = Extras {
        key_mask: optional(&call.key_mask)?,
        bias: optional(&call.bias)?,
        log_decay: optional(&call.log_decay)?,
        attention_bias: optional(&call.attention_bias)?,
        sinks: optional(&call.sinks)?,
    };
    let state = match &call.state {
        Some([s, z]) => Some(LinearState::new(tensor(s)?, tensor(z)?, optional(&call.stabilizer)?, 3)),
        None => None,
    };
    let state = state.as_ref();
    match &call.operation {
        Operation::Softmax(o) => softmax_attention(q, k, v, &o.with(extras)),
        Operation::Diag(o) => diag_attention(q, k, v, &o.with(extras)),
        Operation::Gau(o) => gau_attention(q, k, v, &o.with(extras)),
        Operation::Linear(o) if state.is_some() => Ok(linear_attention_with_state(q, k, v, &o.with(extras), state)?.0),
        Operation::Linear(o) => linear_attention(q, k, v, &o.with(extras)),
        Operation::Norm(o) if state.is_some() => Ok(norm_attention_with_state(q, k, v, &o.with(extras), state)?.0),
        Operation::Norm(o) => norm_attention(q, k, v, &o.with(extras)),
        Operation::Performer(o, _) if state.is_some() => {
            Ok(performer_attention_with_state(q, k, v, omega, &o.with(extras), state)?.0)
        }
        Operation::Performer(o, _) => performer_attention(q, k, v, omega, &o.with(extras)),
        Operation::MixedChunk(o) => {
            let (q_lin, k_lin) = (tensor(&call.q_lin)?, tensor(&call.k_lin)?);
            mixed_chunk_attention(q, k, &q_lin, &k_lin, v, &o.with(extras))
        }
    }
}

#[test]
fn refused() {
    super::check(|call| match run(call) {
        Ok(_) => Err("was computed".into()),
        Err(error) => Ok(error.to_string()),
    });
}

#[test]
fn baselines_are_accepted() {
    super::check_baselines(|call| {
        let out = run(call).and_then(|out| out.sum_all()).map_err(|error| error.to_string())?;
        let sum = out.to_scalar::<f32>().map_err(|error| error.to_string())?;
        if sum.is_finite() { Ok(()) } else { Err(format!("sums to {sum}")) }
    });
}
