//! The linear engine's kernels on the emulator.

use std::collections::BTreeMap;

use attn_kernels::gpu::linear::{ForwardOutputs, LinearLayout, SavedLayout, StateLayout, plan_backward, plan_forward};
use attn_kernels::gpu::plan::{Argument, DeviceFacts, Plan};
use attn_kernels::problem::{DType, Linear};

use super::super::buffers::{Buffer, Operand};
use super::super::cases::{Case, Operation};
use super::super::data::Data;
use super::super::executor::{Executor, Tensor};
use super::super::options::{Extras, With};
use super::super::reference::Results;
use super::cpu::{Operands, add_branches, is_per_token};
use super::{Backend, Emulated, Pass};

/// Plans for a device, run for each of the seeds, whose results must be the same bits. The local branch of mixed chunks is
/// computed on the CPU.
pub struct EmulatedLinear {
    pub facts: DeviceFacts,
    pub executor: Executor,
    pub seeds: &'static [u32],
    /// Whether outputs are in the type of sums.
    pub wide_out: bool,
    /// Whether forward passes hand out a state.
    pub state: bool,
}

/// State heads, over the whole batch, past which one seed of the forward pass has to do: a minute of emulation.
const MANY_HEADS: usize = 10_000;

fn has_many_heads(case: &Case) -> bool {
    case.batch * case.state_heads() > MANY_HEADS
}

fn is_aligned(operand: &Operand) -> bool {
    Tensor::of(Argument::Q, operand).start.is_multiple_of(16)
}

impl Emulated for EmulatedLinear {
    fn on(&self, executor: Executor, seeds: &'static [u32]) -> Box<dyn Backend> {
        Box::new(Self { executor, seeds, ..*self })
    }

    fn executor(&self) -> &Executor {
        &self.executor
    }

    fn seeds(&self) -> &'static [u32] {
        self.seeds
    }
}

impl Backend for EmulatedLinear {
    fn name(&self) -> String {
        format!("{}/linear", self.executor.name())
    }

    fn is_available(&self) -> bool {
        self.executor.is_available()
    }

    fn takes(&self, case: &Case) -> bool {
        !case.state_gradient && (case.operation.has_state() || matches!(case.operation, Operation::MixedChunk(_)))
    }

    fn run(&self, case: &Case, data: &Data, dtype: DType, pass: Pass) -> Result<Results, String> {
        let pass = if has_many_heads(case) { Pass::Forward } else { pass };
        let operands = Operands::new(case, data, dtype);
        let (q, k, v) = (&operands.q.view(), &operands.k.view(), &operands.v.view());
        let (extras, name) = (operands.extras(), case.operation.name());
        let worded = |error: attn_kernels::Error| error.to_string();
        let run = |problem: &Linear, rows: [&Operand; 2]| {
            Call { backend: self, case, data, operands: &operands, problem, rows }.run(pass)
        };
        let rows = [&operands.q, &operands.k];
        match &case.operation {
            Operation::Linear(o) => run(&o.with(extras).problem(name, q, k, v).map_err(worded)?, rows),
            Operation::Norm(o) => run(&o.with(extras).problem(name, q, k, v).map_err(worded)?, rows),
            Operation::Performer(o, _) => {
                let omega = operands.omega.as_ref().expect("ω of a Performer").view();
                run(&o.with(extras).problem(name, q, k, v, &omega).map_err(worded)?, rows)
            }
            Operation::MixedChunk(o) => {
                let [q_lin, k_lin] = operands.global.as_ref().expect("operands of the global branch").each_ref();
                let options = o.with(extras);
                let local = options.local_problem(name, q, k, v).map_err(worded)?;
                let local = operands.quadratic(data, &local, pass, false).map_err(worded)?;
                let global = options.global_problem(name, &q_lin.view(), &k_lin.view(), v).map_err(worded)?;
                Ok(add_branches(local, run(&global, [q_lin, k_lin])?))
            }
            operation => Err(format!("{} is not of the linear family", operation.name())),
        }
    }
}

/// One problem with its operands.
struct Call<'a> {
    backend: &'a EmulatedLinear,
    case: &'a Case,
    data: &'a Data,
    operands: &'a Operands,
    problem: &'a Linear,
    /// q and k.
    rows: [&'a Operand; 2],
}

