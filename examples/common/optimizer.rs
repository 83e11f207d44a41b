//! AdamW (Loshchilov & Hutter 2017) with moments that can be stored, a schedule and clipping.

use std::collections::{BTreeMap, HashMap};

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::VarMap;

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.95;
const EPSILON: f64 = 1e-8;
const WEIGHT_DECAY: f64 = 0.01;
/// Largest norm of all gradients together.
const CLIP: f64 = 1.0;

struct Parameter {
    variable: Var,
    moments: Option<Moments>,
}

struct Moments {
    first: Tensor,
    second: Tensor,
}

pub struct AdamW {
    /// By name, so that sums over all of them always run in the same order.
    parameters: BTreeMap<String, Parameter>,
}

impl AdamW {
    pub fn new(variables: &VarMap) -> Self {
        let variables = variables.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let parameter = |variable: &Var| Parameter { variable: variable.clone(), moments: None };
        Self { parameters: variables.iter().map(|(name, variable)| (name.clone(), parameter(variable))).collect() }
    }

    /// Step `step`, from 0. Variables without a gradient stay as they are; matrices decay, vectors do not.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(&mut self, gradients: &GradStore, step: usize, learning_rate: f64) -> Result<()> {
        let found = self.parameters.values().filter_map(|parameter| gradients.get(&parameter.variable));
        let squares: Vec<_> = found.map(|gradient| gradient.sqr()?.sum_all()).collect::<Result<_>>()?;
        let norm = f64::from(Tensor::stack(&squares, 0)?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?).sqrt();
        let scale = (CLIP / norm).min(1.0);
        let count = step as i32 + 1;
        let rates = [1.0 - BETA_1.powi(count), 1.0 - BETA_2.powi(count)];
        for parameter in self.parameters.values_mut() {
            if let Some(gradient) = gradients.get(&parameter.variable) {
                parameter.step(&gradient.affine(scale, 0.0)?, learning_rate, rates)?;
            }
        }
        Ok(())
    }

    /// The moments, as `<variable>.first_moment` and `<variable>.second_moment`.
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        let with_moments = self.parameters.iter().filter_map(|(name, p)| Some((name, p.moments.as_ref()?)));
        let named = with_moments.flat_map(|(name, Moments { first, second })| {
            [(format!("{name}.first_moment"), first.clone()), (format!("{name}.second_moment"), second.clone())]
        });
        named.collect()
    }

    /// Takes up what [`Self::tensors`] gave.
    ///
    /// # Errors
    /// Names a tensor whose shape is not that of its variable.
    pub fn load(&mut self, mut tensors: HashMap<String, Tensor>) -> std::result::Result<(), String> {
        for (name, parameter) in &mut self.parameters {
            let mut take = |moment| {
                let name = format!("{name}.{moment}");
                let tensor = tensors.remove(&name);
                let (got, needs) = (tensor.as_ref().map(Tensor::dims), parameter.variable.dims());
                match got {
                    Some(got) if got != needs => Err(format!("{name} has shape {got:?}, needs {needs:?}")),
                    _ => Ok(tensor),
                }
            };
            let (first, second) = (take("first_moment")?, take("second_moment")?);
            parameter.moments = first.zip(second).map(|(first, second)| Moments { first, second });
        }
        match tensors.into_keys().min() {
            Some(name) => Err(format!("{name} belongs to no variable of this model")),
            None => Ok(()),
        }
    }
}

impl Parameter {
    fn step(&mut self, gradient: &Tensor, learning_rate: f64, [rate_1, rate_2]: [f64; 2]) -> Result<()> {
        let (first, second) = ((gradient * (1.0 - BETA_1))?, (gradient.sqr()? * (1.0 - BETA_2))?);
        let (first, second) = match &self.moments {
            None => (first, second),
            Some(moments) => ((first + (&moments.first * BETA_1)?)?, (second + (&moments.second * BETA_2)?)?),
        };
        let scale = ((&second / rate_2)?.sqrt()? + EPSILON)?;
        let change = ((&first * (learning_rate / rate_1))? / scale)?;
        let decay = if self.variable.rank() > 1 { learning_rate * WEIGHT_DECAY } else { 0.0 };
        self.variable.set(&((self.variable.as_detached_tensor() * (1.0 - decay))? - change)?)?;
        self.moments = Some(Moments { first, second });
        Ok(())
    }
}

/// The learning rate of `step` of `steps`: linear from 0 to `peak` over a tenth of the steps, then along a cosine to a
/// tenth of it.
pub fn learning_rate(peak: f64, step: usize, steps: usize) -> f64 {
    let warm_up = (steps as f64 / 10.0).max(1.0);
    let step = step as f64 + 1.0;
    if step <= warm_up {
        return peak * step / warm_up;
    }
    let progress = (step - warm_up) / (steps as f64 - warm_up).max(1.0);
    peak * (0.55 + 0.45 * (std::f64::consts::PI * progress).cos())
}
