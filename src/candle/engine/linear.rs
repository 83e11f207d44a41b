//! The linear engine on tensors.

use candle_core::{DType, Device, Result, Tensor};

use super::backend::{Backend, on_device};
use super::graph::{GradientRooms, Gradients, Inputs, Node, attach};
use super::reading::{Readings, read};
use super::tensors::{Admission, Buffer, accumulator, buffer, is_cut, rows, tensor, viewable};
use crate::candle::LinearState;
use crate::problem::{Decay, Linear, LinearGradients, LinearInputs, LinearOutputs, LinearSaved, StateMut, StateView};

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
        self.attach(out, statistic)
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
        let state = room.into_state(&self.problem, position);
        Ok((self.attach(out, statistic)?, state))
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

    fn attach(self, out: Buffer, statistic: Buffer) -> Result<Tensor> {
        let shapes = &self.problem.shapes;
        let (batch, heads, queries) = (shapes.batch, shapes.heads(), shapes.queries);
        let shape = [batch, heads, queries, shapes.value_width];
        let statistic = match self.problem.statistic_len() {
            0 => None,
            len if len == batch * heads * queries => Some(tensor(statistic, (batch, heads, queries))),
            _ => Some(tensor(statistic, (batch, queries))),
        };
        attach(OutputNode { call: self, statistic }, out, &shape[..])
    }
}

/// A state handed in, ready to be viewed.
fn admit_state(problem: &Linear, admission: Admission<'_>, state: &LinearState) -> Result<LinearState> {
    let stabilizer = state.stabilizer();
    problem.check_state(state.s(), state.z(), stabilizer)?;
    Ok(LinearState::new(
        admission.constant("state.s", state.s())?,
        admission.constant("state.z", state.z())?,
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

/// The way back from the output.
struct OutputNode {
    call: LinearCall,
    statistic: Option<Tensor>,
}

impl Node for OutputNode {
    fn name(&self) -> &'static str {
        self.call.problem.function
    }

    fn inputs(&self) -> Inputs<'_> {
        let LinearCall { q, k, v, wide_v, log_decay, .. } = &self.call;
        let v = wide_v.as_ref().unwrap_or(v);
        Inputs { q, k, v, extra: log_decay.as_ref().filter(|log_decay| log_decay.track_op()) }
    }

    fn backward(&self, out: &Tensor, d_out: &Tensor) -> Result<Gradients> {
        let mut gradients = Gradients::new(self.inputs())?;
        on_device!(self.call.q.device(), backend => {
            let d_out = viewable(d_out)?;
            let GradientRooms { q, k, v, extra: log_decay } = gradients.rooms(backend, self.inputs())?;
            let rooms = LinearGradients { q, k, v, log_decay };
            let saved: Vec<&Tensor> = [out, &d_out].into_iter().chain(&self.statistic).collect();
            self.call.compute(backend, &saved, |inputs, readings| {
                let saved = LinearSaved {
                    out: readings.view(backend, out)?,
                    statistic: readings.optional(backend, self.statistic.as_ref())?,
                    d_out: readings.view(backend, &d_out)?,
                };
                Ok(backend.linear_backward(&self.call.problem, inputs, &saved, rooms)?)
            })?
        });
        Ok(gradients)
    }
}
