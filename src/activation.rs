use serde::{Deserialize, Serialize};

/// The non-linearity a of a layer, and the gate of a gated one: an operation with a gradient, see
/// [`Activation::gate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x·sigmoid(x)
    #[default]
    Silu,
    /// x·Φ(x) with Φ the normal distribution, by the error function (as in BERT).
    Gelu,
    /// The same by tanh (as in GPT-2): x·(1 + tanh(√(2/π)(x + 0.044715x³)))/2.
    GeluTanh,
    /// max(x, 0)
    Relu,
    /// 1/(1 + e⁻ˣ): gates of recurrent layers.
    Sigmoid,
    /// ln(1 + eˣ): steps and decays of recurrent layers.
    Softplus,
}
