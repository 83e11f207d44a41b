//! The CPU engines on one instruction set.

use attn_kernels::cpu::Isa;
use attn_kernels::cpu::linear::{
    self, LinearGradients, LinearInputs, LinearOutputs, LinearSaved, StateGradient, StateMut, StateView,
};
use attn_kernels::cpu::quadratic::{self, QuadraticGradients, QuadraticInputs, QuadraticSaved};
use attn_kernels::problem::{self, DType, Linear, Operand as _, Quadratic, View};
use attn_kernels::reference::Array;

use super::super::buffers::{Buffer, Layout, Operand};
use super::super::cases::{Case, Operation};
use super::super::data::{Data, entry_dtype, kept_pairs};
use super::super::options::{Extras, With};
use super::super::reference::Results;
use super::{Backend, Pass};

/// The engines on slices, forced onto an instruction set.
pub struct Cpu(pub Isa);

impl Backend for Cpu {
    fn name(&self) -> String {
        format!("cpu/{}", self.0.name())
    }

    fn is_available(&self) -> bool {
        self.0.is_available()
    }

    fn run(&self, case: &Case, data: &Data, dtype: DType, pass: Pass) -> Result<Results, String> {
        let run = || Operands::new(case, data, dtype).run(case, data, pass);
        let ran = self.0.force(run).ok_or("not available on this processor")?;
        ran.map_err(|error| error.to_string())
    }
}

/// A case's inputs in memory.
pub(super) struct Operands {
    pub(super) dtype: DType,
    pub(super) q: Operand,
    pub(super) k: Operand,
    pub(super) v: Operand,
    pub(super) global: Option<[Operand; 2]>,
    pub(super) extras: Extras<Operand>,
    pub(super) omega: Option<Operand>,
    /// S, z, stabiliser.
    pub(super) state: Option<(Operand, Operand, Option<Operand>)>,
    pub(super) d_out: Operand,
    pub(super) d_lse: Option<Operand>,
    /// Of S and z.
    pub(super) d_state: Option<[Operand; 2]>,
}

impl Operands {
    pub(super) fn new(case: &Case, data: &Data, dtype: DType) -> Self {
        let accumulator = dtype.accumulator();
        let of = |array: &Array, rank, dtype| Operand::new(array, rank, dtype, case.layout);
        let extras = &data.extras;
        let decay_rank = if case.has_decay_per_head() { 1 } else { 3 };
        let contiguous = |array: &Array, rank| Operand::new(array, rank, accumulator, Layout::Contiguous);
        Self {
            dtype,
            q: of(&data.q, 4, dtype),
            k: of(&data.k, 4, dtype),
            v: of(&data.v, 4, dtype),
            global: data.global.as_ref().map(|[q, k]| [of(q, 4, dtype), of(k, 4, dtype)]),
            extras: Extras {
                key_mask: extras.key_mask.as_ref().map(|mask| of(mask, 2, DType::U8)),
                bias: extras.bias.as_ref().map(|bias| of(bias, 2, dtype)),
                log_decay: extras.log_decay.as_ref().map(|log_decay| of(log_decay, decay_rank, accumulator)),
                attention_bias: extras.attention_bias.as_ref().zip(case.operation.attention_bias()).map(
                    |(term, kind)| match entry_dtype(kind, dtype) {
                        DType::U8 => of(&kept_pairs(term), 4, DType::U8),
                        dtype => of(term, 4, dtype),
                    },
                ),
                sinks: extras
                    .sinks
                    .as_ref()
                    .zip(case.operation.sinks())
                    .map(|(sinks, kind)| of(sinks, 1, entry_dtype(kind, dtype))),
            },
            omega: data.omega.as_ref().map(|omega| of(omega, 2, accumulator)),
            state: data.state.as_ref().map(|state| {
                let stabilizer = state.stabilizer.as_ref().map(|c| contiguous(c, 2));
                (of(&state.s, 4, accumulator), of(&without_rows(&state.z), 3, accumulator), stabilizer)
            }),
            d_state: (data.d_state.as_ref())
                .map(|d| [of(&d.s, 4, accumulator), of(&without_rows(&d.z), 3, accumulator)]),
            d_out: of(&data.d_out, 4, dtype),
            d_lse: data.d_lse.as_ref().map(|d| {
                let rows = Array { shape: [1, d.shape[0], d.shape[1], d.shape[2]], ..d.clone() };
                contiguous(&rows, 3)
            }),
        }
    }

