//! Calls of the CPU backend.

use attn_kernels::Result;
use attn_kernels::cpu::quadratic::{self, QuadraticGradients, QuadraticInputs, QuadraticSaved};
use attn_kernels::problem::{Linear, Quadratic, View};
use attn_kernels::random_features::{FeatureKind, random_features};

use super::inputs::Inputs;
use super::linear_call;
use super::mechanism::{self, DIRECTIONS, Mechanism, Pass};
use super::tensor::Tensor;

/// One mechanism on one set of operands, checked and ready to be run any number of times.
pub struct Call<'a> {
    pub mechanism: Mechanism,
    pub causal: bool,
    pub inputs: &'a Inputs,
    /// [H]
    pub log_decay: Option<Tensor>,
    /// [m, D]
    pub omega: Option<Tensor>,
    pub(super) problem: Problem,
}

pub(super) enum Problem {
    Quadratic(Quadratic),
    Linear(Linear),
    /// Both read the same queries and keys.
    Mixed {
        local: Quadratic,
        global: Linear,
    },
}

/// What a forward pass leaves behind.
pub struct Outputs {
    /// [B, H, N, E]
    pub out: Tensor,
    /// One number per row of the output, for a backward pass.
    pub statistic: Option<Tensor>,
}

pub struct Gradients {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// Of q and k through the global branch of FLASH.
    pub global: Option<(Tensor, Tensor)>,
}

impl<'a> Call<'a> {
    /// # Errors
    /// Those of the operation.
    pub fn new(mechanism: Mechanism, causal: bool, inputs: &'a Inputs) -> Result<Self> {
        let shape = &inputs.shape;
        let sums = inputs.float.accumulator();
        let log_decay = (mechanism == Mechanism::Retention)
            .then(|| Tensor::from_f64(sums, &mechanism::retention_log_decay(shape.key_heads), &[shape.key_heads]));
        let omega = match mechanism {
            Mechanism::Performer => {
                let omega = random_features(FeatureKind::Orthogonal, DIRECTIONS, shape.width, 0)?;
                Some(Tensor::from_f64(sums, &omega, &[DIRECTIONS, shape.width]))
            }
            _ => None,
        };
        let problem = problem(mechanism, causal, inputs, log_decay.as_ref(), omega.as_ref())?;
        Ok(Self { mechanism, causal, inputs, log_decay, omega, problem })
    }

    /// Room for the results; `pass` says whether a backward pass follows.
    pub fn outputs(&self, pass: Pass) -> Outputs {
        let (shape, float) = (&self.inputs.shape, self.inputs.float);
        let rows = [shape.batch, shape.heads, shape.queries];
        let has_statistic = pass == Pass::Bwd
            && match &self.problem {
                Problem::Quadratic(_) | Problem::Mixed { .. } => true,
                Problem::Linear(linear) => linear.statistic_len() > 0,
            };
        Outputs {
            out: Tensor::zeros(float, &[rows[0], rows[1], rows[2], shape.value_width]),
            statistic: has_statistic.then(|| Tensor::zeros(float.accumulator(), &rows)),
        }
    }

    /// Room for the gradients.
    pub fn gradients(&self) -> Gradients {
        let like = |tensor: &Tensor| Tensor::zeros(tensor.data.float(), &tensor.dims);
        let Inputs { q, k, v, .. } = self.inputs;
        Gradients {
            q: like(q),
            k: like(k),
            v: like(v),
            global: matches!(self.problem, Problem::Mixed { .. }).then(|| (like(q), like(k))),
        }
    }

    /// # Errors
    /// Those of the engines, which this call's own outputs do not cause.
    pub fn forward(&self, outputs: &mut Outputs) -> Result<()> {
        match &self.problem {
            Problem::Quadratic(problem) => self.quadratic_forward(problem, outputs),
            Problem::Linear(problem) => linear_call::forward(self, problem, outputs),
            Problem::Mixed { local, global } => {
                self.quadratic_forward(local, outputs)?;
                let out = Tensor::zeros(self.inputs.float, &outputs.out.dims);
                let mut branch = Outputs { out, statistic: None };
                linear_call::forward(self, global, &mut branch)?;
                outputs.out.data.add(&branch.out.data);
                Ok(())
            }
        }
    }

