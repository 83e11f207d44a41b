use super::super::linear::LinearInputs;
use super::super::quadratic::QuadraticInputs;
use super::attention;
use super::element::{Conversion, Element, ensure_element, like};
use super::linear_attention::{self, Extras, LinearState, LinearStateGradient, Returned};
use crate::Result;
use crate::gau::MixedChunkOptions;
use crate::problem::{Linear, Quadratic, View, ensure_causal, ensure_same_rows, ensure_unpacked, ensure_whole_chunks};

/// What [`mixed_chunk`] returns: the output, and what its gradients are made from.
#[derive(Debug, Clone)]
pub struct MixedChunk<'a, T: Element> {
    local: (Quadratic, QuadraticInputs<'a>),
    global: (Linear, LinearInputs<'a>),
    /// `[B, H, N, E]`, row-major.
    pub out: Vec<T>,
}

/// Gradients of a loss, each row-major in the shape of its operand.
#[derive(Debug, Clone)]
pub struct MixedChunkGradients<T: Element> {
    /// `[B, H, N, D]`
    pub q_quad: Vec<T>,
    /// `[B, Hk, M, D]`
    pub k_quad: Vec<T>,
    /// `[B, H, N, D]`
    pub q_lin: Vec<T>,
    /// `[B, Hk, M, D]`
    pub k_lin: Vec<T>,
    /// `[B, Hk, M, E]`, of both branches.
    pub v: Vec<T>,
    /// `[1 or H, 2R + 1]`, when there is a bias.
    pub bias: Option<Vec<T>>,
    /// Of the state handed in, where [`backward_with_state`](MixedChunk::backward_with_state) is asked.
    pub state: Option<LinearStateGradient<T::Sum>>,
}

impl<'a, T: Element> MixedChunk<'a, T> {
    /// The gradients of a loss, from that of the output: `d_out` is `[B, H, N, E]`, row-major. States are taken as constant.
    ///
    /// # Errors
    /// A `d_out` of another length.
    pub fn backward(&self, d_out: &[T]) -> Result<MixedChunkGradients<T>> {
        self.way_back(Returned { out: d_out, state: None })
    }

    /// The gradients of a loss that the state after the last key is part of, as
    /// [`LinearAttention::backward_with_state`](super::LinearAttention::backward_with_state).
    ///
    /// # Errors
    /// Gradients of other lengths.
    pub fn backward_with_state(
        &self,
        d_out: &[T],
        d_state: Option<&LinearStateGradient<T::Sum>>,
    ) -> Result<MixedChunkGradients<T>> {
        self.way_back(Returned { out: d_out, state: Some(d_state) })
    }

    fn way_back(&self, returned: Returned<'_, T>) -> Result<MixedChunkGradients<T>> {
        let d_out = returned.out;
        let Self { local: (local, quad), global: (global, lin), out } = self;
        // Neither branch has a norm, so that its gradients read neither output nor statistic.
        let statistic = vec![T::Sum::default(); local.statistic_len()];
        let (mut v, mut far) = (like::<T::Sum>(&quad.v), like::<T::Sum>(&lin.v));
        let (near, _) = attention::backward(local, quad, (&out[..], &statistic[..]), (d_out, None), &mut v)?;
        let others = linear_attention::backward(global, lin, (&out[..], &[]), returned, &mut far)?;
        v.iter_mut().zip(far).for_each(|(near, far)| *near = near.plus(far));
        let (v, [q_quad, k_quad, bias]) = (T::rounded(T::Sum::slice(&v)), near);
        let bias = quad.bias.map(|_| bias);
        Ok(MixedChunkGradients { q_quad, k_quad, q_lin: others.q, k_lin: others.k, v, bias, state: others.state })
    }
}

/// Mixed chunk attention of FLASH: squared ReLU inside chunks of C positions, linear attention across them, in time and
/// memory O(N·C):
///
/// ```text
/// local_i  = Σ_j relu²(c ⟨q_i, k_j⟩ + bias[j − i]) v_j           j in the chunk of i, and j ≤ i when causal
/// global_i = norm_g · q'_i Σ_{chunks h < g} K'_hᵀ V_h             causal, i in chunk g
/// global_i = norm   · q'_i Σ_{all chunks}  K'_hᵀ V_h              not causal
/// o_i      = local_i + global_i
/// ```
///
/// q = `quad[0]` and q' = `lin[0]` `[B, H, N, D]`, k = `quad[1]` and k' = `lin[1]` `[B, Hk, M, D]`, v `[B, Hk, M, E]` →
/// `[B, H, N, E]`; D may differ between the branches, causal needs M = N. The branches are added before the rounding to
/// the dtype. The choices are in [`MixedChunkOptions`].
///
/// # Errors
/// Shapes or dtypes that do not fit together, results asked for in another dtype than that of q, a chunk size of 0, a bias
/// that does not reach C − 1.
///
/// # Example
/// ```
/// use attn_kernels::{MixedChunkOptions, cpu, problem::View};
///
/// let x: Vec<f32> = (0..50 * 8).map(|i| (i as f32).sin()).collect();
/// let x = View::contiguous(&x[..], &[1, 1, 50, 8])?;
/// let options = MixedChunkOptions { chunk_size: 16, causal: true, ..Default::default() };
/// let attention = cpu::mixed_chunk::<f32>([x, x], [x, x], x, &options)?;
/// assert_eq!(attention.backward(&attention.out)?.v.len(), 50 * 8);
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn mixed_chunk<'a, T: Element>(
    quad: [View<'a>; 2],
    lin: [View<'a>; 2],
    v: View<'a>,
    options: &MixedChunkOptions<View<'a>>,
) -> Result<MixedChunk<'a, T>> {
    let names = ["cpu::mixed_chunk (local branch)", "cpu::mixed_chunk (global branch)"];
    Ok(call::<T>(names, [quad, lin], v, options, None)?.0)
}

/// Causal [`mixed_chunk`] over the next piece of a sequence, as [`linear_with_state`](super::linear_with_state), with the
/// difference that a piece must begin where a chunk does. With [`GlobalNorm::Length`](crate::GlobalNorm::Length) the length
/// is that of the piece, and the pieces do not give the output of the whole.
///
/// # Errors
/// As [`mixed_chunk`]; options that are not causal; a state of another shape, or one that ends inside a chunk.
pub fn mixed_chunk_with_state<'a, T: Element>(
    quad: [View<'a>; 2],
    lin: [View<'a>; 2],
    v: View<'a>,
    options: &MixedChunkOptions<View<'a>>,
    state: Option<&'a LinearState<T::Sum>>,
) -> Result<(MixedChunk<'a, T>, LinearState<T::Sum>)> {
    let function = "cpu::mixed_chunk_with_state";
    ensure_causal(function, options.causal)?;
    ensure_unpacked(function, options.sequences.as_ref())?;
    ensure_whole_chunks(function, state.map_or(0, |state| state.position), options.chunk_size)?;
    let names = ["cpu::mixed_chunk_with_state (local branch)", "cpu::mixed_chunk_with_state (global branch)"];
    call(names, [quad, lin], v, options, state)
}

fn call<'a, T: Element>(
    names: [&'static str; 2],
    [quad, lin]: [[View<'a>; 2]; 2],
    v: View<'a>,
    options: &MixedChunkOptions<View<'a>>,
    state: Option<&'a LinearState<T::Sum>>,
) -> Result<(MixedChunk<'a, T>, LinearState<T::Sum>)> {
    let local = options.local_problem(names[0], &quad[0], &quad[1], &v)?;
    let global = options.global_problem(names[1], &lin[0], &lin[1], &v)?;
    ensure_same_rows(&local, &global)?;
    ensure_element::<T>(local.function, local.shapes.dtype)?;
    let key_mask = options.key_mask;
    let quad = QuadraticInputs { key_mask, bias: options.bias, ..QuadraticInputs::new(quad[0], quad[1], v) };
    let extras = Extras { key_mask, ..Default::default() };
    let lin = linear_attention::inputs::<T>(&global, [lin[0], lin[1], v], extras, state)?;
    let mut state = linear_attention::next_state(&global, &lin);
    let (sums, _) = linear_attention::forward::<T, T::Sum>(&global, &lin, Some(&mut state))?;
    let (mut out, _) = attention::forward::<T, T::Sum>(&local, &quad)?;
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = out.plus(sum));
    let out = T::rounded(T::Sum::slice(&out));
    Ok((MixedChunk { local: (local, quad), global: (global, lin), out }, state))
}
