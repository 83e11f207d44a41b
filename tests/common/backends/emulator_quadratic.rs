//! The quadratic engine's kernels on the emulator.

use std::collections::BTreeMap;

use attn_kernels::gpu::plan::{Argument, DeviceFacts, Plan};
use attn_kernels::gpu::quadratic::{
    QuadraticLayout, QuadraticOutputs, QuadraticSavedLayout, plan_backward, plan_forward,
};
use attn_kernels::problem::{DType, Quadratic};

use super::super::buffers::{Buffer, Operand};
use super::super::cases::{Case, Operation};
use super::super::data::Data;
use super::super::executor::{Executor, Tensor};
use super::super::options::{Extras, With};
use super::super::reference::Results;
use super::cpu::{Operands, add_branches};
use super::{Backend, Emulated, Pass};

/// Plans for a device, run for each of the seeds, whose results must be the same bits. The global branch of mixed chunks
/// is computed on the CPU.
pub struct EmulatedQuadratic {
    pub facts: DeviceFacts,
    pub executor: Executor,
    pub seeds: &'static [u32],
    /// Whether outputs are in the type of sums.
    pub wide_out: bool,
}

/// Heads, over the whole batch, past which one seed of the forward pass has to do: a minute of emulation.
const MANY_HEADS: usize = 10_000;

fn has_many_heads(case: &Case) -> bool {
    case.batch * case.heads[0] > MANY_HEADS
}

impl Emulated for EmulatedQuadratic {
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

impl Backend for EmulatedQuadratic {
    fn name(&self) -> String {
        format!("{}/quadratic", self.executor.name())
    }

    fn is_available(&self) -> bool {
        self.executor.is_available()
    }

    fn takes(&self, case: &Case) -> bool {
        !case.operation.has_state() && case.operation.is_on_gpu()
    }

    fn run(&self, case: &Case, data: &Data, dtype: DType, pass: Pass) -> Result<Results, String> {
        let pass = if has_many_heads(case) { Pass::Forward } else { pass };
        let operands = Operands::new(case, data, dtype);
        let (q, k, v) = (&operands.q.view(), &operands.k.view(), &operands.v.view());
        let (extras, name) = (operands.extras(), case.operation.name());
        let worded = |error: attn_kernels::Error| error.to_string();
        let run =
            |problem: &Quadratic, lse| Call { backend: self, case, data, operands: &operands, problem }.run(pass, lse);
        match &case.operation {
            Operation::Softmax(o) => run(&o.with(extras).problem(name, q, k, v).map_err(worded)?, true),
            Operation::Diag(o) => run(&o.with(extras).problem(name, q, k, v).map_err(worded)?, false),
            Operation::Gau(o) => run(&o.with(extras).problem(name, q, k, v).map_err(worded)?, false),
            Operation::MixedChunk(o) => {
                let [q_lin, k_lin] = operands.global.as_ref().expect("operands of the global branch").each_ref();
                let (q_lin, k_lin) = (&q_lin.view(), &k_lin.view());
                let options = o.with(extras);
                let local = run(&options.local_problem(name, q, k, v).map_err(worded)?, false)?;
                let global = options.global_problem(name, q_lin, k_lin, v).map_err(worded)?;
                let global = operands.linear(data, &global, [q_lin, k_lin], pass).map_err(worded)?;
                Ok(add_branches(local, global))
            }
            operation => Err(format!("{} is not of the quadratic family", operation.name())),
        }
    }
}

/// Whether an operand starts at a multiple of 16 bytes, as the memory around it does.
fn is_aligned(operand: &Operand) -> bool {
    Tensor::of(Argument::Q, operand).start.is_multiple_of(16)
}

/// One problem with its operands.
struct Call<'a> {
    backend: &'a EmulatedQuadratic,
    case: &'a Case,
    data: &'a Data,
    operands: &'a Operands,
    problem: &'a Quadratic,
}