    /// The gradients for `d_out`, after a forward pass with [`Pass::Bwd`].
    ///
    /// # Errors
    /// As [`Call::forward`].
    pub fn backward(&self, outputs: &Outputs, d_out: &Tensor, gradients: &mut Gradients) -> Result<()> {
        match &self.problem {
            Problem::Quadratic(problem) => self.quadratic_backward(problem, outputs, d_out, gradients),
            Problem::Linear(problem) => linear_call::backward(self, problem, outputs, d_out, gradients),
            Problem::Mixed { local, global } => {
                self.quadratic_backward(local, outputs, d_out, gradients)?;
                let Some((q, k)) = gradients.global.take() else { return Ok(()) };
                let v = Tensor::zeros(self.inputs.float, &gradients.v.dims);
                let mut branch = Gradients { q, k, v, global: None };
                linear_call::backward(self, global, outputs, d_out, &mut branch)?;
                gradients.v.data.add(&branch.v.data);
                gradients.global = Some((branch.q, branch.k));
                Ok(())
            }
        }
    }

    /// Bytes of the gradients.
    pub fn gradient_bytes(&self) -> usize {
        let Inputs { q, k, v, .. } = self.inputs;
        let branches = if matches!(self.problem, Problem::Mixed { .. }) { 2 } else { 1 };
        branches * (q.bytes() + k.bytes()) + v.bytes()
    }

    pub(super) fn key_mask(&self) -> Result<Option<View<'_>>> {
        key_mask(self.inputs)
    }

    fn quadratic_inputs(&self) -> Result<QuadraticInputs<'_>> {
        let Inputs { q, k, v, .. } = self.inputs;
        Ok(QuadraticInputs { q: q.view()?, k: k.view()?, v: v.view()?, key_mask: self.key_mask()?, bias: None })
    }

    fn quadratic_forward(&self, problem: &Quadratic, outputs: &mut Outputs) -> Result<()> {
        let statistic = outputs.statistic.as_mut().map(|statistic| statistic.data.slice_mut());
        quadratic::forward(problem, &self.quadratic_inputs()?, outputs.out.data.slice_mut(), statistic)
    }

    fn quadratic_backward(
        &self,
        problem: &Quadratic,
        outputs: &Outputs,
        d_out: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let statistic = outputs.statistic.as_ref().expect("outputs made for a backward pass").view()?;
        let saved = QuadraticSaved { out: outputs.out.view()?, statistic, d_out: d_out.view()?, d_statistic: None };
        let gradients = QuadraticGradients {
            q: gradients.q.data.slice_mut(),
            k: gradients.k.data.slice_mut(),
            v: gradients.v.data.slice_mut(),
            bias: None,
        };
        quadratic::backward(problem, &self.quadratic_inputs()?, &saved, gradients)
    }
}

impl Gradients {
    /// In the order of [`results`](super::reference::results).
    pub fn into_list(self) -> Vec<Tensor> {
        let (q_global, k_global) = self.global.unzip();
        [self.q, self.k, self.v].into_iter().chain(q_global).chain(k_global).collect()
    }
}

fn key_mask(inputs: &Inputs) -> Result<Option<View<'_>>> {
    let dims = [inputs.shape.batch, inputs.shape.keys];
    inputs.key_mask.as_ref().map(|mask| View::contiguous(mask.as_slice(), &dims)).transpose()
}

fn problem(
    mechanism: Mechanism,
    causal: bool,
    inputs: &Inputs,
    log_decay: Option<&Tensor>,
    omega: Option<&Tensor>,
) -> Result<Problem> {
    let (q, k, v) = (&inputs.q.view()?, &inputs.k.view()?, &inputs.v.view()?);
    let (name, mask) = (mechanism.operation(), key_mask(inputs)?);
    Ok(match mechanism {
        Mechanism::Softmax => Problem::Quadratic(mechanism::softmax(causal, mask).problem(name, q, k, v)?),
        Mechanism::Diag => Problem::Quadratic(mechanism::diag(causal, mask).problem(name, q, k, v)?),
        Mechanism::Gau => Problem::Quadratic(mechanism::gau(causal, mask, inputs.shape.keys).problem(name, q, k, v)?),
        Mechanism::Linear => Problem::Linear(mechanism::linear(causal, mask).problem(name, q, k, v)?),
        Mechanism::Retention => {
            let log_decay = log_decay.map(Tensor::view).transpose()?;
            Problem::Linear(mechanism::retention(mask, log_decay).problem(name, q, k, v)?)
        }
        Mechanism::Performer => {
            let omega = omega.expect("directions made for the Performer").view()?;
            Problem::Linear(mechanism::performer(causal, mask).problem(name, q, k, v, &omega)?)
        }
        Mechanism::Norm => Problem::Linear(mechanism::norm(causal, mask).problem(name, q, k, v)?),
        Mechanism::Flash => {
            let options = mechanism::flash(causal, mask);
            Problem::Mixed {
                local: options.local_problem(name, q, k, v)?,
                global: options.global_problem(name, q, k, v)?,
            }
        }
    })
}
