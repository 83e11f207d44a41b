//! The quadratic engine on tensors.

use std::sync::Arc;

use candle_core::{DType, Layout, Result, Tensor};

use super::backend::{Backend, on_device};
use super::graph::{GradientRooms, Gradients, Inputs, Node, attach};
use super::reading::{Readings, read};
use super::tensors::{Admission, Buffer, accumulator, buffer, end_to_end, is_cut, rows, tensor, viewable};
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
    attention_bias: Option<Tensor>,
    sinks: Option<Tensor>,
    /// What stands in the graph for those of the biases and sinks that are tracked: the one, or all end to end in the dtype of
    /// sums.
    extra: Option<Tensor>,
}

impl QuadraticCall {
    pub fn new(
        problem: Quadratic,
        [q, k, v]: [&Tensor; 3],
        key_mask: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Self> {
        let admission = Admission::new(problem.function, q);
        let call = Self {
            problem,
            q: admission.differentiable("q", q)?,
            k: admission.differentiable("k", k)?,
            v: admission.differentiable("v", v)?,
            wide_v: None,
            key_mask: key_mask.map(|mask| admission.constant("key_mask", mask)).transpose()?,
            bias: bias.map(|bias| admission.differentiable("bias", bias)).transpose()?,
            attention_bias: None,
            sinks: None,
            extra: None,
        };
        call.with_extra()
    }

    /// The same with an attention bias and sinks.
    pub fn with(self, attention_bias: Option<&Tensor>, sinks: Option<&Tensor>) -> Result<Self> {
        let admission = Admission::new(self.problem.function, &self.q);
        let attention_bias = attention_bias.map(|term| match term.dtype() {
            DType::U8 => admission.constant("attention_bias", term),
            _ => admission.differentiable("attention_bias", term),
        });
        let sinks = sinks.map(|sinks| admission.differentiable("sinks", sinks));
        let call = Self { attention_bias: attention_bias.transpose()?, sinks: sinks.transpose()?, ..self };
        call.with_extra()
    }

    fn with_extra(self) -> Result<Self> {
        let tracked: Vec<&Tensor> = self.shared().into_iter().flatten().filter(|x| x.track_op()).collect();
        let sums = accumulator(self.q.dtype());
        let inputs = match tracked[..] {
            // Of several there is one dtype.
            [_, _, ..] => tracked.iter().map(|x| x.to_dtype(sums)).collect::<Result<_>>()?,
            _ => tracked.into_iter().cloned().collect(),
        };
        let extra = end_to_end(inputs)?;
        Ok(Self { extra, ..self })
    }

    /// What pairs have in common.
    fn shared(&self) -> [Option<&Tensor>; 3] {
        [self.bias.as_ref(), self.attention_bias.as_ref(), self.sinks.as_ref()]
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
        let (out, statistic) = self.forward(dtype)?;
        OutputNode::attach(Arc::new(self), out, statistic)
    }

    /// The output and the log-sum-exp of a softmax.
    pub fn output_and_lse(self) -> Result<(Tensor, Tensor)> {
        if is_cut(self.problem.shapes.sequences.as_ref(), &self.q) {
            let pairs: Vec<_> = self.parts().map(|part| part?.output_and_lse()).collect::<Result<_>>()?;
            let (outs, lses): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            return Ok((Tensor::cat(&outs, 2)?, Tensor::cat(&lses, 2)?));
        }
        let (out, lse) = self.forward(self.q.dtype())?;
        let call = Arc::new(self);
        let rows = call.rows();
        let statistic = Buffer { storage: lse.storage.try_clone(&Layout::contiguous(&rows[..]))?, ..lse };
        let out = OutputNode::attach(call.clone(), out, statistic)?;
        let lse = attach(LogSumExpNode { call, out: out.detach() }, lse, &rows[..])?;
        Ok((out, lse))
    }

    /// The call of each sequence.
    pub fn parts(&self) -> impl Iterator<Item = Result<Self>> {
        self.problem.parts().map(|(part, problem)| {
            let [queries, keys] = [&part.queries, &part.keys].map(|range| |x: &Tensor| rows(x, range));
            Ok(Self {
                problem,
                q: queries(&self.q)?,
                k: keys(&self.k)?,
                v: keys(&self.v)?,
                wide_v: self.wide_v.as_ref().map(keys).transpose()?,
                key_mask: self.key_mask.as_ref().map(keys).transpose()?,
                bias: self.bias.clone(),
                attention_bias: self.attention_bias.clone(),
                sinks: self.sinks.clone(),
                extra: self.extra.clone(),
            })
        })
    }

    /// B, H, N
    fn rows(&self) -> [usize; 3] {
        let shapes = &self.problem.shapes;
        [shapes.batch, shapes.heads, shapes.queries]
    }

    fn inputs(&self) -> Inputs<'_> {
        let v = self.wide_v.as_ref().unwrap_or(&self.v);
        Inputs { q: &self.q, k: &self.k, v, extra: self.extra.as_ref() }
    }

