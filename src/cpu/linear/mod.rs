//! The linear engine: prefix sums S = Σ φ(k)vᵀ carried through tiles of positions, in time and memory O(N).
//!
//! Queries and keys lie on one line of positions, ends aligned; a tile is a few dozen positions. Long sequences are
//! cut into segments. Of few heads, the sums of all segments are made first and then handed from segment to segment.

mod backward;
mod carried;
mod d_log;
mod d_states;
mod d_sums;
mod features;
mod forward;
mod gradients;
mod segments;
mod state;
mod sweeps;
mod tiles;

pub use backward::backward;
pub use forward::forward;

use std::ops::Range;

use super::rows::{Number, gather, inverse_key_counts};
use super::tile::Verbs;
use crate::Result;
use crate::gau::GlobalNorm;
use crate::problem::{self, Decay, Linear, LinearFinish, LinearShapes, Scan, SliceMut, View, ensure_value};
use features::Features;

/// Positions of a tile.
const TILE: usize = 32;

/// A state handed in, as views of slices.
pub type StateView<'a> = problem::StateView<View<'a>>;
/// The operands, as views of slices.
pub type LinearInputs<'a> = problem::LinearInputs<View<'a>>;
/// Slices that receive the results.
pub type LinearOutputs<'a> = problem::LinearOutputs<SliceMut<'a>>;
/// Slices that receive a state.
pub type StateMut<'a> = problem::StateMut<SliceMut<'a>>;
/// What the forward pass left behind, as views of slices.
pub type LinearSaved<'a> = problem::LinearSaved<View<'a>>;
/// The gradient of a state, as views of slices.
pub type StateGradient<'a> = problem::StateGradient<View<'a>>;
/// Slices that receive the gradients.
pub type LinearGradients<'a> = problem::LinearGradients<SliceMut<'a>>;

fn check(problem: &Linear, inputs: &LinearInputs<'_>) -> Result<()> {
    inputs.check(problem)?;
    let Some(log_decay) = &inputs.log_decay else { return Ok(()) };
    let invalid = gather::<f64>(log_decay).into_iter().find(|g| g.is_nan() || *g > 0.0);
    let got = invalid.map_or(String::new(), |g| g.to_string());
    ensure_value(invalid.is_none(), problem.function, "log_decay", got, "numbers of at most 0")
}

/// What all tasks of a call share.
struct Context<'a, T: 'static> {
    problem: &'a Linear,
    inputs: &'a LinearInputs<'a>,
    verbs: &'static Verbs<T>,
    features: Features<T>,
    /// As given, row-major.
    log_decay: Vec<f64>,
    /// [B, M]
    key_mask: Option<Vec<u8>>,
    /// 1/n of the batch entries, for norms that count keys.
    inverse_counts: Vec<f64>,
    /// Whether the last state has a gradient.
    ends_in_gradient: bool,
}

impl<'a, T: Number> Context<'a, T> {
    fn new(problem: &'a Linear, inputs: &'a LinearInputs<'a>, verbs: &'static Verbs<T>) -> Self {
        let omega = inputs.omega.as_ref().map(gather).unwrap_or_default();
        let key_mask: Option<Vec<u8>> =
            inputs.key_mask.as_ref().map(|mask| gather::<f32>(mask).into_iter().map(|x| x as u8).collect());
        Self {
            problem,
            inputs,
            verbs,
            features: Features::new(problem.map, problem.shapes.width, omega, verbs),
            log_decay: inputs.log_decay.as_ref().map(gather).unwrap_or_default(),
            inverse_counts: match problem.finish {
                LinearFinish::ChunkNorm { .. } => {
                    inverse_key_counts(key_mask.as_deref(), problem.shapes.batch, problem.shapes.keys)
                }
                _ => Vec::new(),
            },
            key_mask,
            ends_in_gradient: false,
        }
    }

    fn shapes(&self) -> &LinearShapes {
        &self.problem.shapes
    }

    /// Positions on the line: the longer of queries and keys.
    fn positions(&self) -> usize {
        self.shapes().queries.max(self.shapes().keys)
    }

    /// Positions before the first query; without causality there is no alignment.
    fn first_query(&self) -> usize {
        if self.is_full() { 0 } else { self.positions() - self.shapes().queries }
    }

    /// Positions before the first key.
    fn first_key(&self) -> usize {
        if self.is_full() { 0 } else { self.positions() - self.shapes().keys }
    }

    /// The queries at `positions`, as rows of q.
    fn queries(&self, positions: &Range<usize>) -> Range<usize> {
        shift(positions, self.first_query(), self.shapes().queries)
    }

    /// The keys at `positions`, as rows of k.
    fn keys(&self, positions: &Range<usize>) -> Range<usize> {
        shift(positions, self.first_key(), self.shapes().keys)
    }

    fn is_full(&self) -> bool {
        self.problem.scan == Scan::Full
    }

    /// Whether a query reads keys of its own tile.
    fn is_inclusive(&self) -> bool {
        self.problem.scan == Scan::Causal
    }

