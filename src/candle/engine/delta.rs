//! The delta engine on tensors.
//!
//! A candle operation has at most three inputs: those of one dtype enter through tokens.

use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor};

use super::backend::{Backend, Cpu};
use super::graph::{Ready, token};
use super::reading::{Readings, read};
use super::results::Results;
use super::tensors::{Admission, Buffer, accumulator, buffer, tensor, viewable};
use crate::cpu::delta;
use crate::problem::{
    Delta, DeltaDecay, DeltaGradients, DeltaInputs, DeltaOutputs, DeltaSaved, RankOne, SliceMut, View,
};

/// A problem with its tensors.
pub struct DeltaCall {
    problem: Delta,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank_one: RankOne<Tensor>,
    log_decay: Option<Tensor>,
    bonus: Option<Tensor>,
    key_mask: Option<Tensor>,
    state: Option<Tensor>,
}

/// The tensors of a call that may be absent.
#[derive(Clone, Copy)]
pub struct DeltaTensors<'a> {
    pub log_decay: Option<&'a Tensor>,
    pub bonus: Option<&'a Tensor>,
    pub key_mask: Option<&'a Tensor>,
    pub state: Option<&'a Tensor>,
}

impl DeltaCall {
    pub fn new(
        problem: Delta,
        [q, k, v]: [&Tensor; 3],
        rank_one: RankOne<&Tensor>,
        tensors: DeltaTensors<'_>,
    ) -> Result<Self> {
        let admission = Admission::new(problem.function, q);
        admission.on_cpu("q")?;
        let differentiable = |argument, tensor| admission.differentiable(argument, tensor);
        let DeltaTensors { log_decay, bonus, key_mask, state } = tensors;
        Ok(Self {
            q: differentiable("q", q)?,
            k: differentiable("k", k)?,
            v: differentiable("v", v)?,
            rank_one: match rank_one {
                RankOne::None => RankOne::None,
                RankOne::Rule { beta } => RankOne::Rule { beta: differentiable("beta", beta)? },
                RankOne::Free { a, b } => RankOne::Free { a: differentiable("a", a)?, b: differentiable("b", b)? },
            },
            log_decay: match problem.shapes.decay {
                DeltaDecay::Head => log_decay.map(|decay| admission.constant("log_decay", decay)).transpose()?,
                _ => log_decay.map(|decay| differentiable("log_decay", decay)).transpose()?,
            },
            bonus: bonus.map(|bonus| differentiable("bonus", bonus)).transpose()?,
            key_mask: key_mask.map(|mask| admission.constant("key_mask", mask)).transpose()?,
            state: state.map(|state| differentiable("state", state)).transpose()?,
            problem,
        })
    }

    /// The output in the dtype of q.
    pub fn output(self) -> Result<Tensor> {
        let mut out = buffer(&Device::Cpu, self.q.dtype(), self.problem.output_len())?;
        self.forward(DeltaOutputs { out: Cpu.room(&mut out)?, state: None })?;
        let shape = self.output_shape();
        if !self.is_tracked() {
            return Ok(tensor(out, &shape[..]));
        }
        self.attach(out, &shape, None)
    }

    /// The output in the dtype of q, and the state after the last token.
    pub fn output_and_state(self) -> Result<(Tensor, Tensor)> {
        let (name, shape, states) = (self.problem.function, self.output_shape(), self.problem.state_shape());
        let mut out = buffer(&Device::Cpu, self.q.dtype(), self.problem.output_len())?;
        let mut state = buffer(&Device::Cpu, accumulator(self.q.dtype()), states.iter().product())?;
        self.forward(DeltaOutputs { out: Cpu.room(&mut out)?, state: Some(Cpu.room(&mut state)?) })?;
        if !self.is_tracked() {
            // Without a token the state is that handed in, with its gradient.
            let given = self.state.filter(|state| state.track_op());
            return Ok((tensor(out, &shape[..]), given.unwrap_or_else(|| tensor(state, &states[..]))));
        }
        let results = Results::<2>::default();
        let token = self.attach(Results::<2>::token(&Device::Cpu)?, &[2], Some(results.clone()))?;
        let hand_out = |index, result, dims: &[usize]| results.hand_out(&token, index, Ready::new(name, result, dims));
        Ok((hand_out(0, out, &shape)?, hand_out(1, state, &states)?))
    }

    fn output_shape(&self) -> [usize; 4] {
        let shapes = &self.problem.shapes;
        [shapes.batch, shapes.heads(), shapes.tokens, shapes.value_width]
    }

    /// The inputs that have a gradient in the dtype of q, always, and those in the dtype of sums.
    fn rows(&self) -> Vec<&Tensor> {
        let mut rows = vec![&self.q, &self.k, &self.v];
        if let RankOne::Free { a, b } = &self.rank_one {
            rows.extend([a, b]);
        }
        rows
    }

    fn sums(&self) -> Vec<&Tensor> {
        let tracked =
            [&self.log_decay, &self.bonus, &self.state].into_iter().flatten().filter(|input| input.track_op());
        let beta = if let RankOne::Rule { beta } = &self.rank_one { Some(beta) } else { None };
        beta.into_iter().chain(tracked).collect()
    }

    /// Whether results have gradients: nothing is computed without tokens.
    fn is_tracked(&self) -> bool {
        self.q.elem_count() > 0 && self.rows().into_iter().chain(self.sums()).any(Tensor::track_op)
    }

