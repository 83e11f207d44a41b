//! Linear attention with rotary position embedding behind the feature map.
//!
//! The numerator is a pass of the linear engine over the rotated features, the divisor one over the features as they
//! are with values of 1, so that every backend has both.

use candle_core::{Result, Tensor};

use super::LinearState;
use super::engine::{LinearCall, LinearTensors, accumulator, rows};
use super::favor::{FavorFeatures, by_state_heads, without_removed};
use super::features::features;
use super::rotary::Rotary;
use super::state::ensure_causal;
use super::{linear_attention, linear_attention_with_state, norm_attention, norm_attention_with_state};
use crate::linear::{FeatureMap, LinearOptions};
use crate::performer::PerformerOptions;
use crate::problem::{Linear, LinearFinish, LinearShapes, Map, Part, Sequences, ensure_value};
use crate::transnormer::NormOptions;

/// [`linear_attention`] with rotary position embedding (Su et al. 2021, RoFormer, equation 19): with R_p the rotation
/// of position p,
///
/// ```text
/// o_i = Σ_j ⟨R_i φ(q_i), R_j φ(k_j)⟩ γ_ij v_j / (Σ_j ⟨φ(q_i), φ(k_j)⟩ γ_ij + ε)     or without the divisor
/// ```
///
/// over the keys j that query i sees, γ_ij the decay between them. A product depends on i − j alone, whatever φ is; if
/// queries and keys were rotated before φ, it would not. The divisor is of the features as they are: rotated ones are
/// not positive any more, and it could vanish.
///
/// φ must keep the width, but for `Taylor` and `Cosine`: these depend on ⟨q, k⟩ and the lengths of both alone, so
/// queries and keys are rotated before φ, for the divisor too, whose terms stay as positive as they are. `rotary` is
/// for rows of the width of q.
///
/// Shapes, options, gradients and what else holds are those of [`linear_attention`]. Key j stands at position j, query
/// i at i + M − N. Features, sums and the quotient are in f32 (f64), for f16 and bf16 as well. Time: the features, and
/// two passes of the engine, the second for values of width 1.
///
/// # Errors
/// Those of [`linear_attention`]; a rotary embedding of another width, or with an attention factor (YaRN) behind φ.
///
/// # Example
/// ```
/// use attn_kernels::candle::rotary_linear_attention;
/// use attn_kernels::linear::LinearOptions;
/// use attn_kernels::nn::Rotary;
/// use candle_core::{Device, Tensor};
///
/// let rotary = Rotary::new(8, 10000.0)?;
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 50, 8), &Device::Cpu)?;
/// let options = LinearOptions { causal: true, ..Default::default() };
/// let out = rotary_linear_attention(&x, &x, &x, &rotary, &options)?;
/// assert_eq!(out.dims(), x.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rotary_linear_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rotary: &Rotary,
    options: &LinearOptions<Tensor>,
) -> Result<Tensor> {
    let function = "rotary_linear_attention";
    if is_rotated_before(options.map, options.normalizer.is_some()) {
        let [q, k] = rotate(function, q, k, rotary, None)?;
        return linear_attention(&q, &k, v, options);
    }
    Ok(linear(function, [q, k, v], rotary, options, None, false)?.0)
}

/// Causal [`rotary_linear_attention`] over the next piece of a sequence, as [`linear_attention_with_state`]: S is of
/// the rotated features, z of the features as they are (of the rotated ones where there is no divisor), and positions
/// go on from [`LinearState::position`].
///
/// # Errors
/// Those of [`rotary_linear_attention`] and [`linear_attention_with_state`]; queries before the first token.
pub fn rotary_linear_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rotary: &Rotary,
    options: &LinearOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<(Tensor, LinearState)> {
    let function = "rotary_linear_attention_with_state";
    ensure_causal(function, options.causal)?;
    if is_rotated_before(options.map, options.normalizer.is_some()) {
        let [q, k] = rotate(function, q, k, rotary, state)?;
        return linear_attention_with_state(&q, &k, v, options, state);
    }
    with_state(linear(function, [q, k, v], rotary, options, state, true)?)
}

