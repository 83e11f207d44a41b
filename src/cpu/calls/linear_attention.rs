use super::super::linear::{
    self, LinearGradients, LinearInputs, LinearOutputs, LinearSaved, StateGradient, StateMut, StateView,
};
use super::element::{Conversion, Element, ensure_element, like, room, view};
use crate::Result;
use crate::linear::LinearOptions;
use crate::performer::PerformerOptions;
use crate::problem::{self, Decay, Linear, StateShapes, View, ensure_causal};
use crate::transnormer::NormOptions;

/// What [`linear()`], [`performer`] and [`norm`] return: the output, and what its gradients are made from.
#[derive(Debug, Clone)]
pub struct LinearAttention<'a, T: Element> {
    problem: Linear,
    inputs: LinearInputs<'a>,
    /// `[B, H, N, E]`, row-major.
    pub out: Vec<T>,
    /// The divisors: `[B, H, N]`, `[B, N]` for a norm over all heads, empty without one.
    pub statistic: Vec<T::Sum>,
}

/// Gradients of a loss, each row-major in the shape of its operand.
#[derive(Debug, Clone)]
pub struct LinearAttentionGradients<T: Element> {
    /// `[B, Hq, N, D]`
    pub q: Vec<T>,
    /// `[B, Hk, M, D]`
    pub k: Vec<T>,
    /// `[B, Hv, M, E]`
    pub v: Vec<T>,
    /// `[B, H, M]`, when there is a log-decay per token.
    pub log_decay: Option<Vec<T::Sum>>,
    /// Of the state handed in, where [`backward_with_state`](LinearAttention::backward_with_state) is asked.
    pub state: Option<LinearStateGradient<T::Sum>>,
}

/// The gradient of a [`LinearState`]. The stabiliser, the unit of S and z, is held fixed and has none.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearStateGradient<S> {
    /// By S: `[B, H, D', E]`, row-major.
    pub s: Vec<S>,
    /// By z: `[B, H, D']`.
    pub z: Vec<S>,
}

impl<S: Element> LinearStateGradient<S> {
    fn room_for(shapes: StateShapes) -> Self {
        Self { s: room(&shapes.s), z: room(&shapes.z) }
    }

    fn view(&self, function: &'static str, shapes: StateShapes) -> Result<StateGradient<'_>> {
        let Self { s, z } = self;
        Ok(StateGradient {
            s: view(function, "d_state.s", s, &shapes.s)?,
            z: view(function, "d_state.z", z, &shapes.z)?,
        })
    }
}

/// The sums that causal attention carries from one piece of a sequence to the next, with H the larger of key heads and
/// value heads, D' the width of the features, E that of the values. Its size does not depend on how many tokens have
/// been seen. The functions with state return one; handed to the same function with the next piece, it continues the
/// sequence. `S` is f64 for f64 operands, else f32.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearState<S> {
    /// Σ_t decay · φ(k_t) v_tᵀ: `[B, H, D', E]`, row-major.
    pub s: Vec<S>,
    /// Σ_t decay · φ(k_t): `[B, H, D']`.
    pub z: Vec<S>,
    /// Running stabiliser `[B, H]` of exponential FAVOR+ features.
    pub stabilizer: Option<Vec<S>>,
    /// Keys seen so far; of packed sequences by the longest.
    pub position: usize,
    /// The sizes of all three.
    pub shapes: StateShapes,
}

impl<S: Element> LinearState<S> {
    fn room_for(shapes: StateShapes, position: usize) -> Self {
        let stabilizer = shapes.stabilizer.map(|dims| room(&dims));
        Self { s: room(&shapes.s), z: room(&shapes.z), stabilizer, position, shapes }
    }

    fn view(&self, function: &'static str) -> Result<StateView<'_>> {
        let Self { s, z, stabilizer, position, shapes } = self;
        // One that the shapes do not know is for the engine to refuse.
        let dims = |c: &[S]| shapes.stabilizer.map_or(vec![c.len()], Vec::from);
        let stabilizer = stabilizer.as_deref().map(|c| view(function, "state.stabilizer", c, &dims(c))).transpose()?;
        Ok(StateView {
            s: view(function, "state.s", s, &shapes.s)?,
            z: view(function, "state.z", z, &shapes.z)?,
            stabilizer,
            position: *position,
        })
    }

    fn room(&mut self) -> StateMut<'_> {
        StateMut {
            s: S::slice_mut(&mut self.s),
            z: S::slice_mut(&mut self.z),
            stabilizer: self.stabilizer.as_mut().map(|stabilizer| S::slice_mut(stabilizer)),
        }
    }
}

