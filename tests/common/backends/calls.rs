//! The calls that return what they have allocated.

use attn_kernels::cpu::{self, Attention, Element, LinearAttention, LinearState, LinearStateGradient};
use attn_kernels::problem::{DType, StateShapes};
use attn_kernels::reference::Array;
use half::{bf16, f16};

use super::super::buffers::{Buffer, Operand};
use super::super::cases::{Case, Operation};
use super::super::data::Data;
use super::super::options::With;
use super::super::reference::Results;
use super::cpu::Operands;
use super::{Backend, Pass};

/// `cpu::softmax` and its siblings, on the instruction set that is picked.
pub struct Calls;

impl Backend for Calls {
    fn name(&self) -> String {
        "cpu/calls".into()
    }

    fn is_available(&self) -> bool {
        true
    }

    /// A state that is not causal is refused: the first piece would have to read the last one.
    fn takes(&self, case: &Case) -> bool {
        (case.prefix == 0 && !case.state_gradient) || is_causal(&case.operation)
    }

    fn run(&self, case: &Case, data: &Data, dtype: DType, pass: Pass) -> Result<Results, String> {
        let operands = &Operands::new(case, data, dtype);
        let ran = match dtype {
            DType::F16 => run::<f16>(operands, case, data, pass),
            DType::BF16 => run::<bf16>(operands, case, data, pass),
            DType::F32 => run::<f32>(operands, case, data, pass),
            _ => run::<f64>(operands, case, data, pass),
        };
        ran.map_err(|error| error.to_string())
    }
}

fn is_causal(operation: &Operation) -> bool {
    match operation {
        Operation::Linear(o) => o.causal,
        Operation::Performer(o, _) => o.causal,
        Operation::Norm(o) => o.causal,
        _ => false,
    }
}

/// An element that a buffer can hold.
trait Stored: Element {
    fn buffer(elements: Vec<Self>) -> Buffer;
    fn elements(buffer: Buffer) -> Vec<Self>;
}

macro_rules! stored {
    ($($element:ident $name:ident),*) => { $(
        impl Stored for $element {
            fn buffer(elements: Vec<Self>) -> Buffer {
                Buffer::$name(elements)
            }

            fn elements(buffer: Buffer) -> Vec<Self> {
                match buffer {
                    Buffer::$name(elements) => elements,
                    other => panic!("{other:?}"),
                }
            }
        }
    )* };
}

stored!(f16 F16, bf16 BF16, f32 F32, f64 F64);

fn array<T: Stored>(elements: Vec<T>, shape: [usize; 4]) -> Array {
    T::buffer(elements).array(shape)
}

/// An array without gaps.
fn elements<T: Stored>(array: &Array) -> Vec<T> {
    let mut buffer = Buffer::filled(T::DTYPE, array.data.len(), 0.0);
    array.data.iter().enumerate().for_each(|(index, &x)| buffer.set(index, x));
    T::elements(buffer)
}

fn run<T: Stored>(operands: &Operands, case: &Case, data: &Data, pass: Pass) -> attn_kernels::Result<Results>
where
    T::Sum: Stored,
{
    let (q, k, v, extras) = (operands.q.view(), operands.k.view(), operands.v.view(), operands.extras());
    let omega = operands.omega.as_ref().map(Operand::view);
    let state = data.state.as_ref().map(|_| state::<T::Sum>(data));
    let state = state.as_ref();
    match &case.operation {
        Operation::Softmax(o) => attention::<T>(data, cpu::softmax(q, k, v, &o.with(extras))?, pass, true),
        Operation::Diag(o) => attention::<T>(data, cpu::diag(q, k, v, &o.with(extras))?, pass, false),
        Operation::Gau(o) => attention::<T>(data, cpu::gau(q, k, v, &o.with(extras))?, pass, false),
        Operation::Linear(o) if o.causal => {
            let (call, state) = cpu::linear_with_state(q, k, v, &o.with(extras), state)?;
            linear::<T>(data, call, Some(state), pass)
        }
        Operation::Norm(o) if o.causal => {
            let (call, state) = cpu::norm_with_state(q, k, v, &o.with(extras), state)?;
            linear::<T>(data, call, Some(state), pass)
        }
        Operation::Performer(o, _) if o.causal => {
            let omega = omega.expect("ω of a Performer");
            let (call, state) = cpu::performer_with_state(q, k, v, omega, &o.with(extras), state)?;
            linear::<T>(data, call, Some(state), pass)
        }
        Operation::Linear(o) => linear::<T>(data, cpu::linear(q, k, v, &o.with(extras))?, None, pass),
        Operation::Norm(o) => linear::<T>(data, cpu::norm(q, k, v, &o.with(extras))?, None, pass),
        Operation::Performer(o, _) => {
            let omega = omega.expect("ω of a Performer");
            linear::<T>(data, cpu::performer(q, k, v, omega, &o.with(extras))?, None, pass)
        }
        Operation::MixedChunk(o) => {
            let global = operands.global.as_ref().expect("operands of the global branch").each_ref();
            mixed_chunk::<T>(data, cpu::mixed_chunk([q, k], global.map(Operand::view), v, &o.with(extras))?, pass)
        }
    }
}

