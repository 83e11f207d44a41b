//! Calls: what is to be computed.

use attn_kernels::Result;
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::problem::{Linear, Quadratic, View};
use attn_kernels::random_features::{FeatureKind, random_features};

use super::inputs::Inputs;
use super::mechanism::{self, DIRECTIONS, Mechanism};
use super::tensor::Tensor;

/// One mechanism on one set of operands, checked.
pub struct Call<'a> {
    pub mechanism: Mechanism,
    pub causal: bool,
    pub inputs: &'a Inputs,
    /// [H], or what the inputs give
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

impl<'a> Call<'a> {
    /// # Errors
    /// Those of the operation.
    pub fn new(mechanism: Mechanism, causal: bool, inputs: &'a Inputs) -> Result<Self> {
        let shape = &inputs.shape;
        let sums = inputs.float.accumulator();
        let given = &inputs.given;
        let retention = || Tensor::from_f64(sums, &mechanism::retention_log_decay(shape.key_heads), &[shape.key_heads]);
        let log_decay = (mechanism == Mechanism::Retention).then(|| given.log_decay.clone().unwrap_or_else(retention));
        let omega = match mechanism {
            Mechanism::Performer if given.omega.is_some() => given.omega.clone(),
            Mechanism::Performer => {
                let omega = random_features(FeatureKind::Orthogonal, DIRECTIONS, shape.width, 0)?;
                Some(Tensor::from_f64(sums, &omega, &[DIRECTIONS, shape.width]))
            }
            _ => None,
        };
        let problem = problem(mechanism, causal, inputs, log_decay.as_ref(), omega.as_ref())?;
        Ok(Self { mechanism, causal, inputs, log_decay, omega, problem })
    }

    /// Causal linear attention of another kind than [`Mechanism::Linear`]; it has no reference here.
    ///
    /// # Errors
    /// Those of the operation.
    pub fn linear(map: FeatureMap, normalizer: Option<f64>, inputs: &'a Inputs) -> Result<Self> {
        let (mechanism, log_decay) = (Mechanism::Linear, inputs.given.log_decay.clone());
        let options = LinearOptions {
            map,
            causal: true,
            normalizer,
            log_decay: log_decay.as_ref().map(Tensor::view).transpose()?,
            key_mask: key_mask(inputs)?,
            sequences: None,
        };
        let problem =
            options.problem(mechanism.operation(), &inputs.q.view()?, &inputs.k.view()?, &inputs.v.view()?)?;
        Ok(Self { mechanism, causal: true, inputs, log_decay, omega: None, problem: Problem::Linear(problem) })
    }

    /// Whether there is a log-decay per token, which has a gradient.
    pub fn has_log_decay_gradient(&self) -> bool {
        self.log_decay.as_ref().is_some_and(|log_decay| log_decay.dims.len() == 3)
    }

    /// Bytes of the gradients.
    pub fn gradient_bytes(&self) -> usize {
        let Inputs { q, k, v, .. } = self.inputs;
        let branches = if matches!(self.problem, Problem::Mixed { .. }) { 2 } else { 1 };
        branches * (q.bytes() + k.bytes()) + v.bytes()
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