/// The operands that only some calls have.
#[derive(Default)]
pub(super) struct Extras<'a> {
    pub key_mask: Option<View<'a>>,
    pub log_decay: Option<View<'a>>,
    pub omega: Option<View<'a>>,
}

pub(super) fn inputs<'a, T: Element>(
    problem: &Linear,
    [q, k, v]: [View<'a>; 3],
    extras: Extras<'a>,
    state: Option<&'a LinearState<T::Sum>>,
) -> Result<LinearInputs<'a>> {
    ensure_element::<T>(problem.function, problem.shapes.dtype)?;
    let Extras { key_mask, log_decay, omega } = extras;
    let state = state.map(|state| state.view(problem.function)).transpose()?;
    Ok(LinearInputs { q, k, v, key_mask, log_decay, omega, state })
}

/// Room for the state after the last key.
pub(super) fn next_state<S: Element>(problem: &Linear, inputs: &LinearInputs<'_>) -> LinearState<S> {
    let before = inputs.state.as_ref().map_or(0, |state| state.position);
    LinearState::room_for(problem.state_shapes(), before.saturating_add(problem.shapes.longest()))
}

/// The output, in the type of the operands or that of sums, the statistic and, on demand, the state after the last key.
pub(super) fn forward<T: Element, O: Element>(
    problem: &Linear,
    inputs: &LinearInputs<'_>,
    state: Option<&mut LinearState<T::Sum>>,
) -> Result<(Vec<O>, Vec<T::Sum>)> {
    let (mut out, mut statistic) = (room(&[problem.output_len()]), room::<T::Sum>(&[problem.statistic_len()]));
    let outputs = LinearOutputs {
        out: O::slice_mut(&mut out),
        statistic: (!statistic.is_empty()).then(|| T::Sum::slice_mut(&mut statistic)),
        state: state.map(LinearState::room),
    };
    linear::forward(problem, inputs, outputs)?;
    Ok((out, statistic))
}

/// The gradients of a call's results: of the output, and of the state, which, if asked for, makes that of the state handed in
/// wanted as well.
pub(super) struct Returned<'d, T: Element> {
    pub out: &'d [T],
    pub state: Option<Option<&'d LinearStateGradient<T::Sum>>>,
}

/// From the output and the statistic, and the gradients of the results: all gradients but that of v, which is left empty and
/// goes to `d_v`, in the type of v or that of sums.
pub(super) fn backward<T: Element, V: Element>(
    problem: &Linear,
    inputs: &LinearInputs<'_>,
    (out, statistic): (&[T], &[T::Sum]),
    returned: Returned<'_, T>,
    d_v: &mut [V],
) -> Result<LinearAttentionGradients<T>> {
    let (function, shapes) = (problem.function, &problem.shapes);
    let dims = [shapes.batch, shapes.heads(), shapes.queries, shapes.value_width];
    let per_head = problem.statistic_len() == dims[0] * dims[1] * dims[2];
    let rows = if per_head { &dims[..3] } else { &[dims[0], dims[2]] };
    let has_statistic = problem.statistic_len() > 0;
    let saved = LinearSaved {
        out: view(function, "out", out, &dims)?,
        statistic: has_statistic.then(|| view(function, "statistic", statistic, rows)).transpose()?,
        d_out: view(function, "d_out", returned.out, &dims)?,
        d_state: returned.state.flatten().map(|d| d.view(function, problem.state_shapes())).transpose()?,
    };
    let wanted = returned.state.filter(|_| inputs.state.is_some());
    let mut d_state = wanted.map(|_| LinearStateGradient::<T::Sum>::room_for(problem.state_shapes()));
    let log_decay = inputs.log_decay.as_ref().filter(|_| shapes.decay == Decay::Token);
    let (mut d_q, mut d_k, mut d_log_decay) = (like(&inputs.q), like(&inputs.k), log_decay.map(like));
    let room = LinearGradients {
        q: T::slice_mut(&mut d_q),
        k: T::slice_mut(&mut d_k),
        v: V::slice_mut(d_v),
        log_decay: d_log_decay.as_mut().map(|log_decay| T::Sum::slice_mut(log_decay)),
        state: d_state.as_mut().map(|LinearStateGradient { s, z }| problem::StateGradient {
            s: T::Sum::slice_mut(s),
            z: T::Sum::slice_mut(z),
        }),
    };
    linear::backward(problem, inputs, &saved, room)?;
    Ok(LinearAttentionGradients { q: d_q, k: d_k, v: Vec::new(), log_decay: d_log_decay, state: d_state })
}

