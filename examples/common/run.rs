//! A call in the memory of a backend.

use attn_kernels::Result;
use attn_kernels::problem::{
    Linear, LinearGradients, LinearInputs, LinearOutputs, LinearSaved, Quadratic, QuadraticGradients, QuadraticInputs,
    QuadraticSaved, Slice, StateMut, StateView, Strided,
};

use super::backend::{Backend, View};
use super::call::{Call, Problem};
use super::inputs::Inputs;
use super::mechanism::Pass;
use super::tensor::{Float, Tensor};

/// The operands of a call and room for its results, to be run any number of times.
pub struct Run<'c, B: Backend> {
    backend: B,
    call: &'c Call<'c>,
    pass: Pass,
    operands: Operands<'c, B>,
    outputs: Outputs<B>,
    gradients: Option<Gradients<B>>,
}

struct Operands<'c, B: Backend> {
    q: Tensor<B::Operand<'c>>,
    k: Tensor<B::Operand<'c>>,
    v: Tensor<B::Operand<'c>>,
    d_out: Tensor<B::Operand<'c>>,
    key_mask: Option<Tensor<B::Operand<'c>>>,
    log_decay: Option<Tensor<B::Operand<'c>>>,
    omega: Option<Tensor<B::Operand<'c>>>,
    /// S and z
    state: Option<[Tensor<B::Operand<'c>>; 2]>,
}

/// What a forward pass leaves behind.
struct Outputs<B: Backend> {
    out: Sum<B>,
    /// One number per row of the output, for a backward pass.
    statistic: Option<Tensor<B::Room>>,
    /// S and z after the last token.
    state: Option<[Tensor<B::Room>; 2]>,
}

struct Gradients<B: Backend> {
    q: Tensor<B::Room>,
    k: Tensor<B::Room>,
    v: Sum<B>,
    /// Of q and k through the global branch of FLASH.
    global: Option<[Tensor<B::Room>; 2]>,
    /// Of a log-decay per token.
    log_decay: Option<Tensor<B::Room>>,
}

/// A result to which both branches of FLASH add.
struct Sum<B: Backend> {
    float: Float,
    tensor: Tensor<B::Room>,
    /// The global branch's summand, where the backend cannot add.
    rest: Option<B::Room>,
}

