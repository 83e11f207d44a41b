//! Plans of the backward pass: a sweep forward in time for the gradient of q, and one backward for those of k and v.

use super::params::{GatherParams, Piece};
use super::{LinearLayout, Planner, STATES, THREADS, block_multiple, to_i64};
use crate::gpu::params::Pointer;
use crate::gpu::plan::{Argument, DeviceFacts, Plan};
use crate::problem::{Linear, Scan};

/// Strides of what the backward pass is handed besides the operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedLayout {
    /// Of the output: batch entry, head, row.
    pub out: [i64; 3],
    /// Of its gradient.
    pub d_out: [i64; 3],
    /// Of the statistic: batch entry, head (0 for a norm over all heads), row.
    pub statistic: [i64; 3],
    /// Output and gradient are in the type of sums.
    pub wide_out: bool,
    /// Whether the gradient of the log-decay per token is wanted.
    pub d_log_decay: bool,
    /// Whether the gradient of the output starts at a multiple of 16 bytes.
    pub is_aligned: bool,
}

/// Gradients of q, k, v and, if wanted, of the log-decay per token, contiguous. Everything is overwritten.
pub fn plan_backward(problem: &Linear, layout: &LinearLayout, saved: &SavedLayout, facts: &DeviceFacts) -> Plan {
    let mut planner = Planner::new(problem, layout, facts);
    let shapes = &problem.shapes;
    if shapes.batch == 0 || shapes.queries.max(shapes.keys) == 0 {
        return planner.plan;
    }
    planner.count_keys();
    planner.save(saved);
    if planner.sweep_chunks(layout, saved).is_some() {
        return planner.plan;
    }
    planner.directions();
    planner.deltas();
    planner.cut(planner.state_heads());
    if planner.params.segments > 1 {
        planner.tile_values(&STATES);
        planner.entering_states(|planner| planner.launch_sweep("states", &STATES));
    }
    let shared = planner.gradients();
    planner.log_gradients(saved);
    if saved.d_log_decay {
        planner.params.crossing = planner.workspace(planner.state_heads() * shapes.keys);
    }
    planner.whole_rows();
    planner.launch_sweep("queries", &QUERIES);
    if planner.params.segments > 1 {
        planner.entering_gradients(Planner::sweep_d_states);
        planner.whole_rows();
    }
    planner.launch_sweep("keys", &KEYS);
    planner.sum_gradients(shared, saved);
    planner.plan
}

const QUERIES: [Piece; 11] = [
    Piece::Rows,
    Piece::Weights,
    Piece::Pairs,
    Piece::Z,
    Piece::QueryPhi,
    Piece::KeyPhi,
    Piece::DPhi,
    Piece::Values,
    Piece::Sums,
    Piece::X,
    Piece::S,
];
const KEYS: [Piece; 11] = [
    Piece::Rows,
    Piece::Weights,
    Piece::Z,
    Piece::QueryPhi,
    Piece::KeyPhi,
    Piece::DPhi,
    Piece::Values,
    Piece::Sums,
    Piece::DValues,
    Piece::X,
    Piece::S,
];
const D_STATES: [Piece; 8] =
    [Piece::Rows, Piece::Z, Piece::QueryPhi, Piece::Sums, Piece::X, Piece::KeyPhi, Piece::Values, Piece::S];