impl<'a, T: Element> LinearAttention<'a, T> {
    fn new(problem: Linear, inputs: LinearInputs<'a>) -> Result<Self> {
        let (out, statistic) = forward::<T, T>(&problem, &inputs, None)?;
        Ok(Self { problem, inputs, out, statistic })
    }

    fn with_state(problem: Linear, inputs: LinearInputs<'a>) -> Result<(Self, LinearState<T::Sum>)> {
        let mut state = next_state(&problem, &inputs);
        let (out, statistic) = forward::<T, T>(&problem, &inputs, Some(&mut state))?;
        Ok((Self { problem, inputs, out, statistic }, state))
    }

    /// The gradients of a loss, from that of the output: `d_out` is `[B, H, N, E]`, row-major. States are taken as constant:
    /// over pieces of a sequence this is truncated backpropagation.
    ///
    /// # Errors
    /// A `d_out` of another length.
    pub fn backward(&self, d_out: &[T]) -> Result<LinearAttentionGradients<T>> {
        self.way_back(Returned { out: d_out, state: None })
    }

    /// The gradients of a loss that the state after the last key is part of, from those of the output and of that state
    /// (`None` is 0), with that of the state handed in. So pieces of a sequence, from the last to the first, give the
    /// gradients of the whole.
    ///
    /// # Errors
    /// Gradients of other lengths.
    ///
    /// # Example
    /// ```
    /// use attn_kernels::{LinearOptions, cpu, problem::View};
    ///
    /// let x: Vec<f64> = (0..30 * 8).map(|i| f64::from(i).sin()).collect();
    /// let options = LinearOptions { causal: true, ..Default::default() };
    /// let (first, second) = x.split_at(20 * 8);
    /// let (first, second) = (View::contiguous(first, &[1, 1, 20, 8])?, View::contiguous(second, &[1, 1, 10, 8])?);
    /// let (earlier, state) = cpu::linear_with_state::<f64>(first, first, first, &options, None)?;
    /// let (later, _) = cpu::linear_with_state::<f64>(second, second, second, &options, Some(&state))?;
    ///
    /// let of_later = later.backward_with_state(&later.out, None)?;
    /// let of_earlier = earlier.backward_with_state(&earlier.out, of_later.state.as_ref())?;
    ///
    /// let x = View::contiguous(&x[..], &[1, 1, 30, 8])?;
    /// let whole = cpu::linear::<f64>(x, x, x, &options)?;
    /// let of_whole = whole.backward(&whole.out)?;
    /// let in_pieces = [of_earlier.k, of_later.k].concat();
    /// assert!(in_pieces.iter().zip(&of_whole.k).all(|(x, y)| (x - y).abs() < 1e-12));
    /// # Ok::<(), attn_kernels::Error>(())
    /// ```
    pub fn backward_with_state(
        &self,
        d_out: &[T],
        d_state: Option<&LinearStateGradient<T::Sum>>,
    ) -> Result<LinearAttentionGradients<T>> {
        self.way_back(Returned { out: d_out, state: Some(d_state) })
    }

    fn way_back(&self, returned: Returned<'_, T>) -> Result<LinearAttentionGradients<T>> {
        let (saved, mut v) = ((&self.out[..], &self.statistic[..]), like(&self.inputs.v));
        let others = backward(&self.problem, &self.inputs, saved, returned, &mut v)?;
        Ok(LinearAttentionGradients { v, ..others })
    }
}