impl<'c, B: Backend> Run<'c, B> {
    /// Everything in place for a pass; `d_out` is the gradient of the output.
    ///
    /// # Errors
    /// Those of the backend, as everywhere here.
    pub fn new(backend: B, call: &'c Call<'c>, pass: Pass, d_out: &'c Tensor) -> Result<Self> {
        let (shape, float) = (&call.inputs.shape, call.inputs.float);
        let operands = Operands::new(&backend, call, d_out)?;
        let rows = [shape.batch, shape.heads, shape.queries];
        let has_statistic = pass == Pass::Bwd
            && match &call.problem {
                Problem::Quadratic(_) | Problem::Mixed { .. } => true,
                Problem::Linear(linear) => linear.statistic_len() > 0,
            };
        let out = Sum::new(&backend, float, &[rows[0], rows[1], rows[2], shape.value_width])?;
        let statistic = has_statistic.then(|| room(&backend, float.accumulator(), &rows)).transpose()?;
        let gradients = (pass == Pass::Bwd).then(|| Gradients::new(&backend, call)).transpose()?;
        let like = |state: &'c [Tensor; 2]| {
            let [s, z] = state;
            Ok([room(&backend, float.accumulator(), &s.dims)?, room(&backend, float.accumulator(), &z.dims)?])
        };
        let state = call.inputs.given.state.as_ref().map(like).transpose()?;
        Ok(Self { backend, call, pass, operands, outputs: Outputs { out, statistic, state }, gradients })
    }

    /// Goes on with another backend, which shares the memory of this one.
    pub fn set_backend(&mut self, backend: B) {
        self.backend = backend;
    }

    /// Runs the forward pass and, if made for it, the backward pass; the results as [`Run::results`].
    pub fn both_passes(mut self) -> Result<Vec<Tensor>> {
        self.forward()?;
        self.backward()?;
        self.results()
    }

    /// Runs the pass; a backward pass needs a forward pass before.
    pub fn pass(&mut self) -> Result<()> {
        self.one(self.pass)
    }

    pub fn one(&mut self, pass: Pass) -> Result<()> {
        match pass {
            Pass::Fwd => self.forward(),
            Pass::Bwd => self.backward(),
        }
    }

    pub fn forward(&mut self) -> Result<()> {
        let Self { backend, operands, outputs: Outputs { out, statistic, state }, .. } = self;
        let statistic = statistic.as_mut().map(|statistic| B::write(&mut statistic.data));
        match &self.call.problem {
            Problem::Quadratic(problem) => {
                backend.quadratic_forward(problem, &operands.quadratic()?, B::write(&mut out.tensor.data), statistic)
            }
            Problem::Linear(problem) => {
                let state = state.as_mut().map(|[s, z]| StateMut {
                    s: B::write(&mut s.data),
                    z: B::write(&mut z.data),
                    stabilizer: None,
                });
                let outputs = LinearOutputs { out: B::write(&mut out.tensor.data), statistic, state };
                backend.linear_forward(problem, &operands.linear()?, outputs)
            }
            Problem::Mixed { local, global } => {
                backend.quadratic_forward(local, &operands.quadratic()?, B::write(&mut out.tensor.data), statistic)?;
                out.add(backend, |out| {
                    let outputs = LinearOutputs { out: B::write(out), statistic: None, state: None };
                    backend.linear_forward(global, &operands.linear()?, outputs)
                })
            }
        }
    }

    /// After a forward pass; nothing if not made for [`Pass::Bwd`].
    pub fn backward(&mut self) -> Result<()> {
        let Self { backend, call, operands, outputs, .. } = self;
        let Some(Gradients { q, k, v, global: through_global, log_decay }) = &mut self.gradients else { return Ok(()) };
        match &call.problem {
            Problem::Quadratic(problem) => {
                let room = [q, k, &mut v.tensor].map(|tensor| B::write(&mut tensor.data));
                quadratic_backward(backend, problem, operands, outputs, room)
            }
            Problem::Linear(problem) => {
                let room = [q, k, &mut v.tensor].map(|tensor| B::write(&mut tensor.data));
                let log_decay = log_decay.as_mut().map(|log_decay| B::write(&mut log_decay.data));
                linear_backward(backend, problem, operands, outputs, room, log_decay)
            }
            Problem::Mixed { local, global } => {
                let room = [q, k, &mut v.tensor].map(|tensor| B::write(&mut tensor.data));
                quadratic_backward(backend, local, operands, outputs, room)?;
                let Some([q, k]) = through_global else { return Ok(()) };
                v.add(backend, |v| {
                    let room = [B::write(&mut q.data), B::write(&mut k.data), B::write(v)];
                    linear_backward(backend, global, operands, outputs, room, None)
                })
            }
        }
    }

    /// The results of the last run, in main memory and the order of [`results`](super::reference::results); then the
    /// state, or the gradient of the log-decay per token, if there is one.
    pub fn results(self) -> Result<Vec<Tensor>> {
        let backend = &self.backend;
        let Some(Gradients { q, k, v, global, log_decay }) = self.gradients else {
            let mut results = vec![self.outputs.out.fetch(backend)?];
            for tensor in self.outputs.state.into_iter().flatten() {
                results.push(fetch(backend, tensor)?);
            }
            return Ok(results);
        };
        let fetch = |tensor| fetch(backend, tensor);
        let mut results = vec![fetch(q)?, fetch(k)?, v.fetch(backend)?];
        if let Some([q, k]) = global {
            results.extend([fetch(q)?, fetch(k)?]);
        }
        results.extend(log_decay.map(fetch).transpose()?);
        Ok(results)
    }

    /// Bytes of summands that the pass needs beside its results.
    pub fn rest_bytes(&self) -> usize {
        let sum = match (self.pass, &self.gradients) {
            (Pass::Bwd, Some(gradients)) => &gradients.v,
            _ => &self.outputs.out,
        };
        sum.rest.as_ref().map_or(0, |_| sum.tensor.dims.iter().product::<usize>() * sum.float.dtype().size())
    }
}

fn room<B: Backend>(backend: &B, float: Float, dims: &[usize]) -> Result<Tensor<B::Room>> {
    Ok(Tensor { data: backend.room(float, dims.iter().product())?, dims: dims.to_vec() })
}

fn fetch<B: Backend>(backend: &B, tensor: Tensor<B::Room>) -> Result<Tensor> {
    Ok(Tensor { data: backend.fetch(tensor.data)?, dims: tensor.dims })
}

fn operand_view<'a, B: Backend>(tensor: &'a Tensor<B::Operand<'_>>) -> Result<View<'a, B>> {
    Strided::contiguous(B::read(&tensor.data), &tensor.dims)
}

/// At a position that no mechanism with a state here depends on.
fn state_view<'a, B: Backend>([s, z]: &'a [Tensor<B::Operand<'_>>; 2]) -> Result<StateView<View<'a, B>>> {
    Ok(StateView { s: operand_view::<B>(s)?, z: operand_view::<B>(z)?, stabilizer: None, position: 0 })
}

fn room_view<B: Backend>(tensor: &Tensor<B::Room>) -> Result<View<'_, B>> {
    Strided::contiguous(B::read_room(&tensor.data), &tensor.dims)
}

