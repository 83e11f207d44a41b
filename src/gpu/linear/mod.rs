//! Plans of the linear engine; the kernels are those of kernels/linear.

mod backward;
mod describe;
mod favor;
mod memory;
mod params;
#[cfg(feature = "gpu")]
mod run;
mod step;
mod sweeps;
mod warpgroups;

pub use backward::{SavedLayout, plan_backward};
#[cfg(feature = "gpu")]
pub use run::{LinearGradients, LinearInputs, LinearOutputs, LinearSaved, backward, forward};

use super::params::{Field, Pointer, Type};
use super::plan::{Argument, DeviceFacts, Plan};
use crate::problem::{Linear, LinearFinish, LinearShapes, Map, Scan};
use crate::transnormer::NormScope;
use describe::{Finish, counts_keys, describe, to_i64};
use memory::{Memory, block_multiple, wide_row};
use params::{GatherParams, LinearMappedParams, LinearParams, LinearSweepParams, Piece};

/// Positions of a tile, and the granularity of its columns.
const TILE: usize = 32;
const THREADS: usize = 128;
/// Fewest positions of a segment.
const SEGMENT: usize = 8 * TILE;
/// Most value columns of a block of the forward pass.
const MOST_COLUMNS: usize = 4 * TILE;

/// Strides of the operands in elements, batch entry and head first; the last dimension is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearLayout {
    /// Of q.
    pub q: [i64; 3],
    /// Of k.
    pub k: [i64; 3],
    /// Of v.
    pub v: [i64; 3],
    /// Batch stride of the key mask, if there is one.
    pub key_mask: Option<i64>,
    /// Of the log-decay, 0 in dimensions that it lacks: batch entry, head, token.
    pub log_decay: [i64; 3],
    /// Row stride of ω.
    pub omega: i64,
    /// The state handed in.
    pub state: Option<StateLayout>,
    /// Whether q, k and v start at multiples of 16 bytes.
    pub is_aligned: bool,
}

/// Strides of a state handed in, and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateLayout {
    /// Of S: batch entry, head, row.
    pub s: [i64; 3],
    /// Of z: batch entry, head.
    pub z: [i64; 2],
    /// Of the stabiliser: batch entry, head.
    pub stabilizer: [i64; 2],
    /// Tokens that the state has seen.
    pub position: usize,
}

/// What the forward pass hands out besides the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForwardOutputs {
    /// The output is in the type of sums.
    pub wide_out: bool,
    /// The row statistic.
    pub statistic: bool,
    /// The final state.
    pub state: bool,
}

/// The parameter structs of the engine's kernels.
pub(super) fn parameters() -> Vec<Type> {
    vec![LinearParams::TYPE, LinearMappedParams::TYPE, LinearSweepParams::TYPE, GatherParams::TYPE]
}

/// Output, statistic and final state. Everything that is asked for is overwritten.
pub fn plan_forward(problem: &Linear, layout: &LinearLayout, outputs: ForwardOutputs, facts: &DeviceFacts) -> Plan {
    let mut planner = Planner::new(problem, layout, facts);
    let shapes = &problem.shapes;
    if shapes.batch == 0 || (shapes.queries == 0 && !outputs.state) {
        return planner.plan;
    }
    planner.count_keys();
    let params = &mut planner.params;
    params.is_out_wide = outputs.wide_out.into();
    params.out = Argument::Out.into();
    params.statistic = outputs.statistic.then_some(Argument::Statistic).into();
    if outputs.state {
        params.final_s = Argument::FinalS.into();
        params.final_z = Argument::FinalZ.into();
        params.final_stabilizer = problem.map.is_stabilized().then_some(Argument::FinalStabilizer).into();
    }
    if planner.token().is_some() {
        return planner.plan;
    }
    let state = outputs.state;
    if planner.on_warpgroups(layout, state).or_else(|| planner.favor_on_warpgroups(layout, state)).is_some() {
        return planner.plan;
    }
    planner.directions();
    planner.tile_values(&OUTPUTS);
    planner.cut(planner.blocks());
    if planner.params.segments > 1 {
        planner.entering_states(|planner| planner.launch_sweep("states", &STATES));
    }
    planner.outputs(|planner| planner.launch_sweep("outputs", &OUTPUTS));
    planner.plan
}