/// A call with its state.
pub type WithState<'a, T> = (LinearAttention<'a, T>, LinearState<<T as Element>::Sum>);

/// Linear attention by prefix sums of φ(K)ᵀV, in time and memory O(N):
///
/// ```text
/// S_t = e^{g_t} S_{t−1} + φ(k_t) v_tᵀ      z_t = e^{g_t} z_{t−1} + φ(k_t)
/// o_t = φ(q_t) S_t / (⟨φ(q_t), z_t⟩ + ε)   or without the divisor
/// ```
///
/// q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hv, M, E]` → `[B, H, N, E]` with H = max(Hq, Hv). φ, ε, decay and key mask
/// are in [`LinearOptions`], what holds for every operation at the [crate's root](crate#conventions).
///
/// # Errors
/// Shapes or dtypes that do not fit together, results asked for in another dtype than that of q, a negative ε, a log-decay
/// above 0 or without `causal`.
///
/// # Example
/// ```
/// use attn_kernels::{FeatureMap, LinearOptions, cpu, problem::View};
///
/// let x: Vec<f32> = (0..2 * 9 * 4).map(|i| (i as f32).sin()).collect();
/// let x = View::contiguous(&x[..], &[1, 2, 9, 4])?;
/// // RetNet: no feature map, no divisor, γ = 1 − 2⁻⁵ and 1 − 2⁻⁶.
/// let log_decay = [(1.0 - 1.0 / 32f32).ln(), (1.0 - 1.0 / 64f32).ln()];
/// let options = LinearOptions {
///     map: FeatureMap::Identity,
///     causal: true,
///     normalizer: None,
///     log_decay: Some(View::contiguous(&log_decay[..], &[2])?),
///     ..Default::default()
/// };
/// let attention = cpu::linear::<f32>(x, x, x, &options)?;
/// assert_eq!(attention.backward(&attention.out)?.k.len(), 2 * 9 * 4);
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn linear<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    options: &LinearOptions<View<'a>>,
) -> Result<LinearAttention<'a, T>> {
    let problem = options.problem("cpu::linear", &q, &k, &v)?;
    let inputs = inputs::<T>(&problem, [q, k, v], linear_extras(options), None)?;
    LinearAttention::new(problem, inputs)
}

/// Causal [`linear()`] over the next piece of a sequence: reads the state after the pieces before (`None` before the first)
/// and returns that after this piece. Cutting a sequence anywhere gives the output of the whole; a piece of one token is
/// a step of generation.
///
/// # Errors
/// As [`linear()`]; options that are not causal; a state of another shape.
///
/// # Example
/// ```
/// use attn_kernels::{LinearOptions, cpu, problem::View};
///
/// let x: Vec<f32> = (0..30 * 8).map(|i| (i as f32).sin()).collect();
/// let options = LinearOptions { causal: true, ..Default::default() };
/// let (prompt, token) = (View::contiguous(&x[..29 * 8], &[1, 1, 29, 8])?, View::contiguous(&x[29 * 8..], &[1, 1, 1, 8])?);
/// let (_, state) = cpu::linear_with_state::<f32>(prompt, prompt, prompt, &options, None)?;
/// let (last, state) = cpu::linear_with_state::<f32>(token, token, token, &options, Some(&state))?;
/// assert_eq!((last.out.len(), state.position), (8, 30));
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn linear_with_state<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    options: &LinearOptions<View<'a>>,
    state: Option<&'a LinearState<T::Sum>>,
) -> Result<WithState<'a, T>> {
    let problem = options.problem("cpu::linear_with_state", &q, &k, &v)?;
    ensure_causal(problem.function, options.causal)?;
    let inputs = inputs::<T>(&problem, [q, k, v], linear_extras(options), state)?;
    LinearAttention::with_state(problem, inputs)
}

fn linear_extras<'a>(options: &LinearOptions<View<'a>>) -> Extras<'a> {
    Extras { key_mask: options.key_mask, log_decay: options.log_decay, omega: None }
}