    pub(super) fn extras(&self) -> Extras<View<'_>> {
        self.extras.as_ref().map(Operand::view)
    }

    fn run(&self, case: &Case, data: &Data, pass: Pass) -> attn_kernels::Result<Results> {
        let (q, k, v) = (&self.q.view(), &self.k.view(), &self.v.view());
        let (extras, name) = (self.extras(), case.operation.name());
        match &case.operation {
            Operation::Softmax(o) => self.quadratic(data, &o.with(extras).problem(name, q, k, v)?, pass, true),
            Operation::Diag(o) => self.quadratic(data, &o.with(extras).problem(name, q, k, v)?, pass, false),
            Operation::Gau(o) => self.quadratic(data, &o.with(extras).problem(name, q, k, v)?, pass, false),
            Operation::Linear(o) => self.linear(data, &o.with(extras).problem(name, q, k, v)?, [q, k], pass),
            Operation::Norm(o) => self.linear(data, &o.with(extras).problem(name, q, k, v)?, [q, k], pass),
            Operation::Performer(o, _) => {
                let omega = self.omega.as_ref().expect("ω of a Performer").view();
                self.linear(data, &o.with(extras).problem(name, q, k, v, &omega)?, [q, k], pass)
            }
            Operation::MixedChunk(o) => {
                let [q_lin, k_lin] = self.global.as_ref().expect("operands of the global branch").each_ref();
                let (q_lin, k_lin) = (&q_lin.view(), &k_lin.view());
                let options = o.with(extras);
                let local = self.quadratic(data, &options.local_problem(name, q, k, v)?, pass, false)?;
                let global = options.global_problem(name, q_lin, k_lin, v)?;
                Ok(add_branches(local, self.linear(data, &global, [q_lin, k_lin], pass)?))
            }
        }
    }

    /// For the gradient of v: in the dtype of sums where two branches' are added.
    fn room_for_values(&self, data: &Data) -> Buffer {
        let dtype = if data.global.is_some() { self.dtype.accumulator() } else { self.dtype };
        Buffer::poisoned(dtype, data.v.data.len())
    }

    pub(super) fn quadratic(
        &self,
        data: &Data,
        problem: &Quadratic,
        pass: Pass,
        lse: bool,
    ) -> attn_kernels::Result<Results> {
        let accumulator = self.dtype.accumulator();
        let (q, k, v) = (self.q.view(), self.k.view(), self.v.view());
        let Extras { key_mask, bias, attention_bias, sinks, .. } = self.extras();
        let inputs = QuadraticInputs { q, k, v, key_mask, bias, attention_bias, sinks };
        let mut out = Buffer::poisoned(self.dtype, problem.output_len());
        let mut statistic = Buffer::poisoned(accumulator, problem.statistic_len());
        quadratic::forward(problem, &inputs, out.slice_mut(), Some(statistic.slice_mut()))?;
        let mut results = Results::default();
        let [batch, heads, queries, width] = data.d_out.shape;
        results.push("out", out.array([batch, heads, queries, width]));
        if lse {
            results.push("log_sum_exp", statistic.array([batch, heads, queries, 1]));
        }
        if pass == Pass::Forward {
            return Ok(results);
        }
        let saved = QuadraticSaved {
            out: View::contiguous(out.slice_from(0), &data.d_out.shape)?,
            statistic: View::contiguous(statistic.slice_from(0), &[batch, heads, queries])?,
            d_out: self.d_out.view(),
            d_statistic: self.d_lse.as_ref().map(Operand::view),
        };
        let poisoned = |array: &Array| Buffer::poisoned(self.dtype, array.data.len());
        let [mut d_q, mut d_k] = [&data.q, &data.k].map(poisoned);
        let mut d_v = self.room_for_values(data);
        let mut d_bias = data.extras.bias.as_ref().map(poisoned);
        let term = inputs.attention_bias.filter(|term| term.dtype().is_float());
        let mut beside = [term, inputs.sinks].map(|x| {
            let x = x.as_ref()?;
            Some(Buffer::poisoned(x.dtype(), x.dims().iter().product()))
        });
        let [attention_bias, sinks] = beside.each_mut().map(|x| x.as_mut().map(Buffer::slice_mut));
        let gradients = QuadraticGradients {
            q: d_q.slice_mut(),
            k: d_k.slice_mut(),
            v: d_v.slice_mut(),
            bias: d_bias.as_mut().map(Buffer::slice_mut),
            attention_bias,
            sinks,
        };
        quadratic::backward(problem, &inputs, &saved, gradients)?;
        results.push("d_q", d_q.array(data.q.shape));
        results.push("d_k", d_k.array(data.k.shape));
        results.push("d_v", d_v.array(data.v.shape));
        results.push("d_bias", d_bias.zip(data.extras.bias.as_ref()).map(|(d, bias)| d.array(bias.shape)));
        let [d_attention_bias, d_sinks] = beside;
        let of = |d: Option<Buffer>, x: &Option<Array>| d.zip(x.as_ref()).map(|(d, x)| d.array(x.shape));
        results.push("d_attention_bias", of(d_attention_bias, &data.extras.attention_bias));
        results.push("d_sinks", of(d_sinks, &data.extras.sinks));
        Ok(results)
    }

    pub(super) fn linear(
        &self,
        data: &Data,
        problem: &Linear,
        [&q, &k]: [&View<'_>; 2],
        pass: Pass,
    ) -> attn_kernels::Result<Results> {
        let accumulator = self.dtype.accumulator();
        let Extras { key_mask, log_decay, .. } = self.extras();
        let omega = self.omega.as_ref().map(Operand::view);
        let state = self.state.as_ref().map(|(s, z, stabilizer)| StateView {
            s: s.view(),
            z: z.view(),
            stabilizer: stabilizer.as_ref().map(Operand::view),
            position: data.position,
        });
        let inputs = LinearInputs { q, k, v: self.v.view(), key_mask, log_decay, omega, state };
        let mut out = Buffer::poisoned(self.dtype, problem.output_len());
        let has_statistic = problem.statistic_len() > 0;
        let mut statistic = Buffer::poisoned(accumulator, problem.statistic_len());
        let mut state = StateBuffers::new(problem, accumulator);
        let outputs = LinearOutputs {
            out: out.slice_mut(),
            statistic: has_statistic.then(|| statistic.slice_mut()),
            state: Some(state.room()),
        };
        linear::forward(problem, &inputs, outputs)?;
        let mut results = Results::default();
        results.push("out", out.array(data.d_out.shape));
        state.push(&mut results);
        if pass == Pass::Forward {
            return Ok(results);
        }
        let [batch, heads, queries, _] = data.d_out.shape;
        let per_head = problem.statistic_len() == batch * heads * queries;
        let dims = if per_head { vec![batch, heads, queries] } else { vec![batch, queries] };
        let statistic = has_statistic.then(|| View::contiguous(statistic.slice_from(0), &dims)).transpose()?;
        let out = View::contiguous(out.slice_from(0), &data.d_out.shape)?;
        let d_state = self.d_state.as_ref().map(|[s, z]| StateGradient { s: s.view(), z: z.view() });
        let saved = LinearSaved { out, statistic, d_out: self.d_out.view(), d_state };
        self.linear_backward(data, problem, &inputs, &saved, &mut results)?;
        Ok(results)
    }

    fn linear_backward(
        &self,
        data: &Data,
        problem: &Linear,
        inputs: &LinearInputs<'_>,
        saved: &LinearSaved<'_>,
        results: &mut Results,
    ) -> attn_kernels::Result<()> {
        let [q, k] = data.global.as_ref().map_or([&data.q, &data.k], |global| global.each_ref());
        let poisoned = |array: &Array| Buffer::poisoned(self.dtype, array.data.len());
        let [mut d_q, mut d_k] = [q, k].map(poisoned);
        let mut d_v = self.room_for_values(data);
        let per_token = data.extras.log_decay.as_ref().filter(|_| inputs.log_decay.is_some_and(is_per_token));
        let mut d_log_decay = per_token.map(|g| Buffer::poisoned(self.dtype.accumulator(), g.data.len()));
        let mut d_state =
            saved.d_state.and(self.state.as_ref()).map(|_| StateBuffers::new(problem, self.dtype.accumulator()));
        let gradients = LinearGradients {
            q: d_q.slice_mut(),
            k: d_k.slice_mut(),
            v: d_v.slice_mut(),
            log_decay: d_log_decay.as_mut().map(Buffer::slice_mut),
            state: d_state
                .as_mut()
                .map(|StateBuffers { s, z, .. }| problem::StateGradient { s: s.slice_mut(), z: z.slice_mut() }),
        };
        linear::backward(problem, inputs, saved, gradients)?;
        results.push("d_q", d_q.array(q.shape));
        results.push("d_k", d_k.array(k.shape));
        results.push("d_v", d_v.array(data.v.shape));
        results.push("d_log_decay", d_log_decay.zip(per_token).map(|(d, g)| d.array(g.shape)));
        if let Some(d_state) = d_state {
            let [s, z] = d_state.sums();
            results.push("d_state.s", s);
            results.push("d_state.z", z);
        }
        Ok(())
    }
}