/// [`norm_attention`] with rotary position embedding behind the feature map,
///
/// ```text
/// t_i = Σ_j ⟨R_i φ(q_i), R_j φ(k_j)⟩ γ_ij v_j,   o_i = t_i/√(mean(t_i²) + ε)
/// ```
///
/// with everything else as in [`rotary_linear_attention`].
///
/// # Errors
/// Those of [`norm_attention`]; a rotary embedding of another width.
pub fn rotary_norm_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rotary: &Rotary,
    options: &NormOptions<Tensor>,
) -> Result<Tensor> {
    let function = "rotary_norm_attention";
    if is_rotated_before(options.map, false) {
        let [q, k] = rotate(function, q, k, rotary, None)?;
        return norm_attention(&q, &k, v, options);
    }
    Ok(norm(function, [q, k, v], rotary, options, None, false)?.0)
}

/// Causal [`rotary_norm_attention`] over the next piece of a sequence; S and z are of the rotated features.
///
/// # Errors
/// Those of [`rotary_norm_attention`] and [`norm_attention_with_state`]; queries before the first token.
pub fn rotary_norm_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rotary: &Rotary,
    options: &NormOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<(Tensor, LinearState)> {
    let function = "rotary_norm_attention_with_state";
    ensure_causal(function, options.causal)?;
    if is_rotated_before(options.map, false) {
        let [q, k] = rotate(function, q, k, rotary, state)?;
        return norm_attention_with_state(&q, &k, v, options, state);
    }
    with_state(norm(function, [q, k, v], rotary, options, state, true)?)
}

/// [`performer_attention`](super::performer_attention) with rotary position embedding behind the random features, as
/// the RoFormer paper does with Performer: the equation of [`rotary_linear_attention`] with the stabilised φ of
/// [`performer_attention`](super::performer_attention). `rotary` is for rows of the width of φ, m or, for hyperbolic
/// features, 2m.
///
/// (Rotation before φ estimates softmax attention with rotary embedding, with an error that is another at every
/// position, and of the order of the output itself unless q and k are small.)
///
/// # Errors
/// Those of [`performer_attention`](super::performer_attention); a rotary embedding of another width.
pub fn rotary_performer_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    omega: &Tensor,
    rotary: &Rotary,
    options: &PerformerOptions<Tensor>,
) -> Result<Tensor> {
    Ok(performer("rotary_performer_attention", [q, k, v], omega, rotary, options, None, false)?.0)
}

/// Causal [`rotary_performer_attention`] over the next piece of a sequence, as
/// [`performer_attention_with_state`](super::performer_attention_with_state): S is of the rotated features, z of the
/// features as they are.
///
/// # Errors
/// Those of [`rotary_performer_attention`] and
/// [`performer_attention_with_state`](super::performer_attention_with_state); queries before the first token.
pub fn rotary_performer_attention_with_state(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    omega: &Tensor,
    rotary: &Rotary,
    options: &PerformerOptions<Tensor>,
    state: Option<&LinearState>,
) -> Result<(Tensor, LinearState)> {
    let function = "rotary_performer_attention_with_state";
    ensure_causal(function, options.causal)?;
    with_state(performer(function, [q, k, v], omega, rotary, options, state, true)?)
}

type Outcome = (Tensor, Option<LinearState>);

fn with_state((out, state): Outcome) -> Result<(Tensor, LinearState)> {
    state.map_or_else(|| candle_core::bail!("no state"), |state| Ok((out, state)))
}

/// Whether rotation of q and k is rotation of what their products see of φ.
fn is_rotated_before(map: FeatureMap, is_normalized: bool) -> bool {
    match map {
        FeatureMap::Taylor | FeatureMap::Cosine => true,
        FeatureMap::Identity => !is_normalized,
        _ => false,
    }
}

/// Rows of queries and of keys at their positions. Without a state positions may begin anywhere: products depend on
/// distances.
fn rotate(
    function: &'static str,
    q: &Tensor,
    k: &Tensor,
    rotary: &Rotary,
    state: Option<&LinearState>,
) -> Result<[Tensor; 2]> {
    let (queries, keys, width) = (q.dim(2)?, k.dim(2)?, q.dim(3)?);
    let got = format!("for rows of width {}", rotary.width());
    ensure_value(rotary.width() == width, function, "rotary", got, &format!("rows of width {width}"))?;
    let before = state.map_or(0, LinearState::position);
    let before = if before == 0 { queries.saturating_sub(keys) } else { before };
    let after = before.saturating_add(keys);
    let needs = format!("at most as many as the {after} keys so far");
    ensure_value(queries <= after, function, "q", format!("{queries} rows"), &needs)?;
    Ok([rotary.apply(q, after - queries)?, rotary.apply(k, before)?])
}

