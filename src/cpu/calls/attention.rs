use super::super::quadratic::{self, QuadraticGradients, QuadraticInputs, QuadraticSaved};
use super::element::{Conversion, Element, ensure_element, like, room, view};
use crate::Result;
use crate::gau::GauOptions;
use crate::problem::{Operand, Quadratic, View, Weight, ensure_value};
use crate::softmax::SoftmaxOptions;
use crate::transnormer::DiagOptions;

/// What [`softmax`], [`diag`] and [`gau`] return: the output, and what its gradients are made from.
#[derive(Debug, Clone)]
pub struct Attention<'a, T: Element> {
    problem: Quadratic,
    inputs: QuadraticInputs<'a>,
    /// `[B, H, N, E]`, row-major.
    pub out: Vec<T>,
    /// `[B, H, N]`: the log-sum-exp of a row's scores (−∞ where a query sees no key) for softmax, the divisor of the row
    /// for a norm.
    pub statistic: Vec<T::Sum>,
}

/// Gradients of a loss, each row-major in the shape of its operand.
#[derive(Debug, Clone)]
pub struct AttentionGradients<T: Element> {
    /// `[B, H, N, D]`
    pub q: Vec<T>,
    /// `[B, Hk, M, D]`
    pub k: Vec<T>,
    /// `[B, Hk, M, E]`
    pub v: Vec<T>,
    /// `[1 or H, 2R + 1]`, when there is a bias.
    pub bias: Option<Vec<T>>,
    /// `[B, H, N, M]`, each of them or 1, when an attention bias is added.
    pub attention_bias: Option<Vec<T::Sum>>,
    /// `[H]`, when there are sinks.
    pub sinks: Option<Vec<T::Sum>>,
}

impl<'a, T: Element> Attention<'a, T> {
    fn new(problem: Quadratic, inputs: QuadraticInputs<'a>) -> Result<Self> {
        ensure_element::<T>(problem.function, problem.shapes.dtype)?;
        let (out, statistic) = forward::<T, T>(&problem, &inputs)?;
        Ok(Self { problem, inputs, out, statistic })
    }

    /// The gradients of a loss, from that of the output: `d_out` is `[B, H, N, E]`, row-major.
    ///
    /// # Errors
    /// A `d_out` of another length.
    pub fn backward(&self, d_out: &[T]) -> Result<AttentionGradients<T>> {
        self.gradients(d_out, None)
    }

    /// As [`Attention::backward`], for a loss that uses the log-sum-exp of [`softmax`] as well: `d_statistic` is its
    /// gradient, `[B, H, N]`.
    ///
    /// # Errors
    /// Gradients of another length; another operation than [`softmax`] and [`diag`] with softmax.
    pub fn backward_with_statistic(&self, d_out: &[T], d_statistic: &[T::Sum]) -> Result<AttentionGradients<T>> {
        let is_softmax = self.problem.weight == Weight::Softmax;
        ensure_value(is_softmax, self.problem.function, "d_statistic", "given", "softmax, for which it is defined")?;
        self.gradients(d_out, Some(d_statistic))
    }

    fn gradients(&self, d_out: &[T], d_statistic: Option<&[T::Sum]>) -> Result<AttentionGradients<T>> {
        let (saved, mut v) = ((&self.out[..], &self.statistic[..]), like(&self.inputs.v));
        let ([q, k, bias], [attention_bias, sinks]) =
            backward(&self.problem, &self.inputs, saved, (d_out, d_statistic), &mut v)?;
        let bias = self.inputs.bias.map(|_| bias);
        Ok(AttentionGradients { q, k, v, bias, attention_bias, sinks })
    }
}

/// The output, in the type of the operands or that of sums, and the statistic.
pub(super) fn forward<T: Element, O: Element>(
    problem: &Quadratic,
    inputs: &QuadraticInputs<'_>,
) -> Result<(Vec<O>, Vec<T::Sum>)> {
    let (mut out, mut statistic) = (room(&[problem.output_len()]), room(&[problem.statistic_len()]));
    quadratic::forward(problem, inputs, O::slice_mut(&mut out), Some(T::Sum::slice_mut(&mut statistic)))?;
    Ok((out, statistic))
}

/// Gradients of q, k and the bias, which is empty where there is none; and of the attention bias and the sinks.
pub(super) type Gradients<T> = ([Vec<T>; 3], [Option<Vec<<T as Element>::Sum>>; 2]);

/// From the output and the statistic, and the gradients of both, those of the operands. That of v goes to `d_v`, in the type
/// of v or that of sums.
pub(super) fn backward<T: Element, V: Element>(
    problem: &Quadratic,
    inputs: &QuadraticInputs<'_>,
    (out, statistic): (&[T], &[T::Sum]),
    (d_out, d_statistic): (&[T], Option<&[T::Sum]>),
    d_v: &mut [V],
) -> Result<Gradients<T>> {
    let (function, shapes) = (problem.function, &problem.shapes);
    let rows = [shapes.batch, shapes.heads, shapes.queries];
    let dims = [rows[0], rows[1], rows[2], shapes.value_width];
    let saved = QuadraticSaved {
        out: view(function, "out", out, &dims)?,
        statistic: view(function, "statistic", statistic, &rows)?,
        d_out: view(function, "d_out", d_out, &dims)?,
        d_statistic: d_statistic.map(|elements| view(function, "d_statistic", elements, &rows)).transpose()?,
    };
    let QuadraticInputs { q, k, bias, attention_bias, sinks, .. } = inputs;
    let (mut d_q, mut d_k, mut d_bias) = (like(q), like(k), bias.as_ref().map_or(Vec::new(), like));
    let added = attention_bias.filter(|term| term.dtype().is_float());
    let mut sums = [added, *sinks].map(|x| x.as_ref().map(like::<T::Sum>));
    let [attention_bias, sinks] = sums.each_mut().map(|x| x.as_mut().map(|x| T::Sum::slice_mut(x)));
    let room = QuadraticGradients {
        q: T::slice_mut(&mut d_q),
        k: T::slice_mut(&mut d_k),
        v: V::slice_mut(d_v),
        bias: bias.map(|_| T::slice_mut(&mut d_bias)),
        attention_bias,
        sinks,
    };
    quadratic::backward(problem, inputs, &saved, room)?;
    Ok(([d_q, d_k, d_bias], sums))
}

