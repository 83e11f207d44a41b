//! The linear engine on tensors.

use candle_core::{DType, Device, Result, Tensor};

use super::backend::{Backend, on_device};
use super::graph::{GradientRooms, Gradients, Inputs, Node, Ready, attach, zero};
use super::reading::{Readings, read};
use super::results::{Results, Returned};
use super::tensors::{Admission, Buffer, accumulator, buffer, end_to_end, is_cut, rows, tensor, viewable};
use crate::candle::LinearState;
use crate::problem::{
    Decay, Linear, LinearGradients, LinearInputs, LinearOutputs, LinearSaved, StateGradient, StateMut, StateView,
};

/// The tensors of a call that may be absent.
#[derive(Default)]
pub struct LinearTensors<'a> {
    pub key_mask: Option<&'a Tensor>,
    pub log_decay: Option<&'a Tensor>,
    pub omega: Option<&'a Tensor>,
    pub state: Option<&'a LinearState>,
}

/// A problem with its tensors.
pub struct LinearCall {
    problem: Linear,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// What stands for v in the graph: v in the dtype of sums, for a gradient that is not rounded yet.
    wide_v: Option<Tensor>,
    key_mask: Option<Tensor>,
    log_decay: Option<Tensor>,
    omega: Option<Tensor>,
    state: Option<LinearState>,
}

impl LinearCall {
    pub fn new(problem: Linear, [q, k, v]: [&Tensor; 3], tensors: LinearTensors<'_>) -> Result<Self> {
        let admission = Admission::new(problem.function, q);
        let constant =
            |argument, tensor: Option<&Tensor>| tensor.map(|tensor| admission.constant(argument, tensor)).transpose();
        let LinearTensors { key_mask, log_decay, omega, state } = tensors;
        Ok(Self {
            q: admission.differentiable("q", q)?,
            k: admission.differentiable("k", k)?,
            v: admission.differentiable("v", v)?,
            wide_v: None,
            key_mask: constant("key_mask", key_mask)?,
            log_decay: match problem.shapes.decay {
                Decay::Token => log_decay.map(|decay| admission.differentiable("log_decay", decay)).transpose()?,
                Decay::Head | Decay::None => constant("log_decay", log_decay)?,
            },
            omega: constant("omega", omega)?,
            state: state.map(|state| admit_state(&problem, admission, state)).transpose()?,
            problem,
        })
    }

    /// The same with `wide`, which is v in the dtype of sums, as the input of the graph.
    pub fn with_wide_v(self, wide: Option<&Tensor>) -> Self {
        Self { wide_v: wide.cloned(), ..self }
    }

    /// The output in the dtype of q.
    pub fn output(self) -> Result<Tensor> {
        let dtype = self.q.dtype();
        self.output_in(dtype)
    }

    /// The output in `dtype`: that of q or that of sums.
    pub fn output_in(self, dtype: DType) -> Result<Tensor> {
        if is_cut(self.problem.shapes.sequences.as_ref(), &self.q) {
            let outs: Vec<_> = self.parts().map(|part| part?.output_in(dtype)).collect::<Result<_>>()?;
            return Tensor::cat(&outs, 2);
        }
        let (out, statistic) = self.forward(dtype, None)?;
        let shape = self.output_shape();
        attach(OutputNode::new(self, statistic, None)?, out, &shape[..])
    }

    /// The output in the dtype of q, and the state after the last key.
    pub fn output_and_state(self) -> Result<(Tensor, LinearState)> {
        let dtype = self.q.dtype();
        self.output_and_state_in(dtype)
    }