/// What the passes of a call have in common.
struct Call<'a> {
    /// The operation without rotation.
    problem: Linear,
    rotary: &'a Rotary,
    key_mask: Option<&'a Tensor>,
    log_decay: Option<&'a Tensor>,
    state: Option<&'a LinearState>,
    keeps_state: bool,
}

impl Call<'_> {
    /// Refuses tensors as the operation without rotation does, sequences whose tokens are not as far from each other as
    /// their rows, and a factor that the divisor would not have.
    fn admit(&self, [q, k, v]: [&Tensor; 3], omega: Option<&Tensor>) -> Result<()> {
        let factor = self.rotary.attention_factor();
        let (got, needs) = (format!("with an attention factor of {factor}"), "a factor of 1 behind a feature map");
        ensure_value(factor == 1.0, self.problem.function, "rotary", got, needs)?;
        let are_rows = |sequences: &Sequences| !self.keeps_state && sequences.are_aligned();
        let fits = self.problem.shapes.sequences.as_ref().is_none_or(are_rows);
        let needs = "none with a state or with other offsets for keys";
        ensure_value(fits, self.problem.function, "sequences", "given", needs)?;
        let (key_mask, log_decay, state) = (self.key_mask, self.log_decay, self.state);
        LinearCall::new(self.problem.clone(), [q, k, v], LinearTensors { key_mask, log_decay, omega, state })
            .map(|_| ())
    }

    /// φ of queries and keys where it is a function of the row alone, in the dtype of sums.
    fn features(&self, q: &Tensor, k: &Tensor, map: FeatureMap) -> Result<[Tensor; 2]> {
        let k = without_removed(k, self.key_mask)?;
        Ok([features(&widened(q)?, map)?, features(&widened(&k)?, map)?])
    }

    /// The output in the dtype of v, and the state after the last key if it is kept.
    fn attend(&self, [q, k]: &[Tensor; 2], v: &Tensor) -> Result<Outcome> {
        let [q_rotated, k_rotated] = rotate(self.problem.function, q, k, self.rotary, self.state)?;
        let epsilon = match self.problem.finish {
            LinearFinish::Normalize { epsilon } => epsilon,
            finish => {
                let (out, state) = self.pass([&q_rotated, &k_rotated, &widened(v)?], finish, self.state)?;
                return Ok((out.to_dtype(v.dtype())?, state));
            }
        };
        let (sums, state) = self.pass([&q_rotated, &k_rotated, &widened(v)?], LinearFinish::None, self.state)?;
        let (batch, heads, keys, _) = v.dims4()?;
        let ones = Tensor::ones((1, 1, 1, 1), q.dtype(), q.device())?.broadcast_as((batch, heads, keys, 1))?;
        let z = |state: &LinearState| -> Result<LinearState> {
            Ok(LinearState::new(state.z().unsqueeze(3)?, state.z().clone(), None, state.position()))
        };
        let before = self.state.map(z).transpose()?;
        let (divisors, after) = self.pass([q, k, &ones], LinearFinish::None, before.as_ref())?;
        let divisors = (divisors + epsilon)?;
        // A divisor of 0 gives 0.
        let infinite = Tensor::full(f64::INFINITY, divisors.shape(), q.device())?.to_dtype(divisors.dtype())?;
        let divisors = divisors.eq(0.0)?.where_cond(&infinite, &divisors)?;
        let out = sums.broadcast_mul(&divisors.recip()?)?.to_dtype(v.dtype())?;
        let joined = |(state, after): (LinearState, LinearState)| {
            LinearState::new(state.s().clone(), after.z().clone(), None, state.position())
        };
        Ok((out, state.zip(after).map(joined)))
    }

    /// A pass of the engine over features.
    fn pass(&self, [q, k, v]: [&Tensor; 3], finish: LinearFinish, state: Option<&LinearState>) -> Result<Outcome> {
        let Linear { function, scan, .. } = self.problem;
        let (key_mask, log_decay) = (self.key_mask, self.log_decay);
        let sequences = self.problem.shapes.sequences.as_ref();
        let shapes = LinearShapes::new(function, scan, [q, k, v], key_mask, log_decay, sequences)?;
        let problem = Linear::new(function, shapes, Map::Plain(FeatureMap::Identity), scan, finish)?;
        let call = LinearCall::new(problem, [q, k, v], LinearTensors { key_mask, log_decay, omega: None, state })?;
        match self.keeps_state {
            true => call.output_and_state().map(|(out, state)| (out, Some(state))),
            false => call.output().map(|out| (out, None)),
        }
    }
}