    /// Positions that share the sums they read, for the chunk-exclusive scan.
    fn chunk(&self) -> Option<usize> {
        match self.problem.scan {
            Scan::ChunkExclusive { chunk } => Some(chunk),
            _ => None,
        }
    }

    /// Whether a chunk of the chunk-exclusive scan starts here; segments start chunks.
    fn starts_chunk(&self, position: usize) -> bool {
        self.chunk().is_some_and(|chunk| position.is_multiple_of(chunk))
    }

    /// Whether sums shrink from one position to the next.
    fn decays(&self) -> bool {
        self.shapes().decay != Decay::None || self.problem.map.is_stabilized()
    }

    /// Log-decay of a key of a state head, the stabiliser's share aside; 0 for a key that the mask removes.
    fn log_decay(&self, batch: usize, head: usize, key: usize) -> f64 {
        let shapes = self.shapes();
        match shapes.decay {
            Decay::None => 0.0,
            _ if !self.keeps(batch, key) => 0.0,
            Decay::Head => self.log_decay[head],
            Decay::Token => self.log_decay[(batch * shapes.state_heads() + head) * shapes.keys + key],
        }
    }

    /// Whether a key of this batch entry takes part.
    fn keeps(&self, batch: usize, key: usize) -> bool {
        self.key_mask.as_ref().is_none_or(|mask| mask[batch * self.shapes().keys + key] != 0)
    }

    /// D' and E rounded up to whole vectors.
    fn padded(&self) -> (usize, usize) {
        (self.features.padded, self.verbs.padded(self.shapes().value_width))
    }

    /// Output heads that read one state head.
    fn readers(&self) -> usize {
        self.shapes().heads() / self.shapes().state_heads()
    }

    /// Whether outputs are divided by ⟨φ(q), z⟩ + ε.
    fn normalizes(&self) -> bool {
        matches!(self.problem.finish, LinearFinish::Normalize { .. })
    }

    /// Whether z counts: as a divisor, or by its gradient.
    fn reads_z(&self) -> bool {
        self.normalizes() || self.ends_in_gradient
    }

    /// Scale of the sums read at a position, for FLASH's global branch.
    fn chunk_norm(&self, batch: usize, position: usize) -> T {
        let LinearFinish::ChunkNorm { norm, chunk } = self.problem.finish else { return T::ONE };
        let before = self.inputs.state.as_ref().map_or(0, |state| state.position);
        let tokens = match norm {
            GlobalNorm::Mean if !self.is_full() => (before + position) / chunk * chunk,
            GlobalNorm::Chunk => chunk,
            GlobalNorm::Mean | GlobalNorm::Length => return T::from_f64(self.inverse_counts[batch]),
        };
        if tokens == 0 { T::ZERO } else { T::from_f64(1.0 / tokens as f64) }
    }

    /// Tiles of `positions`, cut at chunk ends.
    fn tiles(&self, positions: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<T> {
        let chunk = self.chunk().unwrap_or(TILE);
        let mut start = positions.start;
        std::iter::from_fn(move || {
            let chunk_end = (start / chunk + 1).saturating_mul(chunk);
            let tile = start..(start + TILE).min(chunk_end).min(positions.end);
            start = tile.end;
            (!tile.is_empty()).then_some(tile)
        })
    }

    /// Cuts the line of positions at ends of tiles and chunks, by widths alone: results do not depend on how much
    /// there is to do beside. The sums of a segment take no more room than its keys and values.
    fn segments(&self) -> Vec<Range<usize>> {
        let (positions, chunk) = (self.positions(), self.chunk().unwrap_or(1));
        let (width, value_width) = (self.shapes().width, self.shapes().value_width);
        let room = (self.features.count * value_width).div_ceil(width + value_width);
        let length = room.max(8 * TILE).next_multiple_of(TILE);
        let length = length.max(chunk).next_multiple_of(chunk);
        let starts = (0..positions.max(1)).step_by(length);
        starts.map(|start| start..(start + length).min(positions)).collect()
    }

    /// About how long the products of a forward pass take on one thread: 20 multiply-adds a nanosecond.
    fn nanoseconds(&self) -> usize {
        let (shapes, features) = (self.shapes(), self.features.count);
        let rows = (shapes.batch * shapes.heads().max(shapes.state_heads())).saturating_mul(self.positions());
        let sums = 2 * features * shapes.value_width + TILE / 2 * (features + shapes.value_width);
        rows.saturating_mul(sums) / 20
    }

    /// What one of `units` equal pieces of work takes on at once: all segments, or one where threads would be idle.
    fn segments_at_once(&self, segments: usize, units: usize) -> usize {
        if super::parallel::pieces(units) > 1 { 1 } else { segments }
    }
}

/// Moves a range by `−first` and clips it to `0..len`.
fn shift(range: &Range<usize>, first: usize, len: usize) -> Range<usize> {
    let clip = |x: usize| x.saturating_sub(first).min(len);
    clip(range.start)..clip(range.end)
}