impl<'c, B: Backend> Operands<'c, B> {
    fn new(backend: &B, call: &'c Call<'c>, d_out: &'c Tensor) -> Result<Self> {
        let Inputs { q, k, v, key_mask, shape, .. } = call.inputs;
        let operand =
            |elements: Slice<'c>, dims: &[usize]| Ok(Tensor { data: backend.operand(elements)?, dims: dims.to_vec() });
        let tensor = |tensor: &'c Tensor| operand(tensor.data.slice(), &tensor.dims);
        let mask = |mask: &'c Vec<u8>| operand(mask.as_slice().into(), &[shape.batch, shape.keys]);
        Ok(Self {
            q: tensor(q)?,
            k: tensor(k)?,
            v: tensor(v)?,
            d_out: tensor(d_out)?,
            key_mask: key_mask.as_ref().map(mask).transpose()?,
            log_decay: call.log_decay.as_ref().map(tensor).transpose()?,
            omega: call.omega.as_ref().map(tensor).transpose()?,
            state: call.inputs.given.state.as_ref().map(|[s, z]| Ok([tensor(s)?, tensor(z)?])).transpose()?,
        })
    }

    fn quadratic(&self) -> Result<QuadraticInputs<View<'_, B>>> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(operand_view::<B>);
        let key_mask = self.key_mask.as_ref().map(operand_view::<B>).transpose()?;
        Ok(QuadraticInputs { key_mask, ..QuadraticInputs::new(q?, k?, v?) })
    }

    fn linear(&self) -> Result<LinearInputs<View<'_, B>>> {
        Ok(LinearInputs {
            q: operand_view::<B>(&self.q)?,
            k: operand_view::<B>(&self.k)?,
            v: operand_view::<B>(&self.v)?,
            key_mask: self.key_mask.as_ref().map(operand_view::<B>).transpose()?,
            log_decay: self.log_decay.as_ref().map(operand_view::<B>).transpose()?,
            omega: self.omega.as_ref().map(operand_view::<B>).transpose()?,
            state: self.state.as_ref().map(state_view::<B>).transpose()?,
        })
    }
}

impl<B: Backend> Gradients<B> {
    fn new(backend: &B, call: &Call<'_>) -> Result<Self> {
        let Inputs { q, k, v, float, .. } = call.inputs;
        let is_mixed = matches!(call.problem, Problem::Mixed { .. });
        let like = |tensor: &Tensor| room(backend, *float, &tensor.dims);
        let global = is_mixed.then(|| Ok([like(q)?, like(k)?])).transpose()?;
        let sums = |tensor: &Tensor| room(backend, float.accumulator(), &tensor.dims);
        let log_decay = call.log_decay.as_ref().filter(|_| call.has_log_decay_gradient()).map(sums).transpose()?;
        Ok(Self { q: like(q)?, k: like(k)?, v: Sum::new(backend, *float, &v.dims)?, global, log_decay })
    }
}

impl<B: Backend> Sum<B> {
    fn new(backend: &B, float: Float, dims: &[usize]) -> Result<Self> {
        Ok(Self { float, tensor: room(backend, float, dims)?, rest: None })
    }

    /// Adds what `compute` writes.
    fn add(&mut self, backend: &B, compute: impl FnOnce(&mut B::Room) -> Result<()>) -> Result<()> {
        let new = || backend.room(self.float, self.tensor.dims.iter().product());
        let mut summand = self.rest.take().map_or_else(new, Ok)?;
        compute(&mut summand)?;
        self.rest = backend.add(&mut self.tensor.data, summand);
        Ok(())
    }

    fn fetch(self, backend: &B) -> Result<Tensor> {
        let mut tensor = fetch(backend, self.tensor)?;
        if let Some(rest) = self.rest {
            tensor.data.add(&backend.fetch(rest)?);
        }
        Ok(tensor)
    }
}

fn quadratic_backward<B: Backend>(
    backend: &B,
    problem: &Quadratic,
    operands: &Operands<'_, B>,
    outputs: &Outputs<B>,
    [q, k, v]: [B::SliceMut<'_>; 3],
) -> Result<()> {
    let saved = QuadraticSaved {
        out: room_view::<B>(&outputs.out.tensor)?,
        statistic: room_view::<B>(outputs.statistic.as_ref().expect("outputs made for a backward pass"))?,
        d_out: operand_view::<B>(&operands.d_out)?,
        d_statistic: None,
    };
    let gradients = QuadraticGradients::new(q, k, v);
    backend.quadratic_backward(problem, &operands.quadratic()?, &saved, gradients)
}

fn linear_backward<'r, B: Backend>(
    backend: &B,
    problem: &Linear,
    operands: &Operands<'_, B>,
    outputs: &Outputs<B>,
    [q, k, v]: [B::SliceMut<'r>; 3],
    log_decay: Option<B::SliceMut<'r>>,
) -> Result<()> {
    let statistic = outputs.statistic.as_ref().filter(|_| problem.statistic_len() > 0);
    let saved = LinearSaved {
        out: room_view::<B>(&outputs.out.tensor)?,
        statistic: statistic.map(room_view::<B>).transpose()?,
        d_out: operand_view::<B>(&operands.d_out)?,
        d_state: None,
    };
    let gradients = LinearGradients { q, k, v, log_decay, state: None };
    backend.linear_backward(problem, &operands.linear()?, &saved, gradients)
}