    /// The output in `dtype`, that of q or that of sums, and the state after the last key.
    pub fn output_and_state_in(self, dtype: DType) -> Result<(Tensor, LinearState)> {
        if is_cut(self.problem.shapes.sequences.as_ref(), &self.q) {
            let pairs: Vec<_> = self.parts().map(|part| part?.output_and_state_in(dtype)).collect::<Result<_>>()?;
            let (outs, states): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            return Ok((Tensor::cat(&outs, 2)?, LinearState::cat(&states)?));
        }
        let mut room = StateRoom::new(self.q.device(), &self.problem, accumulator(dtype))?;
        let (out, statistic) = self.forward(dtype, Some(&mut room))?;
        let position = self.state.as_ref().map_or(0, LinearState::position);
        let position = position.saturating_add(self.problem.shapes.longest());
        let shape = self.output_shape();
        if !self.is_tracked() {
            return Ok((tensor(out, &shape[..]), room.into_state(&self.problem, position)));
        }
        if !self.q.device().is_cpu() {
            let state = room.into_state(&self.problem, position);
            return Ok((attach(OutputNode::new(self, statistic, None)?, out, &shape[..])?, state));
        }
        let (name, shapes) = (self.problem.function, self.problem.state_shapes());
        let StateRoom { s, z, stabilizer } = room;
        let results = Results::<3>::default();
        let token = Results::<3>::token(self.q.device())?;
        let token = attach(OutputNode::new(self, statistic, Some(results.clone()))?, token, 3)?;
        let hand_out = |index, result, dims: &[usize]| results.hand_out(&token, index, Ready::new(name, result, dims));
        let stabilizer = stabilizer.zip(shapes.stabilizer).map(|(room, dims)| tensor(room, &dims[..]));
        let (s, z) = (hand_out(1, s, &shapes.s)?, hand_out(2, z, &shapes.z)?);
        Ok((hand_out(0, out, &shape)?, LinearState::new(s, z, stabilizer, position)))
    }

    /// B, H, N, E
    fn output_shape(&self) -> [usize; 4] {
        let shapes = &self.problem.shapes;
        [shapes.batch, shapes.heads(), shapes.queries, shapes.value_width]
    }

    /// Those of the log-decay, S and z that receive a gradient.
    fn extras(&self) -> [Option<&Tensor>; 3] {
        let state = self.state.as_ref();
        let extras = [self.log_decay.as_ref(), state.map(LinearState::s), state.map(LinearState::z)];
        extras.map(|extra| extra.filter(|extra| extra.track_op()))
    }

    fn is_tracked(&self) -> bool {
        let rows = [&self.q, &self.k, self.wide_v.as_ref().unwrap_or(&self.v)];
        rows.into_iter().chain(self.extras().into_iter().flatten()).any(Tensor::track_op)
    }

    /// The call of each sequence.
    pub fn parts(&self) -> impl Iterator<Item = Result<Self>> {
        self.problem.parts().map(|(part, problem)| {
            let [queries, keys] = [&part.queries, &part.keys].map(|range| |x: &Tensor| rows(x, range));
            let state = |state: &LinearState| part.sequence.map_or(Ok(state.clone()), |index| state.entry(index));
            let is_per_token = problem.shapes.decay == Decay::Token;
            let log_decay = |x: &Tensor| if is_per_token { keys(x) } else { Ok(x.clone()) };
            Ok(Self {
                q: queries(&self.q)?,
                k: keys(&self.k)?,
                v: keys(&self.v)?,
                wide_v: self.wide_v.as_ref().map(keys).transpose()?,
                key_mask: self.key_mask.as_ref().map(keys).transpose()?,
                log_decay: self.log_decay.as_ref().map(log_decay).transpose()?,
                omega: self.omega.clone(),
                state: self.state.as_ref().map(state).transpose()?,
                problem,
            })
        })
    }

    /// Calls an engine with the operands, while `saved` can be read, too.
    fn compute<B: Backend>(
        &self,
        backend: &B,
        saved: &[&Tensor],
        engine: impl FnOnce(&LinearInputs<B::View<'_>>, Readings<'_>) -> Result<()>,
    ) -> Result<()> {
        let optional = [&self.key_mask, &self.log_decay, &self.omega].into_iter().flatten();
        let state = self.state.iter().flat_map(LinearState::tensors);
        let operands = [&self.q, &self.k, &self.v].into_iter().chain(optional).chain(state);
        let tensors: Vec<&Tensor> = operands.chain(saved.iter().copied()).collect();
        read(&tensors, |readings| {
            let view = |tensor: &Tensor| readings.view(backend, tensor);
            let optional = |tensor: Option<&Tensor>| readings.optional(backend, tensor);
            let state = |state: &LinearState| -> Result<StateView<B::View<'_>>> {
                let stabilizer = optional(state.stabilizer())?;
                Ok(StateView { s: view(state.s())?, z: view(state.z())?, stabilizer, position: state.position() })
            };
            let inputs = LinearInputs {
                q: view(&self.q)?,
                k: view(&self.k)?,
                v: view(&self.v)?,
                key_mask: optional(self.key_mask.as_ref())?,
                log_decay: optional(self.log_decay.as_ref())?,
                omega: optional(self.omega.as_ref())?,
                state: self.state.as_ref().map(state).transpose()?,
            };
            engine(&inputs, readings)
        })
    }

    /// The output and the row statistic, and the state into its room.
    fn forward(&self, dtype: DType, state: Option<&mut StateRoom>) -> Result<(Buffer, Buffer)> {
        let device = self.q.device();
        let mut out = buffer(device, dtype, self.problem.output_len())?;
        let mut statistic = buffer(device, accumulator(dtype), self.problem.statistic_len())?;
        on_device!(device, backend => {
            let outputs = LinearOutputs {
                out: backend.room(&mut out)?,
                statistic: Some(backend.room(&mut statistic)?),
                state: state.map(|state| state.rooms(backend)).transpose()?,
            };
            self.compute(backend, &[], |inputs, _| Ok(backend.linear_forward(&self.problem, inputs, outputs)?))?
        });
        Ok((out, statistic))
    }
}

