//! The mark of a layer's mechanism among its weights.

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::mechanism::Mechanism;

/// Names of tensors that no other library writes, at the end of a path.
const OURS: [&str; 3] = ["mechanism.", "features.omega", "features.seed"];

/// Checks that the weights are those of a layer of this mechanism; fresh ones are marked as such.
///
/// The kind is in the name of the mark, not in its value, so that `VarMap::load` refuses a wrong checkpoint as well.
pub(super) fn check_mark(mechanism: &Mechanism, weights: &VarBuilder) -> Result<()> {
    let marks = weights.pp("mechanism");
    let (own, path) = (mechanism.name(), marks.prefix());
    if !marks.contains_tensor(own)
        && let Some(other) = Mechanism::NAMES.iter().find(|name| marks.contains_tensor(name))
    {
        return Err(Error::msg(format!(
            "tensor `{path}.{other}` says that the weights are those of a layer of kind {other}, the configuration is of \
             kind {own}"
        )));
    }
    let mark = marks.get_with_hints_dtype(1, own, Init::Const(1.0), DType::F32);
    mark.map(|_| ()).map_err(|error| {
        Error::msg(format!(
            "no tensor `{path}.{own}` says that the weights are those of a layer of kind {own}; if they are, but from \
             elsewhere, pass them through `foreign_weights` ({error})"
        ))
    })
}

/// Weights that do not come from this crate, as layers take them.
///
/// They carry no mark of the mechanism (see the [module](super)); with this call you say that they are those of the
/// layer that you build. Random features of a Performer layer, which such weights do not have either, are drawn from
/// the seed of its configuration. Everything else passes through.
///
/// Layers read the weights of their configuration, and refuse known ones beside them that they would leave out: biases
/// of projections without (see [`AttentionConfig::unbiased`](super::AttentionConfig::unbiased)), norms of queries and
/// keys, a gate, a bias of an RMS norm, more blocks. A tensor of a name that no layer here knows is not noticed.
///
/// # Example
/// ```
/// use std::collections::HashMap;
///
/// use attn_kernels::nn::{Attention, AttentionConfig, Mechanism, foreign_weights};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
///
/// let weight = Tensor::zeros((8, 8), DType::F32, &Device::Cpu)?;
/// let names = ["q_proj", "k_proj", "v_proj", "o_proj"];
/// let tensors: HashMap<_, _> = names.map(|name| (format!("{name}.weight"), weight.clone())).into();
/// let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
/// let config = AttentionConfig::new(8, 2, Mechanism::default());
/// assert!(Attention::new(&config, weights.clone()).is_err());
/// assert!(Attention::new(&config, foreign_weights(weights)).is_ok());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn foreign_weights<'a>(weights: VarBuilder<'a>) -> VarBuilder<'a> {
    let (dtype, device) = (weights.dtype(), weights.device().clone());
    VarBuilder::from_backend(Box::new(Foreign(weights)), dtype, device)
}

struct Foreign<'a>(VarBuilder<'a>);

impl SimpleBackend for Foreign<'_> {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.0.contains_tensor(name) && OURS.iter().any(|ours| name.contains(ours)) {
            return Ok(init.var(shape, dtype, device)?.as_detached_tensor());
        }
        self.0.get_with_hints_dtype(shape, name, init, dtype)?.to_device(device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.get_unchecked_dtype(name, dtype)?.to_device(device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_tensor(name)
    }
}