/// Softmax attention, never N×M in memory:
///
/// ```text
/// s_ij = cap(τ ⟨q_i, k_j⟩) + bias[j − p] + b_ij,   cap(x) = c·tanh(x/c)
/// o_i  = Σ_j softmax_j(s_ij) v_j                   over the keys j that query i sees, and a sink if there is one
/// ```
///
/// q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, E]` → `[B, H, N, E]`, and the log-sum-exp of each row. The choices
/// are in [`SoftmaxOptions`], what holds for every operation at the [crate's root](crate#conventions).
///
/// # Errors
/// Shapes or dtypes that do not fit together, results asked for in another dtype than that of q, a scale or soft-cap out
/// of range, a bias that does not reach every visible distance.
///
/// # Example
/// ```
/// use attn_kernels::cpu;
/// use attn_kernels::problem::View;
/// use attn_kernels::{Mask, SoftmaxOptions};
///
/// // One batch entry, 4 query heads that share 2 key heads, 5 tokens, width 8.
/// let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
/// let (q, k, v) = (wave(160, 0.3), wave(80, 0.7), wave(80, 1.1));
/// let [q, k, v] = [
///     View::contiguous(&q[..], &[1, 4, 5, 8])?,
///     View::contiguous(&k[..], &[1, 2, 5, 8])?,
///     View::contiguous(&v[..], &[1, 2, 5, 8])?,
/// ];
/// let options = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
/// let attention = cpu::softmax::<f32>(q, k, v, &options)?;
/// assert_eq!(attention.out.len(), 4 * 5 * 8);
///
/// // Loss: half the sum of squares of the output, whose gradient is the output.
/// let gradients = attention.backward(&attention.out)?;
/// assert_eq!((gradients.q.len(), gradients.k.len(), gradients.v.len()), (160, 80, 80));
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn softmax<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    options: &SoftmaxOptions<View<'a>>,
) -> Result<Attention<'a, T>> {
    let problem = options.problem("cpu::softmax", &q, &k, &v)?;
    let SoftmaxOptions { key_mask, bias, attention_bias, sinks, .. } = *options;
    Attention::new(problem, QuadraticInputs { q, k, v, key_mask, bias, attention_bias, sinks })
}

/// Attention inside blocks (DiagAttention of TransNormer), with softmax or ReLU and an RMS norm; shapes as in
/// [`softmax`], choices in [`DiagOptions`].
///
/// # Errors
/// As [`softmax`], and a block size of 0 or an ε out of range.
///
/// # Example
/// ```
/// use attn_kernels::{DiagOptions, cpu, problem::View};
///
/// let x: Vec<f64> = (0..60).map(|i| f64::from(i).cos()).collect();
/// let x = View::contiguous(&x[..], &[1, 1, 15, 4])?;
/// let attention = cpu::diag::<f64>(x, x, x, &DiagOptions { block_size: 5, ..Default::default() })?;
/// assert_eq!(attention.backward(&vec![1.0; 60])?.q.len(), 60);
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn diag<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    options: &DiagOptions<View<'a>>,
) -> Result<Attention<'a, T>> {
    let problem = options.problem("cpu::diag", &q, &k, &v)?;
    Attention::new(problem, QuadraticInputs { key_mask: options.key_mask, ..QuadraticInputs::new(q, k, v) })
}

/// Squared-ReLU attention of the gated attention unit, `o_i = Σ_j a_ij v_j` with the weights a of
/// [`GauNorm`](crate::GauNorm); shapes as in [`softmax`], choices in [`GauOptions`]. Projections and gate are the
/// caller's.
///
/// # Errors
/// As [`softmax`], and a norm out of range.
///
/// # Example
/// ```
/// use attn_kernels::{GauOptions, cpu, problem::View};
///
/// let x: Vec<f32> = (0..60).map(|i| (i as f32).cos()).collect();
/// let x = View::contiguous(&x[..], &[1, 1, 15, 4])?;
/// let attention = cpu::gau::<f32>(x, x, x, &GauOptions::default())?;
/// assert_eq!(attention.backward(&attention.out)?.v.len(), 60);
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn gau<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    options: &GauOptions<View<'a>>,
) -> Result<Attention<'a, T>> {
    let problem = options.problem("cpu::gau", &q, &k, &v)?;
    let GauOptions { key_mask, bias, .. } = *options;
    Attention::new(problem, QuadraticInputs { key_mask, bias, ..QuadraticInputs::new(q, k, v) })
}