/// Shared memory of each of two blocks on a multiprocessor, which sets 1024 bytes aside for each block.
const fn half(limit: usize) -> usize {
    limit.saturating_sub(1024) / 2
}

/// Pieces of memory of the kernels, those first that are best kept in shared memory.
const OUTPUTS: [Piece; 9] = [
    Piece::Rows,
    Piece::Weights,
    Piece::Z,
    Piece::QueryPhi,
    Piece::KeyPhi,
    Piece::Values,
    Piece::Sums,
    Piece::X,
    Piece::S,
];
const STATES: [Piece; 6] = [Piece::Rows, Piece::Z, Piece::KeyPhi, Piece::Values, Piece::X, Piece::S];

/// A plan in the making, with what all of its launches share.
struct Planner<'a> {
    problem: &'a Linear,
    facts: &'a DeviceFacts,
    params: LinearParams,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn new(problem: &'a Linear, layout: &LinearLayout, facts: &'a DeviceFacts) -> Self {
        Self { problem, facts, params: describe(problem, layout), plan: Plan::default() }
    }

    fn shapes(&self) -> &'a LinearShapes {
        &self.problem.shapes
    }

    /// Bytes of a number in the type of sums.
    fn real(&self) -> usize {
        self.shapes().dtype.accumulator().size()
    }

    fn state_heads(&self) -> usize {
        self.shapes().batch * self.params.state_heads as usize
    }

    /// Blocks of a kernel without segments.
    fn blocks(&self) -> usize {
        self.state_heads() * self.params.value_tiles as usize
    }

    fn workspace(&mut self, numbers: usize) -> Pointer {
        self.plan.workspace(numbers * self.real()).into()
    }

    /// Adds a launch of `blocks` blocks with the current parameters.
    fn launch(&mut self, kernel: &str, blocks: usize, shared: usize) {
        self.launch_of(format!("linear_{kernel}_{}", self.shapes().dtype), blocks, THREADS, shared);
    }

    /// The same of so many threads, by its whole name.
    fn launch_of(&mut self, kernel: String, blocks: usize, threads: usize, shared: usize) {
        self.plan.launch(kernel, [grid(blocks), 1, 1], threads as u32, shared as u32, &self.params);
    }

    /// Adds a launch for every segment of every state head and value tile, with memory for `pieces`: of the kernel that has
    /// them all in shared memory, or of the one that asks of each where it lies.
    fn launch_sweep(&mut self, kernel: &str, pieces: &[Piece]) {
        let blocks = self.blocks() * self.params.segments as usize;
        let memory = Memory::new(&self.params, pieces, self.real(), self.facts);
        self.params.pieces = memory.pieces;
        self.params.spill_bytes = memory.spilled as i64;
        if memory.spilled == 0 {
            self.params.spill = Pointer::default();
            return self.launch(kernel, blocks, memory.shared);
        }
        self.params.spill = self.plan.workspace(memory.spilled * blocks).into();
        self.launch(&format!("{kernel}_spilled"), blocks, memory.shared);
    }

    /// The numbers of keys that the mask leaves, where outputs are divided by them.
    fn count_keys(&mut self) {
        let batch = self.shapes().batch;
        if counts_keys(self.problem) && self.params.key_mask.0.is_some() && batch > 0 {
            self.params.inverse_counts = self.plan.workspace(batch * size_of::<f64>()).into();
            self.launch_of("linear_count".into(), batch, THREADS, THREADS / 32 * size_of::<i32>());
        }
    }

    /// ω for FAVOR+ maps.
    fn directions(&mut self) {
        if let Map::Favor { directions, .. } = self.problem.map {
            let numbers = block_multiple(directions) * self.params.width_row as usize;
            self.params.directions = self.workspace(numbers);
            self.launch("directions", numbers.div_ceil(THREADS).min(1024), 0);
        }
    }

    /// Gives a kernel with these pieces as many value columns as leave room for two blocks on a multiprocessor, or for one.
    /// Sequences too short for segments fill the device by narrow tiles instead.
    fn tile_values(&mut self, pieces: &[Piece]) {
        let columns = block_multiple(self.shapes().value_width);
        let (limit, processors) = (self.facts.shared_bytes_per_block as usize, self.facts.multiprocessors as usize);
        let fits = |width: usize, limit: usize| {
            let mut params = self.params;
            params.set_value_tile(width);
            Memory::new(&params, pieces, self.real(), self.facts).total() <= limit
        };
        let is_short = self.params.positions as usize <= SEGMENT;
        let fills = |width| !is_short || self.state_heads() * columns.div_ceil(width) >= processors;
        // The norm of a row is taken in the kernel that has it whole.
        let is_whole = matches!(self.problem.finish, LinearFinish::RmsNorm { scope: NormScope::Head, .. });
        if is_whole && columns <= MOST_COLUMNS && fits(columns, limit) {
            return self.params.set_value_tile(columns);
        }
        let widths = [MOST_COLUMNS, MOST_COLUMNS / 2, TILE].map(|width| width.min(columns));
        let best = widths.into_iter().find(|&width| fills(width) && fits(width, half(limit)));
        let next = || widths.into_iter().find(|&width| fills(width) && fits(width, limit));
        let width = best.or_else(next).unwrap_or(TILE);
        self.params.set_value_tile(width);
    }

    /// Cuts the line of positions into segments, at ends of tiles and chunks, where `blocks` leave the device idle.
    fn cut(&mut self, blocks: usize) {
        let processors = self.facts.multiprocessors as usize;
        self.cut_into(if blocks >= processors { 1 } else { (2 * processors).div_ceil(blocks) });
    }

    /// Cuts the line of positions into at most so many segments.
    fn cut_into(&mut self, pieces: usize) {
        let positions = self.params.positions as usize;
        let chunk = if let Scan::ChunkExclusive { chunk } = self.problem.scan { chunk } else { 1 };
        let step = chunk.max(SEGMENT).checked_next_multiple_of(chunk).unwrap_or(chunk);
        let length = positions.div_ceil(pieces).div_ceil(step).max(1).saturating_mul(step);
        self.params.segments = positions.div_ceil(length).max(1) as i64;
        self.params.segment_length = to_i64(length);
    }

    /// Workspaces with S and z for each segment and one more.
    fn segment_sums(&mut self) -> (Pointer, Pointer) {
        let slots = self.state_heads() * (self.params.segments as usize + 1);
        let features = self.params.features as usize;
        let s = self.workspace(slots * features * self.shapes().value_width);
        (s, self.workspace(slots * features))
    }

    fn scan_blocks(&self) -> usize {
        let numbers = self.params.features as usize * (self.shapes().value_width + 1);
        self.state_heads() * numbers.div_ceil(THREADS)
    }

    /// The sums of the segments, which `launch` adds a kernel for, and from them what enters each.
    fn entering_states(&mut self, launch: impl FnOnce(&mut Self)) {
        let slots = self.state_heads() * (self.params.segments as usize + 1);
        (self.params.segment_s, self.params.segment_z) = self.segment_sums();
        self.params.segment_stabilizer = self.workspace(slots);
        self.params.entering_stabilizer = self.workspace(slots);
        self.params.segment_log_decay = self.plan.workspace(slots * size_of::<f64>()).into();
        launch(self);
        self.launch("scan", self.scan_blocks(), 0);
    }

    /// Adds what leads to the outputs; `launch` adds the kernel that reads the sums.
    fn outputs(&mut self, launch: impl FnOnce(&mut Self)) {
        let finish = self.params.finish;
        let is_joint = finish == Finish::RmsNormAllHeads as i32;
        let is_raw = is_joint || (finish == Finish::RmsNorm as i32 && self.params.value_tiles > 1);
        if !is_raw {
            return launch(self);
        }
        self.params.raw = self.workspace(self.problem.output_len());
        self.params.finish = Finish::Raw as i32;
        launch(self);
        self.params.finish = finish;
        let shapes = self.shapes();
        let rows = shapes.batch * shapes.queries * if is_joint { 1 } else { shapes.heads() };
        if rows > 0 {
            self.launch("normalize", rows, THREADS / 32 * self.real());
        }
    }
}

/// Blocks along x.
fn grid(blocks: usize) -> u32 {
    blocks.try_into().expect("the operands of so many blocks fit in no memory")
}

impl LinearParams {
    fn set_value_tile(&mut self, columns: usize) {
        self.value_tile = columns as i32;
        self.value_tiles = (self.value_width as usize).div_ceil(columns) as i32;
        self.values_row = wide_row(columns) as i32;
    }
}

#[cfg(test)]
mod tests;