    /// Calls the engine with the operands, while `saved` can be read, too.
    fn compute(
        &self,
        saved: &[&Tensor],
        engine: impl FnOnce(&DeltaInputs<View<'_>>, Readings<'_>) -> Result<()>,
    ) -> Result<()> {
        let rank_one = match &self.rank_one {
            RankOne::None => vec![],
            RankOne::Rule { beta } => vec![beta],
            RankOne::Free { a, b } => vec![a, b],
        };
        let optional = [&self.log_decay, &self.bonus, &self.key_mask, &self.state].into_iter().flatten();
        let operands = [&self.q, &self.k, &self.v].into_iter().chain(rank_one).chain(optional);
        let tensors: Vec<&Tensor> = operands.chain(saved.iter().copied()).collect();
        read(&tensors, |readings| {
            let view = |tensor: &Tensor| readings.view(&Cpu, tensor);
            let optional = |tensor: &Option<Tensor>| readings.optional(&Cpu, tensor.as_ref());
            let inputs = DeltaInputs {
                q: view(&self.q)?,
                k: view(&self.k)?,
                v: view(&self.v)?,
                rank_one: match &self.rank_one {
                    RankOne::None => RankOne::None,
                    RankOne::Rule { beta } => RankOne::Rule { beta: view(beta)? },
                    RankOne::Free { a, b } => RankOne::Free { a: view(a)?, b: view(b)? },
                },
                log_decay: optional(&self.log_decay)?,
                bonus: optional(&self.bonus)?,
                key_mask: optional(&self.key_mask)?,
                state: optional(&self.state)?,
            };
            engine(&inputs, readings)
        })
    }

    fn forward(&self, outputs: DeltaOutputs<SliceMut<'_>>) -> Result<()> {
        self.compute(&[], |inputs, _| Ok(delta::forward(&self.problem, inputs, outputs)?))
    }

    /// Puts a result into the graph: the output, or what stands for output and state.
    fn attach(self, result: Buffer, shape: &[usize], results: Option<Results<2>>) -> Result<Tensor> {
        let rows = token(&self.rows())?;
        let sums = match &self.sums()[..] {
            [] => Tensor::zeros(1, accumulator(self.q.dtype()), &Device::Cpu)?,
            sums => token(sums)?,
        };
        let result = Ready::new(self.problem.function, result, shape);
        rows.apply_op2(&sums, Join { result, results, call: self })
    }

    /// The gradients of the inputs in the dtype of q, and of those in the dtype of sums, end to end.
    fn backward(&self, d_out: &Tensor, d_state: Option<&Tensor>) -> Result<[Buffer; 2]> {
        let len = |inputs: &[&Tensor]| inputs.iter().map(|input| input.elem_count()).sum::<usize>();
        let (rows, sums) = (self.rows(), self.sums());
        let mut rows_room = buffer(&Device::Cpu, self.q.dtype(), len(&rows))?;
        let mut sums_room = buffer(&Device::Cpu, accumulator(self.q.dtype()), len(&sums))?;
        let (mut of_rows, mut of_sums) = (Cpu.room(&mut rows_room)?, Cpu.room(&mut sums_room)?);
        let mut row = |input: &Tensor| of_rows.take(input.elem_count());
        let mut sum = |input: &Tensor| of_sums.take(input.elem_count());
        let [q, k, v] = [&self.q, &self.k, &self.v].map(&mut row);
        let rank_one = match &self.rank_one {
            RankOne::None => RankOne::None,
            RankOne::Rule { beta } => RankOne::Rule { beta: sum(beta) },
            RankOne::Free { a, b } => RankOne::Free { a: row(a), b: row(b) },
        };
        let [log_decay, bonus, state] = [&self.log_decay, &self.bonus, &self.state]
            .map(|input| input.as_ref().filter(|input| input.track_op()).map(&mut sum));
        let rooms = DeltaGradients { q, k, v, rank_one, log_decay, bonus, state };
        let (d_out, d_state) = (viewable(d_out)?, d_state.map(viewable).transpose()?);
        let saved: Vec<&Tensor> = [&d_out].into_iter().chain(&d_state).collect();
        self.compute(&saved, |inputs, readings| {
            let saved =
                DeltaSaved { d_out: readings.view(&Cpu, &d_out)?, d_state: readings.optional(&Cpu, d_state.as_ref())? };
            Ok(delta::backward(&self.problem, inputs, &saved, rooms)?)
        })?;
        Ok([rows_room, sums_room])
    }
}

/// The operation on the token of the inputs in the dtype of q and that of the others.
struct Join {
    call: DeltaCall,
    result: Ready,
    /// The output and the state, where the result stands for both.
    results: Option<Results<2>>,
}

impl CustomOp2 for Join {
    fn name(&self) -> &'static str {
        self.call.problem.function
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.result.on_cpu()
    }

    fn bwd(
        &self,
        rows: &Tensor,
        sums: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [d_out, d_state] = match &self.results {
            Some(results) => results.collect(gradient)?.map(|returned| returned.map(|returned| returned.gradient)),
            None => [Some(gradient.clone()), None],
        };
        let shape = self.call.output_shape();
        let row = || Tensor::zeros((1, 1, 1, shape[3]), self.call.q.dtype(), &Device::Cpu)?.broadcast_as(&shape[..]);
        let d_out = d_out.map_or_else(row, Ok)?;
        let [of_rows, of_sums] = self.call.backward(&d_out, d_state.as_ref())?;
        let of = |input: &Tensor, gradient| input.track_op().then(|| tensor(gradient, input.shape()));
        Ok((of(rows, of_rows), of(sums, of_sums)))
    }
}