/// `[B, 1, H, D']` as `[1, B, H, D']`.
fn without_rows(z: &Array) -> Array {
    Array { shape: [1, z.shape[0], z.shape[2], z.shape[3]], ..z.clone() }
}

pub(super) fn is_per_token(log_decay: View<'_>) -> bool {
    log_decay.strides().len() == 3
}

/// Room for a final state.
struct StateBuffers {
    shapes: attn_kernels::problem::StateShapes,
    s: Buffer,
    z: Buffer,
    stabilizer: Option<Buffer>,
}

impl StateBuffers {
    fn new(problem: &Linear, accumulator: DType) -> Self {
        let shapes = problem.state_shapes();
        let poisoned = |dims: &[usize]| Buffer::poisoned(accumulator, dims.iter().product());
        let stabilizer = shapes.stabilizer.map(|dims| poisoned(&dims));
        Self { s: poisoned(&shapes.s), z: poisoned(&shapes.z), stabilizer, shapes }
    }

    fn room(&mut self) -> StateMut<'_> {
        let stabilizer = self.stabilizer.as_mut().map(Buffer::slice_mut);
        StateMut { s: self.s.slice_mut(), z: self.z.slice_mut(), stabilizer }
    }

    /// S and z in the shapes of the reference.
    fn sums(&self) -> [Array; 2] {
        let [batch, heads, features] = self.shapes.z;
        [self.s.array(self.shapes.s), self.z.array([batch, 1, heads, features])]
    }

    fn push(&self, results: &mut Results) {
        let ([batch, heads, _], [s, z]) = (self.shapes.z, self.sums());
        results.push("state.s", s);
        results.push("state.z", z);
        results.push("state.stabilizer", self.stabilizer.as_ref().map(|c| c.array([1, 1, batch, heads])));
    }
}

/// The sum of the branches of mixed chunks; the state of the global branch is not a result of the operation.
pub(super) fn add_branches(local: Results, global: Results) -> Results {
    let sum = |name| {
        let (x, y): (&Array, &Array) = (local.get(name)?, global.get(name)?);
        Some(Array { data: x.data.iter().zip(&y.data).map(|(x, y)| x + y).collect(), shape: x.shape })
    };
    let mut results = Results::default();
    results.push("out", sum("out"));
    results.push("d_q", local.get("d_q").cloned());
    results.push("d_k", local.get("d_k").cloned());
    results.push("d_q_global", global.get("d_q").cloned());
    results.push("d_k_global", global.get("d_k").cloned());
    results.push("d_v", sum("d_v"));
    results.push("d_bias", local.get("d_bias").cloned());
    results
}