impl Planner<'_> {
    /// What the forward pass left behind.
    fn save(&mut self, saved: &SavedLayout) {
        let params = &mut self.params;
        params.out = Argument::Out.into();
        params.out_strides = saved.out.into();
        params.d_out = Argument::DOut.into();
        params.d_out_strides = saved.d_out.into();
        params.is_out_wide |= i32::from(saved.wide_out);
        if self.problem.statistic_len() > 0 {
            params.statistic = Argument::Statistic.into();
            params.statistic_strides = saved.statistic.into();
        }
    }

    /// ⟨d_out, out⟩ where the way back from the outputs needs it.
    pub(super) fn deltas(&mut self) {
        let rows = self.problem.statistic_len();
        if rows > 0 {
            self.params.deltas = self.workspace(rows);
            self.launch("deltas", rows.div_ceil(THREADS / 32), 0);
        }
    }

    /// Where gradients go: to the results, or, for operands that several heads share, to parts that are summed afterwards.
    pub(super) fn gradients(&mut self) -> Vec<GatherParams> {
        let shapes = self.shapes();
        let (heads, state_heads) = (shapes.heads(), shapes.state_heads());
        let mut shared = Vec::new();
        let mut gradient = |planner: &mut Self, argument: Argument, own: usize, readers: usize, count: usize| {
            if own == readers || count == 0 {
                return (Pointer::from(argument), 0);
            }
            let parts = planner.workspace(shapes.batch * readers * count);
            shared.push(GatherParams {
                parts,
                out: argument.into(),
                groups: to_i64(shapes.batch * own),
                parts_per_group: to_i64(readers / own),
                count: to_i64(count),
            });
            (parts, 1)
        };
        let (queries, keys, width) = (shapes.queries, shapes.keys, shapes.width);
        let q = gradient(self, Argument::DQ, shapes.query_heads, heads, queries * width);
        let k = gradient(self, Argument::DK, shapes.key_heads, state_heads, keys * width);
        let v = gradient(self, Argument::DV, shapes.value_heads, state_heads, keys * shapes.value_width);
        (self.params.d_q, self.params.is_d_q_wide) = q;
        (self.params.d_k, self.params.is_d_k_wide) = k;
        (self.params.d_v, self.params.is_d_v_wide) = v;
        shared
    }

    /// Memory for what the two sweeps tell each other and the gradient of the log-decay.
    pub(super) fn log_gradients(&mut self, saved: &SavedLayout) {
        let shapes = self.shapes();
        if self.problem.map.is_stabilized() {
            let tiles = (self.params.positions as usize).div_ceil(super::TILE);
            self.params.tile_stabilizers = self.workspace(self.state_heads() * tiles);
        }
        if saved.d_log_decay {
            let bytes = self.state_heads() * shapes.keys * size_of::<f64>();
            self.params.d_log = self.plan.workspace(bytes).into();
            self.params.d_log_decay = Argument::DLogDecay.into();
        }
    }

    /// Blocks that have all value columns.
    fn whole_rows(&mut self) {
        self.params.set_value_tile(block_multiple(self.shapes().value_width));
    }

    /// The gradients of S and z of the segments, which `launch` adds a kernel for, and from them what enters each.
    pub(super) fn entering_gradients(&mut self, launch: impl FnOnce(&mut Self)) {
        (self.params.segment_d_s, self.params.segment_d_z) = self.segment_sums();
        launch(self);
        self.launch("d_scan", self.scan_blocks(), 0);
    }

    fn sweep_d_states(&mut self) {
        let needs_keys = self.problem.map.is_stabilized() && self.problem.scan == Scan::Causal;
        let pieces: Vec<Piece> = D_STATES
            .into_iter()
            .filter(|piece| needs_keys || !matches!(piece, Piece::KeyPhi | Piece::Values))
            .collect();
        self.tile_values(&pieces);
        self.launch_sweep("d_states", &pieces);
    }

    /// Gradients of what several heads share, and of the log-decay, from their parts.
    pub(super) fn sum_gradients(&mut self, shared: Vec<GatherParams>, saved: &SavedLayout) {
        shared.into_iter().for_each(|gather| self.gather(gather));
        if saved.d_log_decay {
            self.sum_logs();
        }
    }

    /// The gradient of the log-decay, which is in the type of sums.
    fn sum_logs(&mut self) {
        let sums = self.shapes().dtype.accumulator();
        if self.params.segments > 1 {
            let (blocks, shared) =
                (self.state_heads() * self.params.segments as usize, THREADS / 32 * size_of::<f64>());
            self.launch_of(format!("linear_log_anchors_{sums}"), blocks, THREADS, shared);
        }
        let blocks = self.state_heads().div_ceil(THREADS / 32);
        self.launch_of(format!("linear_d_log_decay_{sums}"), blocks, THREADS, 0);
    }

    fn gather(&mut self, params: GatherParams) {
        let kernel = format!("linear_gather_{}", self.shapes().dtype);
        let blocks = ((params.groups * params.count) as usize).div_ceil(THREADS).min(1 << 20);
        self.plan.launch(kernel, [blocks as u32, 1, 1], THREADS as u32, 0, &params);
    }
}