impl Call<'_> {
    fn run(&self, pass: Pass) -> Result<Results, String> {
        let (problem, data, dtype) = (self.problem, self.data, self.operands.dtype);
        let accumulator = dtype.accumulator();
        let wide_out = self.backend.wide_out;
        let wanted = ForwardOutputs { wide_out, statistic: problem.statistic_len() > 0, state: self.backend.state };
        let plan = plan_forward(problem, &self.layout(), wanted, &self.backend.facts);
        let shapes = problem.state_shapes();
        let [s, z] = [shapes.s.iter().product(), shapes.z.iter().product()];
        let stabilizers = shapes.stabilizer.map(|dims| dims.iter().product::<usize>());
        let out = (Argument::Out, if wide_out { accumulator } else { dtype }, problem.output_len());
        let mut outputs = vec![out];
        if self.backend.state {
            outputs.extend([(Argument::FinalS, accumulator, s), (Argument::FinalZ, accumulator, z)]);
            outputs.extend(stabilizers.map(|len| (Argument::FinalStabilizer, accumulator, len)));
        }
        outputs.push((Argument::Statistic, accumulator, problem.statistic_len()));
        let mut forward = self.execute(&plan, self.inputs(), &outputs)?;
        let mut take = |argument| forward.remove(&argument);
        let out = take(Argument::Out).expect("asked for");
        let mut results = Results::default();
        results.push("out", out.array(data.d_out.shape));
        let [batch, heads, features] = shapes.z;
        results.push("state.s", take(Argument::FinalS).map(|s| s.array(shapes.s)));
        results.push("state.z", take(Argument::FinalZ).map(|z| z.array([batch, 1, heads, features])));
        results.push("state.stabilizer", take(Argument::FinalStabilizer).map(|c| c.array([1, 1, batch, heads])));
        if pass == Pass::Both {
            let statistic = take(Argument::Statistic).expect("asked for");
            self.backward(&out, &statistic, &mut results)?;
        }
        Ok(results)
    }

    fn backward(&self, out: &Buffer, statistic: &Buffer, results: &mut Results) -> Result<(), String> {
        let (problem, data, dtype) = (self.problem, self.data, self.operands.dtype);
        let [_, heads, queries, width] = data.d_out.shape.map(|size| size as i64);
        let per_head = problem.statistic_len() == data.d_out.shape[..3].iter().product::<usize>();
        let log_decay = self.operands.extras.log_decay.as_ref().filter(|g| is_per_token(g.view()));
        let wide_out = self.backend.wide_out;
        let d_out_dtype = if wide_out { dtype.accumulator() } else { dtype };
        let d_out = Operand::new(&data.d_out, 4, d_out_dtype, self.case.layout);
        let saved = SavedLayout {
            out: [heads * queries * width, queries * width, width],
            d_out: d_out.outer_strides(),
            statistic: if per_head { [heads * queries, queries, 1] } else { [queries, 0, 1] },
            wide_out,
            d_log_decay: log_decay.is_some(),
            is_aligned: is_aligned(&d_out),
        };
        let plan = plan_backward(problem, &self.layout(), &saved, &self.backend.facts);
        let mut inputs = self.inputs();
        inputs.push(Tensor::input(Argument::Out, out.to_bytes(), 0));
        inputs.push(Tensor::input(Argument::Statistic, statistic.to_bytes(), 0));
        inputs.push(Tensor::of(Argument::DOut, &d_out));
        let [q, k] = data.global.as_ref().map_or([&data.q, &data.k], |global| global.each_ref());
        let mut named = vec![("d_q", Argument::DQ, q), ("d_k", Argument::DK, k), ("d_v", Argument::DV, &data.v)];
        let decays = log_decay.and(data.extras.log_decay.as_ref());
        named.extend(decays.map(|g| ("d_log_decay", Argument::DLogDecay, g)));
        let dtype_of = |argument| if argument == Argument::DLogDecay { dtype.accumulator() } else { dtype };
        let outputs: Vec<_> = named.iter().map(|&(_, a, array)| (a, dtype_of(a), array.data.len())).collect();
        let gradients = self.execute(&plan, inputs, &outputs)?;
        for (name, argument, array) in named {
            results.push(name, gradients[&argument].array(array.shape));
        }
        Ok(())
    }

    fn layout(&self) -> LinearLayout {
        let Operands { v, extras, omega, state, .. } = self.operands;
        let [q, k] = self.rows;
        LinearLayout {
            q: q.outer_strides(),
            k: k.outer_strides(),
            v: v.outer_strides(),
            key_mask: extras.key_mask.as_ref().map(|mask| mask.strides[0] as i64),
            log_decay: extras.log_decay.as_ref().map_or([0; 3], |g| match g.strides[..] {
                [head] => [0, head as i64, 0],
                _ => g.outer_strides(),
            }),
            omega: omega.as_ref().map_or(0, |omega| omega.strides[0] as i64),
            state: state.as_ref().map(|(s, z, stabilizer)| StateLayout {
                s: s.outer_strides(),
                z: z.outer_strides(),
                stabilizer: stabilizer.as_ref().map_or([0; 2], Operand::outer_strides),
                position: self.data.position,
            }),
            is_aligned: [q, k, v].into_iter().all(is_aligned),
        }
    }

    fn inputs(&self) -> Vec<Tensor> {
        let Operands { v, extras, omega, state, .. } = self.operands;
        let Extras { key_mask, log_decay, .. } = extras;
        let mut inputs = vec![Tensor::of(Argument::Q, self.rows[0]), Tensor::of(Argument::K, self.rows[1])];
        inputs.push(Tensor::of(Argument::V, v));
        let mut push = |argument, operand: Option<&Operand>| {
            inputs.extend(operand.map(|operand| Tensor::of(argument, operand)));
        };
        push(Argument::KeyMask, key_mask.as_ref());
        push(Argument::LogDecay, log_decay.as_ref());
        push(Argument::Omega, omega.as_ref());
        if let Some((s, z, stabilizer)) = state {
            push(Argument::StateS, Some(s));
            push(Argument::StateZ, Some(z));
            push(Argument::StateStabilizer, stabilizer.as_ref());
        }
        inputs
    }

    fn execute(
        &self,
        plan: &Plan,
        mut tensors: Vec<Tensor>,
        outputs: &[(Argument, DType, usize)],
    ) -> Result<BTreeMap<Argument, Buffer>, String> {
        plan.check(&self.backend.facts)?;
        tensors.extend(outputs.iter().map(|&(argument, dtype, len)| Tensor::output(argument, dtype.size() * len)));
        let seeds = if has_many_heads(self.case) { &self.backend.seeds[..1] } else { self.backend.seeds };
        let written = self.backend.executor.run(plan, &tensors, seeds)?;
        Ok(outputs
            .iter()
            .map(|&(argument, dtype, _)| (argument, Buffer::from_bytes(dtype, &written[&argument])))
            .collect())
    }
}
