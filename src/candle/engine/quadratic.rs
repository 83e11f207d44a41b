//! The quadratic engine on tensors.

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Result, Tensor};

use super::graph::{GradientSlices, Gradients, Inputs, Node, attach};
use super::tensors::{Reading, accumulator, buffer, constant, differentiable, slice_mut, tensor, view, viewable};
use crate::cpu::quadratic::{QuadraticGradients, QuadraticInputs, QuadraticSaved, backward, forward};
use crate::problem::Quadratic;

/// A problem with its tensors.
pub struct QuadraticCall {
    problem: Quadratic,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Option<Tensor>,
    bias: Option<Tensor>,
}

impl QuadraticCall {
    pub fn new(
        problem: Quadratic,
        [q, k, v]: [&Tensor; 3],
        key_mask: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Self> {
        let function = problem.function;
        Ok(Self {
            problem,
            q: differentiable(function, "q", q)?,
            k: differentiable(function, "k", k)?,
            v: differentiable(function, "v", v)?,
            key_mask: key_mask.map(|mask| constant(function, "key_mask", mask)).transpose()?,
            bias: bias.map(|bias| differentiable(function, "bias", bias)).transpose()?,
        })
    }

    /// The output in the dtype of q.
    pub fn output(self) -> Result<Tensor> {
        let dtype = self.q.dtype();
        self.output_in(dtype)
    }

    /// The output in `dtype`: that of q or that of sums.
    pub fn output_in(self, dtype: DType) -> Result<Tensor> {
        let (out, statistic) = self.forward(dtype)?;
        OutputNode::attach(Arc::new(self), out, statistic)
    }

    /// The output and the log-sum-exp of a softmax.
    pub fn output_and_lse(self) -> Result<(Tensor, Tensor)> {
        let (out, lse) = self.forward(self.q.dtype())?;
        let call = Arc::new(self);
        let (out, rows) = (OutputNode::attach(call.clone(), out, lse.clone())?, call.rows());
        let lse = attach(LogSumExpNode { call, out: out.detach() }, lse, &rows[..])?;
        Ok((out, lse))
    }

    /// B, H, N
    fn rows(&self) -> [usize; 3] {
        let shapes = &self.problem.shapes;
        [shapes.batch, shapes.heads, shapes.queries]
    }

    fn inputs(&self) -> Inputs<'_> {
        let extra = self.bias.as_ref().filter(|bias| bias.track_op());
        Inputs { q: &self.q, k: &self.k, v: &self.v, extra }
    }

    /// Calls the engine.
    fn compute(&self, engine: impl FnOnce(&Quadratic, &QuadraticInputs<'_>) -> crate::Result<()>) -> Result<()> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(Reading::new);
        let [key_mask, bias] = [&self.key_mask, &self.bias].map(|tensor| tensor.as_ref().map(Reading::new));
        let (key_mask, bias) = (view(&key_mask)?, view(&bias)?);
        let inputs = QuadraticInputs { q: q.view()?, k: k.view()?, v: v.view()?, key_mask, bias };
        Ok(engine(&self.problem, &inputs)?)
    }

    /// The output and the row statistic.
    fn forward(&self, dtype: DType) -> Result<(CpuStorage, CpuStorage)> {
        let mut out = buffer(dtype, self.problem.output_len())?;
        let mut statistic = buffer(accumulator(dtype), self.problem.statistic_len())?;
        let (out_slice, statistic_slice) = (slice_mut(&mut out)?, slice_mut(&mut statistic)?);
        self.compute(|problem, inputs| forward(problem, inputs, out_slice, Some(statistic_slice)))?;
        Ok((out, statistic))
    }

    fn backward(
        &self,
        out: &Tensor,
        statistic: &Tensor,
        d_out: &Tensor,
        d_statistic: Option<&Tensor>,
    ) -> Result<Gradients> {
        let (d_out, d_statistic) = (viewable(d_out)?, d_statistic.map(viewable).transpose()?);
        let [out, statistic, d_out] = [out, statistic, &d_out].map(Reading::new);
        let d_statistic = d_statistic.as_ref().map(Reading::new);
        let saved = QuadraticSaved {
            out: out.view()?,
            statistic: statistic.view()?,
            d_out: d_out.view()?,
            d_statistic: view(&d_statistic)?,
        };
        let mut gradients = Gradients::new(self.inputs())?;
        let GradientSlices { q, k, v, extra: bias } = gradients.slices(self.inputs())?;
        let slices = QuadraticGradients { q, k, v, bias };
        self.compute(|problem, inputs| backward(problem, inputs, &saved, slices))?;
        Ok(gradients)
    }
}

/// The way back from the output.
struct OutputNode {
    call: Arc<QuadraticCall>,
    statistic: Tensor,
}

impl OutputNode {
    fn attach(call: Arc<QuadraticCall>, out: CpuStorage, statistic: CpuStorage) -> Result<Tensor> {
        let rows = call.rows();
        let shape = [rows[0], rows[1], rows[2], call.problem.shapes.value_width];
        attach(Self { call, statistic: tensor(statistic, &rows[..]) }, out, &shape[..])
    }
}

impl Node for OutputNode {
    fn name(&self) -> &'static str {
        self.call.problem.function
    }

    fn inputs(&self) -> Inputs<'_> {
        self.call.inputs()
    }

    fn backward(&self, out: &Tensor, d_out: &Tensor) -> Result<Gradients> {
        self.call.backward(out, &self.statistic, d_out, None)
    }
}

/// The way back from the log-sum-exp.
struct LogSumExpNode {
    call: Arc<QuadraticCall>,
    out: Tensor,
}

impl Node for LogSumExpNode {
    fn name(&self) -> &'static str {
        self.call.problem.function
    }

    fn inputs(&self) -> Inputs<'_> {
        self.call.inputs()
    }

    fn backward(&self, lse: &Tensor, d_lse: &Tensor) -> Result<Gradients> {
        let row = Tensor::zeros((1, 1, 1, self.call.problem.shapes.value_width), self.out.dtype(), self.out.device())?;
        self.call.backward(&self.out, lse, &row.broadcast_as(self.out.shape())?, Some(d_lse))
    }
}
