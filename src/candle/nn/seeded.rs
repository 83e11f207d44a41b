use std::f64::consts::TAU;
use std::sync::PoisonError;

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Weights of a `VarMap` whose new variables are a function of the seed and of their names, on every device. (The
/// `VarBuilder` of candle-nn draws them from the device's generator, which cannot be seeded on the CPU.)
///
/// # Example
/// ```
/// use attn_kernels::nn::{Norm, NormConfig, seeded_weights};
/// use candle_core::{DType, Device};
/// use candle_nn::{Init, VarMap};
///
/// let draw = |seed| seeded_weights(&VarMap::new(), seed, DType::F32, &Device::Cpu).get_with_hints(
///     3,
///     "weight",
///     Init::Randn { mean: 0.0, stdev: 1.0 },
/// )?.to_vec1::<f32>();
/// assert_eq!(draw(1)?, draw(1)?);
/// assert_ne!(draw(1)?, draw(2)?);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn seeded_weights<'a>(variables: &VarMap, seed: u64, dtype: DType, device: &Device) -> VarBuilder<'a> {
    VarBuilder::from_backend(Box::new(Seeded { variables: variables.clone(), seed }), dtype, device.clone())
}

struct Seeded {
    variables: VarMap,
    seed: u64,
}

impl SimpleBackend for Seeded {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.contains_tensor(name)
            && let Some(draw) = Draw::new(init, &shape)
        {
            let mut random = ChaCha8Rng::seed_from_u64(self.seed ^ hash(name));
            let numbers: Vec<f64> = (0..shape.elem_count()).map(|_| draw.number(&mut random)).collect();
            let numbers = Tensor::from_vec(numbers, shape.clone(), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?;
            let mut variables = self.variables.data().lock().unwrap_or_else(PoisonError::into_inner);
            variables.insert(name.to_string(), Var::from_tensor(&numbers)?);
        }
        self.variables.get(shape, name, init, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        SimpleBackend::get_unchecked(&self.variables, name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.variables.contains_tensor(name)
    }
}

/// A distribution of mean `mean`: normal of standard deviation `scale`, or uniform up to `scale` on both sides.
struct Draw {
    is_normal: bool,
    mean: f64,
    scale: f64,
}

impl Draw {
    /// None for constants.
    fn new(init: Init, shape: &Shape) -> Option<Self> {
        Some(match init {
            Init::Const(_) => return None,
            Init::Randn { mean, stdev } => Self { is_normal: true, mean, scale: stdev },
            Init::Uniform { lo, up } => Self { is_normal: false, mean: (lo + up) / 2.0, scale: (up - lo) / 2.0 },
            Init::Kaiming { dist, fan, non_linearity } => {
                let deviation = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
                let is_normal = matches!(dist, NormalOrUniform::Normal);
                Self { is_normal, mean: 0.0, scale: if is_normal { deviation } else { deviation * 3f64.sqrt() } }
            }
        })
    }

    fn number(&self, random: &mut ChaCha8Rng) -> f64 {
        let mut uniform = || ((random.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let standard = match self.is_normal {
            // Box and Muller.
            true => (-2.0 * libm::log(uniform())).sqrt() * libm::cos(TAU * uniform()),
            false => 2.0 * uniform() - 1.0,
        };
        self.mean + self.scale * standard
    }
}

/// FNV-1a of a name.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