fn state<S: Stored>(data: &Data) -> LinearState<S> {
    let state = data.state.as_ref().expect("a case with a prefix");
    let [batch, _, heads, features] = state.z.shape;
    let shapes = StateShapes {
        s: state.s.shape,
        z: [batch, heads, features],
        stabilizer: state.stabilizer.as_ref().map(|_| [batch, heads]),
    };
    let stabilizer = state.stabilizer.as_ref().map(elements);
    LinearState { s: elements(&state.s), z: elements(&state.z), stabilizer, position: data.position, shapes }
}

fn attention<T: Stored>(data: &Data, call: Attention<'_, T>, pass: Pass, lse: bool) -> attn_kernels::Result<Results>
where
    T::Sum: Stored,
{
    let [batch, heads, queries, _] = data.d_out.shape;
    let mut results = Results::default();
    results.push("out", array(call.out.clone(), data.d_out.shape));
    if lse {
        results.push("log_sum_exp", array(call.statistic.clone(), [batch, heads, queries, 1]));
    }
    if pass == Pass::Forward {
        return Ok(results);
    }
    let d_out = elements(&data.d_out);
    let gradients = match &data.d_lse {
        Some(d_lse) => call.backward_with_statistic(&d_out, &elements::<T::Sum>(d_lse))?,
        None => call.backward(&d_out)?,
    };
    results.push("d_q", array(gradients.q, data.q.shape));
    results.push("d_k", array(gradients.k, data.k.shape));
    results.push("d_v", array(gradients.v, data.v.shape));
    let bias = gradients.bias.zip(data.extras.bias.as_ref());
    results.push("d_bias", bias.map(|(d_bias, bias)| array(d_bias, bias.shape)));
    let of = |d: Option<Vec<T::Sum>>, x: &Option<Array>| d.zip(x.as_ref()).map(|(d, x)| array(d, x.shape));
    results.push("d_attention_bias", of(gradients.attention_bias, &data.extras.attention_bias));
    results.push("d_sinks", of(gradients.sinks, &data.extras.sinks));
    Ok(results)
}

fn linear<T: Stored>(
    data: &Data,
    call: LinearAttention<'_, T>,
    state: Option<LinearState<T::Sum>>,
    pass: Pass,
) -> attn_kernels::Result<Results>
where
    T::Sum: Stored,
{
    let mut results = Results::default();
    results.push("out", array(call.out.clone(), data.d_out.shape));
    if let Some(LinearState { s, z, stabilizer, position, shapes }) = state {
        assert_eq!(position, data.position + data.k.shape[2]);
        let [batch, heads, features] = shapes.z;
        results.push("state.s", array(s, shapes.s));
        results.push("state.z", array(z, [batch, 1, heads, features]));
        results.push("state.stabilizer", stabilizer.map(|c| array(c, [1, 1, batch, heads])));
    }
    if pass == Pass::Forward {
        return Ok(results);
    }
    let d_out = elements(&data.d_out);
    let gradients = match &data.d_state {
        None => call.backward(&d_out)?,
        Some(d) => {
            let d_state = LinearStateGradient { s: elements(&d.s), z: elements(&d.z) };
            call.backward_with_state(&d_out, Some(&d_state))?
        }
    };
    results.push("d_q", array(gradients.q, data.q.shape));
    results.push("d_k", array(gradients.k, data.k.shape));
    results.push("d_v", array(gradients.v, data.v.shape));
    if let Some((d_state, first)) = gradients.state.zip(data.state.as_ref()) {
        results.push("d_state.s", array(d_state.s, first.s.shape));
        results.push("d_state.z", array(d_state.z, first.z.shape));
    }
    let log_decay = gradients.log_decay.zip(data.extras.log_decay.as_ref());
    results.push("d_log_decay", log_decay.map(|(d, log_decay)| array(d, log_decay.shape)));
    Ok(results)
}

fn mixed_chunk<T: Stored>(data: &Data, call: cpu::MixedChunk<'_, T>, pass: Pass) -> attn_kernels::Result<Results> {
    let mut results = Results::default();
    results.push("out", array(call.out.clone(), data.d_out.shape));
    if pass == Pass::Forward {
        return Ok(results);
    }
    let gradients = call.backward(&elements(&data.d_out))?;
    let [q, k] = data.global.as_ref().expect("operands of the global branch");
    results.push("d_q", array(gradients.q_quad, data.q.shape));
    results.push("d_k", array(gradients.k_quad, data.k.shape));
    results.push("d_q_global", array(gradients.q_lin, q.shape));
    results.push("d_k_global", array(gradients.k_lin, k.shape));
    results.push("d_v", array(gradients.v, data.v.shape));
    let bias = gradients.bias.zip(data.extras.bias.as_ref());
    results.push("d_bias", bias.map(|(d_bias, bias)| array(d_bias, bias.shape)));
    Ok(results)
}