/// Linear attention on FAVOR+ random features, an estimate of softmax attention; ω is `[m, D]` in the type of sums, for
/// example of [`random_features`](crate::random_features()), the choices are in [`PerformerOptions`], shapes as in [`linear()`].
///
/// # Errors
/// As [`linear()`], and an ω of another shape or type.
///
/// # Example
/// ```
/// use attn_kernels::{FeatureKind, PerformerOptions, cpu, problem::View, random_features};
///
/// let x: Vec<f32> = (0..20 * 8).map(|i| 0.25 * (i as f32).sin()).collect();
/// let x = View::contiguous(&x[..], &[1, 1, 20, 8])?;
/// let omega: Vec<f32> = random_features(FeatureKind::Orthogonal, 64, 8, 0)?.into_iter().map(|x| x as f32).collect();
/// let omega = View::contiguous(&omega[..], &[64, 8])?;
/// let attention = cpu::performer::<f32>(x, x, x, omega, &PerformerOptions::default())?;
/// assert_eq!(attention.backward(&attention.out)?.q.len(), 20 * 8);
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn performer<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    omega: View<'a>,
    options: &PerformerOptions<View<'a>>,
) -> Result<LinearAttention<'a, T>> {
    let problem = options.problem("cpu::performer", &q, &k, &v, &omega)?;
    let extras = Extras { key_mask: options.key_mask, log_decay: None, omega: Some(omega) };
    let inputs = inputs::<T>(&problem, [q, k, v], extras, None)?;
    LinearAttention::new(problem, inputs)
}

/// Causal [`performer`] over the next piece of a sequence, as [`linear_with_state`].
///
/// # Errors
/// As [`performer`]; options that are not causal; a state of another shape.
pub fn performer_with_state<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    omega: View<'a>,
    options: &PerformerOptions<View<'a>>,
    state: Option<&'a LinearState<T::Sum>>,
) -> Result<WithState<'a, T>> {
    let problem = options.problem("cpu::performer_with_state", &q, &k, &v, &omega)?;
    ensure_causal(problem.function, options.causal)?;
    let extras = Extras { key_mask: options.key_mask, log_decay: None, omega: Some(omega) };
    let inputs = inputs::<T>(&problem, [q, k, v], extras, state)?;
    LinearAttention::with_state(problem, inputs)
}

/// NormAttention of TransNormer, an RMS norm in place of the denominator; choices in [`NormOptions`], shapes as in
/// [`linear()`].
///
/// # Errors
/// As [`linear()`]; ε must be above 0.
///
/// # Example
/// ```
/// use attn_kernels::{NormOptions, cpu, problem::View};
///
/// let x: Vec<f64> = (0..20 * 8).map(|i| f64::from(i).sin()).collect();
/// let x = View::contiguous(&x[..], &[1, 2, 10, 8])?;
/// let attention = cpu::norm::<f64>(x, x, x, &NormOptions { causal: true, ..Default::default() })?;
/// assert_eq!(attention.backward(&attention.out)?.q.len(), 20 * 8);
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn norm<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    options: &NormOptions<View<'a>>,
) -> Result<LinearAttention<'a, T>> {
    let problem = options.problem("cpu::norm", &q, &k, &v)?;
    let inputs = inputs::<T>(&problem, [q, k, v], norm_extras(options), None)?;
    LinearAttention::new(problem, inputs)
}

/// Causal [`norm`] over the next piece of a sequence, as [`linear_with_state`].
///
/// # Errors
/// As [`norm`]; options that are not causal; a state of another shape.
pub fn norm_with_state<'a, T: Element>(
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    options: &NormOptions<View<'a>>,
    state: Option<&'a LinearState<T::Sum>>,
) -> Result<WithState<'a, T>> {
    let problem = options.problem("cpu::norm_with_state", &q, &k, &v)?;
    ensure_causal(problem.function, options.causal)?;
    let inputs = inputs::<T>(&problem, [q, k, v], norm_extras(options), state)?;
    LinearAttention::with_state(problem, inputs)
}

fn norm_extras<'a>(options: &NormOptions<View<'a>>) -> Extras<'a> {
    Extras { key_mask: options.key_mask, log_decay: options.log_decay, omega: None }
}
