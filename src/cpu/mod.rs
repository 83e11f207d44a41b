//! The CPU backend: the engines on slices, forward and backward, over the threads of the current rayon pool.
//!
//! For every operation there is a call that takes views of slices and the options of the operation, and returns what it has
//! allocated: the output, and from it the gradients. A whole call, q, k and v lying as `[batch, tokens, heads, width]`:
//!
//! ```
//! use attn_kernels::problem::View;
//! use attn_kernels::{Mask, SoftmaxOptions, cpu};
//!
//! const BATCH: usize = 2;
//! const TOKENS: usize = 10;
//! const HEADS: usize = 4;
//! const WIDTH: usize = 8;
//!
//! /// Heads before tokens, in place: sizes and strides in elements, the last one 1.
//! fn heads_of(x: &[f32]) -> attn_kernels::Result<View<'_>> {
//!     View::new(x, &[BATCH, HEADS, TOKENS, WIDTH], &[TOKENS * HEADS * WIDTH, WIDTH, HEADS * WIDTH, 1])
//! }
//!
//! let wave = |step: f32| (0..BATCH * TOKENS * HEADS * WIDTH).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
//! let (q, k, v) = (wave(0.3), wave(0.7), wave(1.1));
//! let options = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
//! let attention = cpu::softmax::<f32>(heads_of(&q)?, heads_of(&k)?, heads_of(&v)?, &options)?;
//! let out: &[f32] = &attention.out; // [batch, heads, tokens, width], contiguous
//!
//! // A loss of half the sum of squares; its gradient by the output is the output.
//! let gradients = attention.backward(out)?;
//! let loss = |v: &[f32]| -> attn_kernels::Result<f64> {
//!     let out = cpu::softmax::<f32>(heads_of(&q)?, heads_of(&k)?, heads_of(v)?, &options)?.out;
//!     Ok(out.iter().map(|&x| f64::from(x).powi(2) / 2.0).sum())
//! };
//! // The derivative by the first value: entry 0 of both layouts.
//! let moved = |by: f32| [&[v[0] + by], &v[1..]].concat();
//! let difference = (loss(&moved(1e-2))? - loss(&moved(-1e-2))?) / 2e-2;
//! assert!((f64::from(gradients.v[0]) - difference).abs() < 1e-3);
//! # Ok::<(), attn_kernels::Error>(())
//! ```
//!
//! | call | result | operation |
//! | --- | --- | --- |
//! | [`softmax`], [`diag`], [`gau`] | [`Attention`] | of the quadratic engine |
//! | [`linear()`], [`performer`], [`norm`] | [`LinearAttention`] | of the linear engine |
//! | [`linear_with_state`], [`performer_with_state`], [`norm_with_state`] | and a [`LinearState`] | causal, a piece of a sequence |
//! | [`gated_linear`], [`delta()`], [`generalized_delta`] | [`DeltaAttention`], its state with it | of the delta engine |
//! | [`mixed_chunk`], [`mixed_chunk_with_state`] | [`MixedChunk`] | of both |
//!
//! Beneath them are the engines, [`quadratic`], [`mod@linear`] and [`mod@delta`], which write to memory of the caller: a problem of the
//! options' `problem`, operands as [`View`](crate::problem::View)s, outputs as contiguous slices.
//!
//! Results are the same on every run with the same number of threads and the same [`Isa`].
//!
//! # From ndarray and burn
//!
//! A view needs a slice, sizes and strides. An `ndarray::Array4<f32>`, [batch, heads, tokens, width] after any permutation of
//! axes that leaves the last one in place, is read where it lies, and results become one:
//!
//! ```text
//! fn view(x: &Array4<f32>) -> attn_kernels::Result<View<'_>> {
//!     let strides: Vec<usize> = x.strides().iter().map(|&stride| stride as usize).collect();
//!     let elements = x.as_slice_memory_order().expect("an array without gaps and with positive strides");
//!     View::new(elements, x.shape(), &strides)
//! }
//! let attention = cpu::softmax::<f32>(view(&q)?, view(&k)?, view(&v)?, &options)?;
//! let gradients = attention.backward(d_out.as_standard_layout().as_slice().expect("standard layout"))?;
//! let out = Array4::from_shape_vec((batch, heads, tokens, width), attention.out)?;
//! ```
//!
//! burn's tensors hand out their elements as `TensorData`. Inside a custom operation of its autodiff backend the forward step
//! keeps q, k and v, and the backward step calls again (one more forward pass in exchange for no copy of the results):
//!
//! ```text
//! let data = q.into_data();                                   // contiguous, row-major
//! let q = View::contiguous(data.as_slice::<f32>()?, &data.shape)?;
//! let attention = cpu::softmax::<f32>(q, k, v, &options)?;
//! let out = Tensor::<B, 4>::from_data(TensorData::new(attention.out, [batch, heads, tokens, width]), &device);
//! ```

mod buffer;
mod calls;
#[cfg(feature = "candle")]
pub(crate) mod convolution;
pub mod delta;
#[cfg(feature = "candle")]
pub(crate) mod elementwise;
mod finish;
pub mod linear;
pub(crate) mod parallel;
#[cfg(feature = "candle")]
pub(crate) mod products;
pub mod quadratic;
mod rooms;
mod rows;
#[cfg(feature = "candle")]
pub(crate) mod scan;
mod simd;
mod tile;

pub use buffer::release_scratch;
pub use calls::{
    Attention, AttentionGradients, DeltaAttention, DeltaAttentionGradients, Element, LinearAttention,
    LinearAttentionGradients, LinearState, LinearStateGradient, MixedChunk, MixedChunkGradients, WithState, delta,
    diag, gated_linear, gau, generalized_delta, linear, linear_with_state, mixed_chunk, mixed_chunk_with_state, norm,
    norm_with_state, performer, performer_with_state, softmax,
};
pub use simd::Isa;

/// Binds the type of sums for inputs of a dtype.
macro_rules! dispatch {
    ($dtype:expr, $t:ident => $body:block) => {
        match $dtype.accumulator() {
            $crate::problem::DType::F64 => {
                type $t = f64;
                $body
            }
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}
use dispatch;