/// A state handed in, ready to be viewed.
fn admit_state(problem: &Linear, admission: Admission<'_>, state: &LinearState) -> Result<LinearState> {
    let stabilizer = state.stabilizer();
    problem.check_state(state.s(), state.z(), stabilizer)?;
    let admit = |argument, tensor: &Tensor| match tensor.device().is_cpu() {
        true => admission.differentiable(argument, tensor),
        false => admission.constant(argument, tensor),
    };
    Ok(LinearState::new(
        admit("state.s", state.s())?,
        admit("state.z", state.z())?,
        stabilizer.map(|stabilizer| admission.constant("state.stabilizer", stabilizer)).transpose()?,
        state.position(),
    ))
}

/// Room for a state.
struct StateRoom {
    s: Buffer,
    z: Buffer,
    stabilizer: Option<Buffer>,
}

impl StateRoom {
    fn new(device: &Device, problem: &Linear, dtype: DType) -> Result<Self> {
        let shapes = problem.state_shapes();
        let buffer = |dims: &[usize]| buffer(device, dtype, dims.iter().product());
        Ok(Self {
            s: buffer(&shapes.s)?,
            z: buffer(&shapes.z)?,
            stabilizer: shapes.stabilizer.map(|dims| buffer(&dims)).transpose()?,
        })
    }

    /// For its gradient.
    fn of_gradient(device: &Device, problem: &Linear, dtype: DType) -> Result<Self> {
        Ok(Self { stabilizer: None, ..Self::new(device, problem, dtype)? })
    }

    fn rooms<B: Backend>(&mut self, backend: &B) -> Result<StateMut<B::Room<'_>>> {
        Ok(StateMut {
            s: backend.room(&mut self.s)?,
            z: backend.room(&mut self.z)?,
            stabilizer: self.stabilizer.as_mut().map(|stabilizer| backend.room(stabilizer)).transpose()?,
        })
    }

    fn into_state(self, problem: &Linear, position: usize) -> LinearState {
        let shapes = problem.state_shapes();
        let stabilizer = self.stabilizer.zip(shapes.stabilizer).map(|(room, dims)| tensor(room, &dims[..]));
        LinearState::new(tensor(self.s, &shapes.s[..]), tensor(self.z, &shapes.z[..]), stabilizer, position)
    }
}

/// The way back from the output, or from all results.
struct OutputNode {
    call: LinearCall,
    statistic: Option<Tensor>,
    /// What stands for the log-decay and the state in the graph, if tracked: the one, or all end to end.
    extra: Option<Tensor>,
    /// The output, S and z.
    results: Option<Results<3>>,
}

impl OutputNode {
    fn new(call: LinearCall, statistic: Buffer, results: Option<Results<3>>) -> Result<Self> {
        let [batch, heads, queries, _] = call.output_shape();
        let statistic = match call.problem.statistic_len() {
            0 => None,
            len if len == batch * heads * queries => Some(tensor(statistic, (batch, heads, queries))),
            _ => Some(tensor(statistic, (batch, queries))),
        };
        let extra = end_to_end(call.extras().into_iter().flatten().cloned().collect())?;
        Ok(Self { call, statistic, extra, results })
    }

