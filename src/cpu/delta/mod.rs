//! The delta engine: S_t = Diag(e^{g_t}) S_{t−1} + a_t b_tᵀS_{t−1} + k_t v_tᵀ, in chunks of tokens, in time and memory O(N).
//!
//! Within a chunk rows read the state (queries, and b) and rows are added to it with their values (a with its unknown
//! values u_t = S_{t−1}ᵀ b_t, and keys with those given). With M_xy the products of reading and added rows, each under the
//! decay between its two tokens, and x̃, ỹ the rows under the decay from the chunk's start and to its end:
//!
//! ```text
//! U  = b̃ S + M_ba U + M_bk V       unit lower triangular, row by row
//! O  = q̃ S + M_qa U + M_qk V
//! S' = decay · S + ãᵀ U + k̃ᵀ V
//! ```
//!
//! By the delta rule, where a = −β k and V is read away from itself, one set of added rows is left: W = V − U with β k. With a
//! bonus queries read before the decay of their own token, and the diagonal of M_qk is ⟨q, bonus ⊙ k⟩.
//!
//! Columns of values, and of the state, do not depend on each other. Where there are fewer heads than threads, those of a head
//! are cut into strips.

mod backward;
mod backward_strips;
mod bonus;
mod chunk;
mod fade;
mod forward;
mod gradient;
mod operands;
mod strips;
mod token;
mod walk;

pub use backward::backward;
pub use forward::forward;

use super::rows::{HeadRows, Number, gather};
use super::tile::Verbs;
use crate::Result;
use crate::problem::{self, Delta, DeltaDecay, DeltaShapes, Operand, RankOne, SliceMut, View, ensure_value};

/// Tokens of a chunk.
const CHUNK: usize = 16;
/// Tokens between states that the backward pass keeps.
const SEGMENT: usize = 8 * CHUNK;

/// Numbers of the state times tokens that the delta rule takes a nanosecond for (AVX-512).
const NANOSECONDS: usize = 7;

/// The operands, as views of slices.
pub type DeltaInputs<'a> = problem::DeltaInputs<View<'a>>;
/// Slices that receive the results.
pub type DeltaOutputs<'a> = problem::DeltaOutputs<SliceMut<'a>>;
/// The gradients of the results, as views of slices.
pub type DeltaSaved<'a> = problem::DeltaSaved<View<'a>>;
/// Slices that receive the gradients.
pub type DeltaGradients<'a> = problem::DeltaGradients<SliceMut<'a>>;

/// How many times as many tokens there are in all parts as in this one.
fn share(all: &DeltaShapes, part: &Delta) -> usize {
    all.tokens / part.shapes.tokens.max(1)
}

fn check(problem: &Delta, inputs: &DeltaInputs<'_>) -> Result<()> {
    inputs.check(problem)?;
    let Some(log_decay) = &inputs.log_decay else { return Ok(()) };
    let invalid = |g: &f64| g.is_nan() || *g > 0.0;
    let found = if problem.shapes.decay == DeltaDecay::Channel {
        let [batch, heads, tokens, width] = [0, 1, 2, 3].map(|dimension| log_decay.dims()[dimension]);
        let mut row = vec![0.0; width];
        let mut rows = (0..batch * heads).flat_map(|head| (0..tokens).map(move |token| (head, token)));
        rows.find_map(|(head, token)| {
            HeadRows::new(log_decay, head / heads, head % heads).load(token..token + 1, &mut row, width);
            row.iter().copied().find(invalid)
        })
    } else {
        gather::<f64>(log_decay).into_iter().find(invalid)
    };
    let got = found.map_or(String::new(), |g| g.to_string());
    ensure_value(found.is_none(), problem.function, "log_decay", got, "numbers of at most 0")
}

/// What all tasks of a call share.
struct Context<'a, T: 'static> {
    problem: &'a Delta,
    inputs: &'a DeltaInputs<'a>,
    verbs: &'static Verbs<T>,
    /// Per head or token, as given, row-major.
    log_decay: Vec<f64>,
    /// [B, Hs, N], by the delta rule
    beta: Vec<T>,
    /// [Hs, D], in rows of whole vectors
    bonus: Vec<T>,
    /// [B, N]
    key_mask: Option<Vec<u8>>,
}

impl<'a, T: Number> Context<'a, T> {
    fn new(problem: &'a Delta, inputs: &'a DeltaInputs<'a>, verbs: &'static Verbs<T>) -> Self {
        let is_scalar = problem.shapes.decay != DeltaDecay::Channel;
        let mask = |mask: &View<'_>| gather::<f32>(mask).into_iter().map(|x| x as u8).collect();
        Self {
            problem,
            inputs,
            verbs,
            log_decay: inputs.log_decay.as_ref().filter(|_| is_scalar).map(gather).unwrap_or_default(),
            beta: if let RankOne::Rule { beta } = &inputs.rank_one { gather(beta) } else { Vec::new() },
            bonus: inputs.bonus.as_ref().map(|bonus| padded_rows(bonus, verbs)).unwrap_or_default(),
            key_mask: inputs.key_mask.as_ref().map(mask),
        }
    }

    fn shapes(&self) -> &DeltaShapes {
        &self.problem.shapes
    }

    /// D and E rounded up to whole vectors.
    fn padded(&self) -> (usize, usize) {
        (self.verbs.padded(self.shapes().width), self.verbs.padded(self.shapes().value_width))
    }

    /// Tokens of the longest chunk.
    fn rows(&self) -> usize {
        CHUNK.min(self.shapes().tokens)
    }

    /// Numbers of a state in rows of whole vectors.
    fn state_len(&self) -> usize {
        self.shapes().width * self.padded().1
    }

    /// Output heads that read one state head.
    fn readers(&self) -> usize {
        self.shapes().heads() / self.shapes().state_heads()
    }

    /// The bonus of a state head.
    fn bonus(&self, head: usize) -> &[T] {
        let d = self.padded().0;
        &self.bonus[head * d..][..d]
    }

    /// Whether a token of this batch entry takes part.
    fn keeps(&self, batch: usize, token: usize) -> bool {
        self.key_mask.as_ref().is_none_or(|mask| mask[batch * self.shapes().tokens + token] != 0)
    }

    /// The head of an operand of `count` heads that a state head has.
    fn operand(&self, view: &View<'a>, at: StateHead) -> HeadRows<'a> {
        HeadRows::new(view, at.batch, at.head * view.dims()[1] / self.shapes().state_heads())
    }

    /// Fills a state: from one that was handed in, or with zeros.
    fn load_state(&self, view: Option<&View<'_>>, at: StateHead, into: &mut [T]) {
        match view {
            Some(view) => HeadRows::new(view, at.batch, at.head).load(0..self.shapes().width, into, self.padded().1),
            None => into.fill(T::ZERO),
        }
    }
}

/// Rows of a matrix, filled up with zeros to whole vectors.
fn padded_rows<T: Number>(view: &View<'_>, verbs: &Verbs<T>) -> Vec<T> {
    let width = view.dims()[1];
    let rows = gather::<T>(view);
    let mut padded = vec![T::ZERO; view.dims()[0] * verbs.padded(width)];
    for (to, row) in padded.chunks_exact_mut(verbs.padded(width)).zip(rows.chunks_exact(width)) {
        to[..width].copy_from_slice(row);
    }
    padded
}

/// Which state.
#[derive(Clone, Copy)]
struct StateHead {
    batch: usize,
    head: usize,
}
