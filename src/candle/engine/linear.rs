//! The linear engine on tensors.

use candle_core::{CpuStorage, DType, Result, Tensor};

use super::graph::{GradientSlices, Gradients, Inputs, Node, attach};
use super::tensors::{Reading, accumulator, buffer, constant, differentiable, slice_mut, tensor, view, viewable};
use crate::candle::LinearState;
use crate::cpu::linear::{
    LinearGradients, LinearInputs, LinearOutputs, LinearSaved, StateMut, StateView, backward, forward,
};
use crate::problem::{Decay, Linear};

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
    key_mask: Option<Tensor>,
    log_decay: Option<Tensor>,
    omega: Option<Tensor>,
    state: Option<LinearState>,
}

impl LinearCall {
    pub fn new(problem: Linear, [q, k, v]: [&Tensor; 3], tensors: LinearTensors<'_>) -> Result<Self> {
        let function = problem.function;
        let constant =
            |argument, tensor: Option<&Tensor>| tensor.map(|tensor| constant(function, argument, tensor)).transpose();
        let LinearTensors { key_mask, log_decay, omega, state } = tensors;
        Ok(Self {
            problem,
            q: differentiable(function, "q", q)?,
            k: differentiable(function, "k", k)?,
            v: differentiable(function, "v", v)?,
            key_mask: constant("key_mask", key_mask)?,
            log_decay: match problem.shapes.decay {
                Decay::Token => log_decay.map(|decay| differentiable(function, "log_decay", decay)).transpose()?,
                Decay::Head | Decay::None => constant("log_decay", log_decay)?,
            },
            omega: constant("omega", omega)?,
            state: state.map(|state| admit_state(&problem, state)).transpose()?,
        })
    }

    /// The output in the dtype of q.
    pub fn output(self) -> Result<Tensor> {
        let dtype = self.q.dtype();
        self.output_in(dtype)
    }

    /// The output in `dtype`: that of q or that of sums.
    pub fn output_in(self, dtype: DType) -> Result<Tensor> {
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
        let mut room = StateRoom::new(&self.problem, accumulator(dtype))?;
        let (out, statistic) = self.forward(dtype, Some(&mut room))?;
        let position = self.state.as_ref().map_or(0, LinearState::position);
        let position = position.saturating_add(self.problem.shapes.keys);
        let state = room.into_state(&self.problem, position);
        Ok((self.attach(out, statistic)?, state))
    }

    /// Calls the engine.
    fn compute(&self, engine: impl FnOnce(&Linear, &LinearInputs<'_>) -> crate::Result<()>) -> Result<()> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(Reading::new);
        let optional = [&self.key_mask, &self.log_decay, &self.omega].map(|tensor| tensor.as_ref().map(Reading::new));
        let [key_mask, log_decay, omega] = &optional;
        let state = self.state.as_ref().map(|state| (Reading::new(state.s()), Reading::new(state.z()), state));
        let stabilizer = self.state.as_ref().and_then(LinearState::stabilizer).map(Reading::new);
        let state = match &state {
            None => None,
            Some((s, z, state)) => {
                let stabilizer = view(&stabilizer)?;
                Some(StateView { s: s.view()?, z: z.view()?, stabilizer, position: state.position() })
            }
        };
        let (key_mask, log_decay, omega) = (view(key_mask)?, view(log_decay)?, view(omega)?);
        let (q, k, v) = (q.view()?, k.view()?, v.view()?);
        Ok(engine(&self.problem, &LinearInputs { q, k, v, key_mask, log_decay, omega, state })?)
    }

    /// The output and the row statistic, and the state into its room.
    fn forward(&self, dtype: DType, state: Option<&mut StateRoom>) -> Result<(CpuStorage, CpuStorage)> {
        let mut out = buffer(dtype, self.problem.output_len())?;
        let mut statistic = buffer(accumulator(dtype), self.problem.statistic_len())?;
        let outputs = LinearOutputs {
            out: slice_mut(&mut out)?,
            statistic: Some(slice_mut(&mut statistic)?),
            state: state.map(StateRoom::slices).transpose()?,
        };
        self.compute(|problem, inputs| forward(problem, inputs, outputs))?;
        Ok((out, statistic))
    }

    fn attach(self, out: CpuStorage, statistic: CpuStorage) -> Result<Tensor> {
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
fn admit_state(problem: &Linear, state: &LinearState) -> Result<LinearState> {
    let (function, stabilizer) = (problem.function, state.stabilizer());
    problem.check_state(state.s(), state.z(), stabilizer)?;
    Ok(LinearState::new(
        constant(function, "state.s", state.s())?,
        constant(function, "state.z", state.z())?,
        stabilizer.map(|stabilizer| constant(function, "state.stabilizer", stabilizer)).transpose()?,
        state.position(),
    ))
}

/// Room for a state.
struct StateRoom {
    s: CpuStorage,
    z: CpuStorage,
    stabilizer: Option<CpuStorage>,
}

impl StateRoom {
    fn new(problem: &Linear, dtype: DType) -> Result<Self> {
        let shapes = problem.state_shapes();
        Ok(Self {
            s: buffer(dtype, shapes.s.iter().product())?,
            z: buffer(dtype, shapes.z.iter().product())?,
            stabilizer: shapes.stabilizer.map(|dims| buffer(dtype, dims.iter().product())).transpose()?,
        })
    }

    fn slices(&mut self) -> Result<StateMut<'_>> {
        Ok(StateMut {
            s: slice_mut(&mut self.s)?,
            z: slice_mut(&mut self.z)?,
            stabilizer: self.stabilizer.as_mut().map(slice_mut).transpose()?,
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
        let LinearCall { q, k, v, log_decay, .. } = &self.call;
        Inputs { q, k, v, extra: log_decay.as_ref().filter(|log_decay| log_decay.track_op()) }
    }

    fn backward(&self, out: &Tensor, d_out: &Tensor) -> Result<Gradients> {
        let d_out = viewable(d_out)?;
        let [out, d_out] = [out, &d_out].map(Reading::new);
        let statistic = self.statistic.as_ref().map(Reading::new);
        let saved = LinearSaved { out: out.view()?, statistic: view(&statistic)?, d_out: d_out.view()? };
        let mut gradients = Gradients::new(self.inputs())?;
        let GradientSlices { q, k, v, extra: log_decay } = gradients.slices(self.inputs())?;
        let slices = LinearGradients { q, k, v, log_decay };
        self.call.compute(|problem, inputs| backward(problem, inputs, &saved, slices))?;
        Ok(gradients)
    }
}