fn linear(
    function: &'static str,
    [q, k, v]: [&Tensor; 3],
    rotary: &Rotary,
    options: &LinearOptions<Tensor>,
    state: Option<&LinearState>,
    keeps_state: bool,
) -> Result<Outcome> {
    let problem = options.problem(function, q, k, v)?;
    let (key_mask, log_decay) = (options.key_mask.as_ref(), options.log_decay.as_ref());
    let call = Call { problem, rotary, key_mask, log_decay, state, keeps_state };
    call.admit([q, k, v], None)?;
    call.attend(&call.features(q, k, options.map)?, v)
}

fn norm(
    function: &'static str,
    [q, k, v]: [&Tensor; 3],
    rotary: &Rotary,
    options: &NormOptions<Tensor>,
    state: Option<&LinearState>,
    keeps_state: bool,
) -> Result<Outcome> {
    let problem = options.problem(function, q, k, v)?;
    let (key_mask, log_decay) = (options.key_mask.as_ref(), options.log_decay.as_ref());
    let call = Call { problem, rotary, key_mask, log_decay, state, keeps_state };
    call.admit([q, k, v], None)?;
    call.attend(&call.features(q, k, options.map)?, v)
}

fn performer(
    function: &'static str,
    [q, k, v]: [&Tensor; 3],
    omega: &Tensor,
    rotary: &Rotary,
    options: &PerformerOptions<Tensor>,
    state: Option<&LinearState>,
    keeps_state: bool,
) -> Result<Outcome> {
    let problem = options.problem(function, q, k, v, omega)?;
    let key_mask = options.key_mask.as_ref();
    let call = Call { problem, rotary, key_mask, log_decay: None, state, keeps_state };
    call.admit([q, k, v], Some(omega))?;
    if options.sequences.is_some() && q.dim(2)? > 0 {
        // The stabiliser runs through all rows that it is handed.
        let alone = |part: Part| -> Result<Tensor> {
            let key_mask = key_mask.map(|mask| rows(mask, &part.keys)).transpose()?;
            let options = PerformerOptions { key_mask, sequences: None, ..options.clone() };
            let operands = [&rows(q, &part.queries)?, &rows(k, &part.keys)?, &rows(v, &part.keys)?];
            performer(function, operands, omega, rotary, &options, None, false).map(|(out, _)| out)
        };
        let parts = call.problem.parts().filter(|(part, _)| !part.queries.is_empty());
        let outs: Vec<_> = parts.map(|(part, _)| alone(part)).collect::<Result<_>>()?;
        return Ok((Tensor::cat(&outs, 2)?, None));
    }
    let keys = by_state_heads(&without_removed(k, key_mask)?, call.problem.shapes.state_heads())?;
    let phi = FavorFeatures::new(&widened(q)?, &widened(&keys)?, omega, options, state)?;
    // The stabiliser is in the decay: for the engine these are sums like any.
    let with_stabilizer = |state: &LinearState, stabilizer: Option<Tensor>| {
        LinearState::new(state.s().clone(), state.z().clone(), stabilizer, state.position())
    };
    let plain = state.map(|state| with_stabilizer(state, None));
    let call = Call { state: plain.as_ref(), log_decay: phi.log_decay.as_ref(), ..call };
    let (out, state) = call.attend(&[phi.q, phi.k], v)?;
    Ok((out, state.map(|state| with_stabilizer(&state, phi.stabilizer))))
}

/// x in the dtype of sums.
fn widened(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(accumulator(x.dtype()))
}
