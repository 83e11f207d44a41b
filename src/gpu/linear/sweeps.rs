//! Plans of the backward pass on sm_90a (kernels/linear/queries.sm90.cu, keys.sm90.cu): which problems it is for, and how.

use super::backward::SavedLayout;
use super::params::{LinearParams, LinearSweepParams};
use super::warpgroups::{BARRIERS, CHUNK, Chunks, STAGES};
use super::{LinearLayout, Planner, THREADS, to_i64};
use crate::gpu::plan::{Argument, DeviceFacts, TensorMap};
use crate::linear::FeatureMap;
use crate::problem::{Decay, LinearFinish, Map, Scan};
use crate::transnormer::NormScope;

/// Bytes of `SweepScratch` and of `SweepRows`.
const SCRATCH: usize = 4 * (8 * 128 + 2 * 128 + 8 + 2 * CHUNK);
const ROWS: usize = 4 * (13 * CHUNK + 3);
/// Elements of a vector, to whole ones of which rows of a workspace are filled up.
const VECTOR: usize = 8;

/// An instance: columns of the operands that a block has whole, and of its output.
#[derive(Clone, Copy)]
struct Sweep {
    inner: usize,
    outer: usize,
    /// Whether the state is read as the sum of two numbers.
    is_exact: bool,
}

impl Sweep {
    /// The narrowest instance that is wide enough, if it has room; exact ones have none for more than 128 columns.
    fn of(width: usize, is_exact: bool, facts: &DeviceFacts) -> Option<Self> {
        let [inner, outer] = match width {
            0..=64 => [64, 64],
            65..=128 => [128, 128],
            129..=256 => [256, 64],
            _ => return None,
        };
        let sweep = Self { inner, outer, is_exact };
        (sweep.shared_bytes() <= facts.shared_bytes_per_block as usize).then_some(sweep)
    }

    fn threads(self) -> u32 {
        // A warp that copies, or a warpgroup, which gives its registers away.
        if self.outer == CHUNK { 160 } else { 384 }
    }

    /// As `SweepShared` on the device.
    fn shared_bytes(self) -> usize {
        let Self { inner, outer, is_exact } = self;
        let tiles = 2 * (STAGES * 2 * CHUNK * (inner + outer) + outer * inner + CHUNK * outer);
        let small = SCRATCH + STAGES * (ROWS + BARRIERS);
        (tiles + small).next_multiple_of(1024) + if is_exact { 2 * outer * inner } else { 0 }
    }

    /// Segments for a device with so many multiprocessors and as many blocks of queries; there are twice as many of keys
    /// and values. They make q, k, v and the gradients be read once more, so half of the device may rather stay idle.
    fn pieces(self, blocks: usize, processors: usize) -> usize {
        let slots = if self.inner == CHUNK { 2 * processors } else { processors };
        if 2 * blocks >= slots { 1 } else { slots / blocks }
    }
}

impl Planner<'_> {
    /// The launches of a backward pass, if there are kernels for the problem.
    pub(super) fn sweep_chunks(&mut self, layout: &LinearLayout, saved: &SavedLayout) -> Option<()> {
        let map = self.swept_map(saved)?;
        let shapes = self.shapes();
        let sweep = Sweep::of(shapes.width.max(shapes.value_width), saved.d_log_decay, self.facts)?;
        let chunks = Chunks::of(self, layout, false)?;
        let [q_map, k_map, v_map] = chunks.maps;
        let d_out_map = self.d_sums_map(Argument::DOut, saved.d_out);
        if !self.is_normed() {
            d_out_map?;
        }
        let [of_features, of_values] = [shapes.width, shapes.value_width].map(|width| width.div_ceil(sweep.outer));
        self.cut_into(sweep.pieces(self.state_heads() * of_features, self.facts.multiprocessors as usize));
        let d_sums_map = self.d_sums(d_out_map)?;
        if self.params.segments > 1 {
            self.entering_chunks(&chunks);
        }
        let shared = self.gradients();
        self.log_gradients(saved);
        let decays = shapes.decay != Decay::None;
        let mapped = |problem, has_term| LinearSweepParams {
            problem,
            q_map,
            k_map,
            v_map,
            d_sums_map,
            has_term: i32::from(has_term),
            has_own: i32::from(saved.d_log_decay || map != FeatureMap::Identity),
        };
        self.launch_chunk_sweep("queries", sweep, of_features, |problem| mapped(problem, decays));
        if self.params.segments > 1 {
            let has_term = decays || self.problem.finish != LinearFinish::None;
            self.entering_gradients(|planner| {
                planner.launch_chunk_sweep("d_states", sweep, of_features, |problem| mapped(problem, has_term));
            });
        }
        let has_factors = self.problem.finish != LinearFinish::None;
        let blocks = of_features + of_values;
        self.launch_chunk_sweep("keys", sweep, blocks, |problem| mapped(problem, decays || has_factors));
        self.sum_gradients(shared, saved);
        Some(())
    }

    /// The map of a problem that the kernels are for, if those of the forward pass are, too.
    fn swept_map(&self, saved: &SavedLayout) -> Option<FeatureMap> {
        let shapes = self.shapes();
        let Map::Plain(map) = self.problem.map else { return None };
        let fits = self.problem.scan == Scan::Causal
            && shapes.heads() == shapes.state_heads()
            && (saved.is_aligned || self.is_normed())
            && !saved.wide_out;
        fits.then_some(map)
    }

    fn is_normed(&self) -> bool {
        matches!(self.problem.finish, LinearFinish::RmsNorm { .. })
    }

    fn d_sums_map(&self, argument: Argument, strides: [i64; 3]) -> Option<TensorMap> {
        let shapes = self.shapes();
        let sizes = [shapes.value_width, shapes.queries, shapes.heads(), shapes.batch];
        TensorMap::of(argument, shapes.dtype, strides, sizes, [CHUNK; 2])
    }

    /// The gradients of sums, but for factors of rows: those of outputs, unless there is a norm in between.
    fn d_sums(&mut self, d_out_map: Option<TensorMap>) -> Option<TensorMap> {
        let shapes = self.shapes();
        if self.problem.finish == LinearFinish::None {
            return d_out_map;
        }
        // The norm of a head is dealt with row by row, below.
        if !matches!(self.problem.finish, LinearFinish::RmsNorm { scope: NormScope::Head, .. }) {
            self.deltas();
        }
        if !self.is_normed() {
            return d_out_map;
        }
        let rows = shapes.batch * shapes.heads() * shapes.queries;
        let row = shapes.value_width.next_multiple_of(VECTOR);
        let index = self.plan.workspace(rows * row * shapes.dtype.size());
        self.params.d_sums = index.into();
        let strides = [shapes.heads() * shapes.queries * row, shapes.queries * row, row].map(to_i64);
        let map = self.d_sums_map(index, strides);
        self.launch("unfinish", rows.div_ceil(THREADS / 32), 0);
        map
    }

    /// Adds blocks of the gradients of a segment: so many tiles of output beside each other.
    fn launch_chunk_sweep(
        &mut self,
        kernel: &str,
        sweep: Sweep,
        tiles: usize,
        params: impl FnOnce(LinearParams) -> LinearSweepParams,
    ) {
        self.params.value_tiles = tiles as i32;
        let name = format!("linear_{kernel}_sm90_{}_{}", self.shapes().dtype, sweep.inner);
        self.launch_mapped(name, sweep.threads(), sweep.shared_bytes(), params);
    }
}
