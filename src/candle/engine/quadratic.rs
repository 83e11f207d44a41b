//! The quadratic engine on tensors.

use std::sync::Arc;

use candle_core::{DType, Layout, Result, Storage, Tensor};

use super::backend::{Backend, on_device};
use super::graph::{GradientRooms, Gradients, Inputs, Node, attach};
use super::tensors::{Admission, Reading, accumulator, buffer, tensor, view, viewable};
use crate::problem::{Quadratic, QuadraticGradients, QuadraticInputs, QuadraticSaved};

/// A problem with its tensors.
pub struct QuadraticCall {
    problem: Quadratic,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// What stands for v in the graph: v in the dtype of sums, for a gradient that is not rounded yet.
    wide_v: Option<Tensor>,
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
        let admission = Admission::new(problem.function, q);
        Ok(Self {
            problem,
            q: admission.differentiable("q", q)?,
            k: admission.differentiable("k", k)?,
            v: admission.differentiable("v", v)?,
            wide_v: None,
            key_mask: key_mask.map(|mask| admission.constant("key_mask", mask)).transpose()?,
            bias: bias.map(|bias| admission.differentiable("bias", bias)).transpose()?,
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
        let (out, statistic) = self.forward(dtype)?;
        OutputNode::attach(Arc::new(self), out, statistic)
    }

    /// The output and the log-sum-exp of a softmax.
    pub fn output_and_lse(self) -> Result<(Tensor, Tensor)> {
        let (out, lse) = self.forward(self.q.dtype())?;
        let call = Arc::new(self);
        let rows = call.rows();
        let statistic = lse.try_clone(&Layout::contiguous(&rows[..]))?;
        let out = OutputNode::attach(call.clone(), out, statistic)?;
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
        Inputs { q: &self.q, k: &self.k, v: self.wide_v.as_ref().unwrap_or(&self.v), extra }
    }

    /// Calls an engine with the operands.
    fn compute<B: Backend>(
        &self,
        backend: &B,
        engine: impl FnOnce(&QuadraticInputs<B::View<'_>>) -> crate::Result<()>,
    ) -> Result<()> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(Reading::new);
        let [key_mask, bias] = [&self.key_mask, &self.bias].map(|tensor| tensor.as_ref().map(Reading::new));
        let [q, k, v] = [q.view(backend)?, k.view(backend)?, v.view(backend)?];
        let (key_mask, bias) = (view(backend, &key_mask)?, view(backend, &bias)?);
        Ok(engine(&QuadraticInputs { q, k, v, key_mask, bias })?)
    }

    /// The output and the row statistic.
    fn forward(&self, dtype: DType) -> Result<(Storage, Storage)> {
        let device = self.q.device();
        let mut out = buffer(device, dtype, self.problem.output_len())?;
        let mut statistic = buffer(device, accumulator(dtype), self.problem.statistic_len())?;
        on_device!(device, backend => {
            let rooms = (backend.room(&mut out)?, backend.room(&mut statistic)?);
            self.compute(backend, |inputs| backend.quadratic_forward(&self.problem, inputs, rooms.0, rooms.1))?
        });
        Ok((out, statistic))
    }

    fn backward(
        &self,
        out: &Tensor,
        statistic: &Tensor,
        d_out: &Tensor,
        d_statistic: Option<&Tensor>,
    ) -> Result<Gradients> {
        let mut gradients = Gradients::new(self.inputs())?;
        on_device!(self.q.device(), backend => {
            let (d_out, d_statistic) = (viewable(d_out)?, d_statistic.map(viewable).transpose()?);
            let [out, statistic, d_out] = [out, statistic, &d_out].map(Reading::new);
            let d_statistic = d_statistic.as_ref().map(Reading::new);
            let saved = QuadraticSaved {
                out: out.view(backend)?,
                statistic: statistic.view(backend)?,
                d_out: d_out.view(backend)?,
                d_statistic: view(backend, &d_statistic)?,
            };
            let GradientRooms { q, k, v, extra: bias } = gradients.rooms(backend, self.inputs())?;
            let rooms = QuadraticGradients { q, k, v, bias };
            self.compute(backend, |inputs| backend.quadratic_backward(&self.problem, inputs, &saved, rooms))?
        });
        Ok(gradients)
    }
}

/// The way back from the output.
struct OutputNode {
    call: Arc<QuadraticCall>,
    statistic: Tensor,
}

impl OutputNode {
    fn attach(call: Arc<QuadraticCall>, out: Storage, statistic: Storage) -> Result<Tensor> {
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
