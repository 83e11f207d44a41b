//! Layers, decoding and language models on candle tensors.
//!
//! | | |
//! | --- | --- |
//! | [`Attention`] | one layer for every mechanism, by [`AttentionConfig`] |
//! | [`Cache`] | what a layer keeps of the tokens it has seen, for decoding |
//! | [`LanguageModel`] | embedding, blocks, norm and head, by [`LanguageModelConfig`] |
//! | [`generate`] | tokens one by one, by a [`Sampler`] |
//! | [`RunningBatch`] | sequences of any lengths that are continued side by side, joining and leaving |
//! | [`FeedForward`], [`Norm`], [`Rotary`] | the other parts of a block |
//! | [`Activation`], [`cross_entropy`] | activations, gates and the loss in one pass each |
//!
//! Layers take their weights from candle-nn's `VarBuilder`: from a `VarMap` to be trained, or from a checkpoint. All of
//! them give gradients to every weight and to the input. They compute in the dtype of the weights, f32, f64, f16 or
//! bf16, with the sums, norms and angles in f32 (f64), on the device of the weights.
//!
//! # Checkpoints
//!
//! Layers of different mechanisms have weights of the same names and shapes. So that one is not loaded into another, a
//! layer has a tensor `mechanism.<kind>` of one number among its weights, and refuses weights that have it for another
//! kind or for none. Weights that do not come from this crate have none: pass them through [`foreign_weights`]. Known
//! weights beside those that a configuration reads are refused too: without them the model would be another.

mod activation;
mod attention;
mod batch;
mod block;
mod body;
mod cache;
mod check;
mod config;
mod cross_entropy;
mod decoding;
mod defaults;
mod encoder;
mod feed_forward;
mod first_values;
mod fresh;
mod gated;
mod generate;
mod heads;
mod mark;
mod mechanism;
mod model;
mod model_config;
mod norm;
mod omega;
mod pieces;
mod projection;
mod recurrent;
mod running;
mod sampler;
mod seeded;
mod siblings;
#[cfg(test)]
mod tests;

pub mod models;

pub use crate::activation::Activation;
pub use crate::candle::rotary::Rotary;
pub use crate::candle::rotary_config::{RotaryConfig, RotaryScaling};
pub use attention::Attention;
pub use block::{Block, NormPlacement};
pub use cache::{Cache, ModelCache};
pub use config::{AttentionConfig, QueryKeyNorm};
pub use cross_entropy::cross_entropy;
pub use encoder::{Encoder, EncoderConfig};
pub use feed_forward::{FeedForward, FeedForwardConfig};
pub use generate::{Generation, generate};
pub use mark::foreign_weights;
pub use mechanism::Mechanism;
pub use model::LanguageModel;
pub use model_config::LanguageModelConfig;
pub use norm::{Norm, NormConfig, NormKind};
pub use recurrent::Slopes;
pub use running::{Request, RunningBatch};
pub use sampler::{Sampler, SamplerConfig};
pub use seeded::seeded_weights;