impl Call<'_> {
    fn run(&self, pass: Pass, lse: bool) -> Result<Results, String> {
        let (problem, data, dtype) = (self.problem, self.data, self.operands.dtype);
        problem.ensure_on_gpu().map_err(|error| error.to_string())?;
        let wide_out = self.backend.wide_out;
        let outputs = QuadraticOutputs { wide_out, statistic: true };
        let plan = plan_forward(problem, &self.layout(), outputs, &self.backend.facts);
        let out_dtype = if wide_out { dtype.accumulator() } else { dtype };
        let outputs = [
            (Argument::Out, out_dtype, problem.output_len()),
            (Argument::Statistic, dtype.accumulator(), problem.statistic_len()),
        ];
        let forward = self.execute(&plan, self.inputs(), &outputs)?;
        let (out, statistic) = (&forward[&Argument::Out], &forward[&Argument::Statistic]);
        let [batch, heads, queries, width] = data.d_out.shape;
        let mut results = Results::default();
        results.push("out", out.array([batch, heads, queries, width]));
        if lse {
            results.push("log_sum_exp", statistic.array([batch, heads, queries, 1]));
        }
        if pass == Pass::Both {
            self.backward(out, statistic, &mut results)?;
        }
        Ok(results)
    }

    fn backward(&self, out: &Buffer, statistic: &Buffer, results: &mut Results) -> Result<(), String> {
        let (problem, data, operands) = (self.problem, self.data, self.operands);
        let [_, heads, queries, width] = data.d_out.shape.map(|size| size as i64);
        let accumulator = operands.dtype.accumulator();
        let wide = Operand::new(&data.d_out, 4, accumulator, self.case.layout);
        let d_out = if self.backend.wide_out { &wide } else { &operands.d_out };
        let saved = QuadraticSavedLayout {
            out: [heads * queries * width, queries * width, width],
            d_out: d_out.outer_strides(),
            statistic: [heads * queries, queries, 1],
            d_statistic: operands.d_lse.as_ref().map(Operand::outer_strides),
            wide_out: self.backend.wide_out,
            d_bias: operands.extras.bias.is_some(),
            is_aligned: is_aligned(d_out),
        };
        let plan = plan_backward(problem, &self.layout(), &saved, &self.backend.facts);
        let mut inputs = self.inputs();
        inputs.push(Tensor::input(Argument::Out, out.to_bytes(), 0));
        inputs.push(Tensor::input(Argument::Statistic, statistic.to_bytes(), 0));
        inputs.push(Tensor::of(Argument::DOut, d_out));
        inputs.extend(operands.d_lse.as_ref().map(|d| Tensor::of(Argument::DStatistic, d)));
        let mut named =
            vec![("d_q", Argument::DQ, &data.q), ("d_k", Argument::DK, &data.k), ("d_v", Argument::DV, &data.v)];
        named.extend(data.extras.bias.as_ref().map(|bias| ("d_bias", Argument::DBias, bias)));
        let outputs: Vec<_> = named.iter().map(|&(_, a, array)| (a, operands.dtype, array.data.len())).collect();
        let gradients = self.execute(&plan, inputs, &outputs)?;
        for (name, argument, array) in named {
            results.push(name, gradients[&argument].array(array.shape));
        }
        Ok(())
    }

    fn layout(&self) -> QuadraticLayout {
        let Operands { q, k, v, extras, .. } = self.operands;
        QuadraticLayout {
            q: q.outer_strides(),
            k: k.outer_strides(),
            v: v.outer_strides(),
            key_mask: extras.key_mask.as_ref().map(|mask| mask.strides[0] as i64),
            bias: extras.bias.as_ref().map_or(0, |bias| bias.strides[0] as i64),
            is_aligned: [q, k, v].into_iter().all(is_aligned),
        }
    }

    fn inputs(&self) -> Vec<Tensor> {
        let Operands { q, k, v, extras, .. } = self.operands;
        let Extras { key_mask, bias, .. } = extras;
        let mut inputs = vec![Tensor::of(Argument::Q, q), Tensor::of(Argument::K, k), Tensor::of(Argument::V, v)];
        inputs.extend(key_mask.as_ref().map(|mask| Tensor::of(Argument::KeyMask, mask)));
        inputs.extend(bias.as_ref().map(|bias| Tensor::of(Argument::Bias, bias)));
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