    /// What the output has received, and what S and z have.
    fn returned(&self, result: &Tensor, gradient: &Tensor) -> Result<(Returned, Option<StateGradient<Tensor>>)> {
        let alone = || Returned { result: result.clone(), gradient: gradient.clone() };
        let Some(results) = &self.results else { return Ok((alone(), None)) };
        let [out, s, z] = results.collect(gradient)?;
        let out = match out {
            Some(out) => out,
            None => {
                let [.., width] = self.call.output_shape();
                let row = Tensor::zeros((1, 1, 1, width), self.call.q.dtype(), self.call.q.device())?;
                let zeros = row.broadcast_as(&self.call.output_shape()[..])?;
                Returned { result: zeros.clone(), gradient: zeros }
            }
        };
        if s.is_none() && z.is_none() {
            return Ok((out, None));
        }
        let (shapes, sums) = (self.call.problem.state_shapes(), accumulator(self.call.q.dtype()));
        let viewed = |returned: Option<Returned>, dims: &[usize]| match returned {
            Some(returned) => viewable(&returned.gradient),
            None => Tensor::zeros(dims, sums, self.call.q.device()),
        };
        Ok((out, Some(StateGradient { s: viewed(s, &shapes.s)?, z: viewed(z, &shapes.z)? })))
    }

    /// Of the gradients of the log-decay, S and z those that are wanted, as the extra input is.
    fn wanted(&self, gradients: [Option<Tensor>; 3]) -> Result<Option<Tensor>> {
        let wanted = self.call.extras().into_iter().zip(gradients).filter(|(extra, _)| extra.is_some());
        end_to_end(wanted.filter_map(|(_, gradient)| gradient).collect())
    }
}

impl Node for OutputNode {
    fn name(&self) -> &'static str {
        self.call.problem.function
    }

    fn inputs(&self) -> Inputs<'_> {
        let LinearCall { q, k, v, wide_v, .. } = &self.call;
        Inputs { q, k, v: wide_v.as_ref().unwrap_or(v), extra: self.extra.as_ref() }
    }

    fn backward(&self, result: &Tensor, gradient: &Tensor) -> Result<Gradients> {
        let (Returned { result: out, gradient: d_out }, d_state) = self.returned(result, gradient)?;
        let (problem, device) = (&self.call.problem, self.call.q.device());
        let [log_decay, s, z] = self.call.extras();
        let rows = Inputs { extra: None, ..self.inputs() };
        let mut gradients = Gradients::new(rows)?;
        let mut d_log = log_decay.map(|g| buffer(device, g.dtype(), g.elem_count())).transpose()?;
        let mut d_first = s.or(z).map(|sums| StateRoom::of_gradient(device, problem, sums.dtype())).transpose()?;
        on_device!(device, backend => {
            let d_out = viewable(&d_out)?;
            let GradientRooms { q, k, v, .. } = gradients.rooms(backend, rows)?;
            let log_decay = d_log.as_mut().map(|d_log| backend.room(d_log)).transpose()?;
            let state = d_first.as_mut().map(|d_first| d_first.rooms(backend)).transpose()?;
            let state = state.map(|StateMut { s, z, .. }| StateGradient { s, z });
            let rooms = LinearGradients { q, k, v, log_decay, state };
            let ends = d_state.iter().flat_map(|StateGradient { s, z }| [s, z]);
            let saved: Vec<&Tensor> = [&out, &d_out].into_iter().chain(&self.statistic).chain(ends).collect();
            self.call.compute(backend, &saved, |inputs, readings| {
                let view = |tensor: &Tensor| readings.view(backend, tensor);
                let d_state = d_state.as_ref().map(|StateGradient { s, z }| -> Result<_> {
                    Ok(StateGradient { s: view(s)?, z: view(z)? })
                });
                let saved = LinearSaved {
                    out: view(&out)?,
                    statistic: readings.optional(backend, self.statistic.as_ref())?,
                    d_out: view(&d_out)?,
                    d_state: d_state.transpose()?,
                };
                Ok(backend.linear_backward(problem, inputs, &saved, rooms)?)
            })?
        });
        let d_log = d_log.zip(log_decay).map(|(d_log, log_decay)| tensor(d_log, log_decay.shape()));
        let shapes = problem.state_shapes();
        let (s, z) = d_first.map(|StateRoom { s, z, .. }| (tensor(s, &shapes.s[..]), tensor(z, &shapes.z[..]))).unzip();
        gradients.several = self.wanted([d_log, s, z])?;
        Ok(gradients)
    }

    fn without_tokens(&self, input: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        if self.extra.is_none() {
            return zero(input);
        }
        // The gradient of a state passes.
        let (s, z) = self.returned(gradient, gradient)?.1.map(|StateGradient { s, z }| (s, z)).unzip();
        let [log_decay, first_s, first_z] = self.call.extras().map(|extra| extra.map(zero).transpose());
        let wanted = self.wanted([log_decay?, s.or(first_s?), z.or(first_z?)])?;
        wanted.map_or_else(|| zero(input), Ok)
    }
}