    /// Calls an engine with the operands, while `saved` can be read, too.
    fn compute<B: Backend>(
        &self,
        backend: &B,
        saved: &[&Tensor],
        engine: impl FnOnce(&QuadraticInputs<B::View<'_>>, Readings<'_>) -> Result<()>,
    ) -> Result<()> {
        let optional = self.key_mask.iter().chain(self.shared().into_iter().flatten());
        let operands = [&self.q, &self.k, &self.v].into_iter().chain(optional);
        let tensors: Vec<&Tensor> = operands.chain(saved.iter().copied()).collect();
        read(&tensors, |readings| {
            let view = |tensor: &Tensor| readings.view(backend, tensor);
            let (q, k, v) = (view(&self.q)?, view(&self.k)?, view(&self.v)?);
            let key_mask = readings.optional(backend, self.key_mask.as_ref())?;
            let [bias, attention_bias, sinks] = self.shared().map(|x| readings.optional(backend, x));
            let (bias, attention_bias, sinks) = (bias?, attention_bias?, sinks?);
            engine(&QuadraticInputs { q, k, v, key_mask, bias, attention_bias, sinks }, readings)
        })
    }

    /// The output and the row statistic.
    fn forward(&self, dtype: DType) -> Result<(Buffer, Buffer)> {
        let device = self.q.device();
        let mut out = buffer(device, dtype, self.problem.output_len())?;
        let mut statistic = buffer(device, accumulator(dtype), self.problem.statistic_len())?;
        on_device!(device, backend => {
            let rooms = (backend.room(&mut out)?, backend.room(&mut statistic)?);
            self.compute(backend, &[], |inputs, _| {
                Ok(backend.quadratic_forward(&self.problem, inputs, rooms.0, rooms.1)?)
            })?
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
            let GradientRooms { q, k, v, extra } = gradients.rooms(backend, self.inputs())?;
            let mut rest = extra;
            let mut room = |x: &Option<Tensor>| {
                let x = x.as_ref().filter(|x| x.track_op())?;
                backend.take(&mut rest, x.elem_count())
            };
            let (bias, attention_bias, sinks) = (room(&self.bias), room(&self.attention_bias), room(&self.sinks));
            let rooms = QuadraticGradients { q, k, v, bias, attention_bias, sinks };
            let saved: Vec<&Tensor> = [out, statistic, &d_out].into_iter().chain(&d_statistic).collect();
            self.compute(backend, &saved, |inputs, readings| {
                let saved = QuadraticSaved {
                    out: readings.view(backend, out)?,
                    statistic: readings.view(backend, statistic)?,
                    d_out: readings.view(backend, &d_out)?,
                    d_statistic: readings.optional(backend, d_statistic.as_ref())?,
                };
                Ok(backend.quadratic_backward(&self.problem, inputs, &saved, rooms)?)
            })?
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
    fn attach(call: Arc<QuadraticCall>, out: Buffer, statistic: Buffer) -> Result<Tensor> {
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
