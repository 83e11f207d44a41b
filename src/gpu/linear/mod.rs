//! Plans of the linear engine; the kernels are those of kernels/linear.

mod backward;
mod memory;
mod params;
#[cfg(feature = "gpu")]
mod run;

pub use backward::{SavedLayout, plan_backward};
#[cfg(feature = "gpu")]
pub use run::{LinearGradients, LinearInputs, LinearOutputs, LinearSaved, backward, forward};

use super::params::{Field, Pointer, Type};
use super::plan::{Argument, DeviceFacts, Plan};
use crate::gau::GlobalNorm;
use crate::linear::FeatureMap;
use crate::performer::FavorMap;
use crate::problem::{DType, Decay, Linear, LinearFinish, LinearShapes, Map, Scan};
use crate::transnormer::NormScope;
use memory::{Memory, block_multiple, wide_row};
use params::{GatherParams, LinearParams, PIECES, Piece};

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
    vec![LinearParams::TYPE, GatherParams::TYPE]
}

/// Output, statistic and final state. Everything that is asked for is overwritten.
pub fn plan_forward(problem: &Linear, layout: &LinearLayout, outputs: ForwardOutputs, facts: &DeviceFacts) -> Plan {
    let mut planner = Planner::new(problem, layout, facts);
    let shapes = &problem.shapes;
    if shapes.batch == 0 || (shapes.queries == 0 && !outputs.state) {
        return planner.plan;
    }
    let params = &mut planner.params;
    params.is_out_wide = outputs.wide_out.into();
    params.out = Argument::Out.into();
    params.statistic = outputs.statistic.then_some(Argument::Statistic).into();
    if outputs.state {
        params.final_s = Argument::FinalS.into();
        params.final_z = Argument::FinalZ.into();
        params.final_stabilizer = problem.map.is_stabilized().then_some(Argument::FinalStabilizer).into();
    }
    planner.directions();
    planner.tile_values(&OUTPUTS);
    planner.cut(planner.blocks());
    if planner.params.segments > 1 {
        planner.entering_states();
    }
    planner.outputs();
    planner.plan
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
        self.shapes().batch * self.shapes().state_heads()
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
        let kernel = format!("linear_{kernel}_{}", self.shapes().dtype);
        let blocks = blocks.try_into().expect("the operands of so many blocks fit in no memory");
        self.plan.launch(kernel, [blocks, 1, 1], THREADS as u32, shared as u32, &self.params);
    }

    /// Adds a launch for every segment of every state head and value tile, with memory for `pieces`.
    fn launch_sweep(&mut self, kernel: &str, pieces: &[Piece]) {
        let blocks = self.blocks() * self.params.segments as usize;
        let memory = Memory::new(&self.params, pieces, self.real(), self.facts);
        self.params.pieces = memory.pieces;
        self.params.spill_bytes = memory.spilled as i64;
        let spill = (memory.spilled > 0).then(|| self.plan.workspace(memory.spilled * blocks));
        self.params.spill = spill.into();
        self.launch(kernel, blocks, memory.shared);
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
        let best = widths.into_iter().find(|&width| fills(width) && fits(width, limit / 2));
        let next = || widths.into_iter().find(|&width| fills(width) && fits(width, limit));
        let width = best.or_else(next).unwrap_or(TILE);
        self.params.set_value_tile(width);
    }

    /// Cuts the line of positions into segments, at ends of tiles and chunks, where `blocks` leave the device idle.
    fn cut(&mut self, blocks: usize) {
        let (positions, processors) = (self.params.positions as usize, self.facts.multiprocessors as usize);
        let pieces = if blocks >= processors { 1 } else { (2 * processors).div_ceil(blocks) };
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

    /// The sums of the segments, and from them what enters each.
    fn entering_states(&mut self) {
        let slots = self.state_heads() * (self.params.segments as usize + 1);
        (self.params.segment_s, self.params.segment_z) = self.segment_sums();
        self.params.segment_stabilizer = self.workspace(slots);
        self.params.entering_stabilizer = self.workspace(slots);
        self.params.segment_log_decay = self.plan.workspace(slots * size_of::<f64>()).into();
        self.launch_sweep("states", &STATES);
        self.launch("scan", self.scan_blocks(), 0);
    }

    fn outputs(&mut self) {
        let finish = self.params.finish;
        let is_joint = finish == Finish::RmsNormAllHeads as i32;
        let is_raw = is_joint || (finish == Finish::RmsNorm as i32 && self.params.value_tiles > 1);
        if !is_raw {
            return self.launch_sweep("outputs", &OUTPUTS);
        }
        self.params.raw = self.workspace(self.problem.output_len());
        self.params.finish = Finish::Raw as i32;
        self.launch_sweep("outputs", &OUTPUTS);
        self.params.finish = finish;
        let shapes = self.shapes();
        let rows = shapes.batch * shapes.queries * if is_joint { 1 } else { shapes.heads() };
        if rows > 0 {
            self.launch("normalize", rows, THREADS / 32 * self.real());
        }
    }
}

/// As on the device.
#[derive(Clone, Copy)]
enum Finish {
    None,
    Normalize,
    RmsNorm,
    RmsNormAllHeads,
    ChunkNorm,
    Raw,
}

fn finish_of(finish: LinearFinish) -> (Finish, f64) {
    match finish {
        LinearFinish::None => (Finish::None, 0.0),
        LinearFinish::Normalize { epsilon } => (Finish::Normalize, epsilon),
        LinearFinish::RmsNorm { epsilon, scope: NormScope::Head } => (Finish::RmsNorm, epsilon),
        LinearFinish::RmsNorm { epsilon, scope: NormScope::AllHeads } => (Finish::RmsNormAllHeads, epsilon),
        LinearFinish::ChunkNorm { .. } => (Finish::ChunkNorm, 0.0),
    }
}

fn map_of(map: Map) -> (i32, usize) {
    match map {
        Map::Plain(map) => {
            let index = match map {
                FeatureMap::Identity => 0,
                FeatureMap::EluPlusOne => 1,
                FeatureMap::Relu => 2,
                FeatureMap::ReluSquared => 3,
                FeatureMap::Silu => 4,
                FeatureMap::Exp => 5,
                FeatureMap::Softmax => 6,
                FeatureMap::Taylor => 7,
                FeatureMap::Cosine => 8,
            };
            (index, 0)
        }
        Map::Favor { map, directions } => {
            let index = match map {
                FavorMap::Positive => 9,
                FavorMap::Hyperbolic => 10,
                FavorMap::Relu => 11,
            };
            (index, directions)
        }
    }
}

/// Sizes beyond what a line of positions can have stand for "no end".
fn to_i64(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX).min(1 << 62)
}

/// The chunk norm's constant scale; or chunk and offset where it depends on the position.
fn chunk_norm(problem: &Linear, position: usize) -> (f64, i64, i64) {
    let LinearFinish::ChunkNorm { norm, chunk } = problem.finish else { return (1.0, 0, 0) };
    let inverse = |tokens: usize| if tokens == 0 { 0.0 } else { 1.0 / tokens as f64 };
    match norm {
        GlobalNorm::Mean if problem.scan != Scan::Full => (0.0, to_i64(chunk), to_i64(position)),
        GlobalNorm::Chunk => (inverse(chunk), 0, 0),
        GlobalNorm::Mean | GlobalNorm::Length => (inverse(problem.shapes.keys), 0, 0),
    }
}

/// The parameters that follow from the problem and its operands alone.
fn describe(problem: &Linear, layout: &LinearLayout) -> LinearParams {
    let shapes = &problem.shapes;
    let positions = shapes.queries.max(shapes.keys);
    let is_full = problem.scan == Scan::Full;
    let before = |count: usize| if is_full { 0 } else { to_i64(positions - count) };
    let ((map, directions), (finish, epsilon)) = (map_of(problem.map), finish_of(problem.finish));
    let (norm_factor, norm_chunk, norm_before) = chunk_norm(problem, layout.state.map_or(0, |state| state.position));
    let given = |is_given: bool, argument| Pointer::from(is_given.then_some(argument));
    let state = layout.state.is_some();
    let features = problem.feature_width();
    let no_strides = params::Strides::from([0; 3]);
    let pair = |strides: Option<[i64; 2]>| params::Strides::from(strides.map_or([0; 3], |[b, h]| [b, h, 0]));
    let none = Pointer::default();
    LinearParams {
        q: Argument::Q.into(),
        k: Argument::K.into(),
        v: Argument::V.into(),
        key_mask: given(layout.key_mask.is_some(), Argument::KeyMask),
        log_decay: given(shapes.decay != Decay::None, Argument::LogDecay),
        omega: given(directions > 0, Argument::Omega),
        state_s: given(state, Argument::StateS),
        state_z: given(state, Argument::StateZ),
        state_stabilizer: given(state && problem.map.is_stabilized(), Argument::StateStabilizer),
        d_out: none,
        out: none,
        statistic: none,
        final_s: none,
        final_z: none,
        final_stabilizer: none,
        d_q: none,
        d_k: none,
        d_v: none,
        d_log_decay: none,
        directions: none,
        raw: none,
        deltas: none,
        segment_s: none,
        segment_z: none,
        segment_stabilizer: none,
        entering_stabilizer: none,
        segment_log_decay: none,
        segment_d_s: none,
        segment_d_z: none,
        tile_stabilizers: none,
        d_log: none,
        spill: none,
        q_strides: layout.q.into(),
        k_strides: layout.k.into(),
        v_strides: layout.v.into(),
        out_strides: no_strides,
        d_out_strides: no_strides,
        state_s_strides: layout.state.map_or(no_strides, |state| state.s.into()),
        state_z_strides: pair(layout.state.map(|state| state.z)),
        state_stabilizer_strides: pair(layout.state.map(|state| state.stabilizer)),
        log_decay_strides: layout.log_decay.into(),
        statistic_strides: no_strides,
        key_mask_stride: layout.key_mask.unwrap_or(0),
        omega_stride: layout.omega,
        batch: to_i64(shapes.batch),
        heads: to_i64(shapes.heads()),
        query_heads: to_i64(shapes.query_heads),
        key_heads: to_i64(shapes.key_heads),
        value_heads: to_i64(shapes.value_heads),
        state_heads: to_i64(shapes.state_heads()),
        queries: to_i64(shapes.queries),
        keys: to_i64(shapes.keys),
        positions: to_i64(positions),
        first_query: before(shapes.queries),
        first_key: before(shapes.keys),
        chunk: if let Scan::ChunkExclusive { chunk } = problem.scan { to_i64(chunk) } else { 0 },
        segments: 1,
        segment_length: to_i64(positions),
        spill_bytes: 0,
        pieces: [0; PIECES],
        epsilon,
        norm_factor,
        norm_chunk,
        norm_before,
        width: shapes.width as i32,
        features: features as i32,
        value_width: shapes.value_width as i32,
        directions_count: directions as i32,
        width_padded: block_multiple(shapes.width) as i32,
        features_padded: block_multiple(features) as i32,
        value_tile: 0,
        value_tiles: 1,
        width_row: wide_row(block_multiple(shapes.width)) as i32,
        features_row: wide_row(block_multiple(features)) as i32,
        values_row: 0,
        weights_row: wide_row(TILE) as i32,
        map,
        scan: match problem.scan {
            Scan::Full => 0,
            Scan::Causal => 1,
            Scan::ChunkExclusive { .. } => 2,
        },
        decay: match shapes.decay {
            Decay::None => 0,
            Decay::Head => 1,
            Decay::Token => 2,
        },
        finish: finish as i32,
        is_out_wide: (shapes.dtype == DType::F64 || shapes.dtype == DType::F32).into(),
        is_d_q_wide: 0,
        is_d_k_wide: 0,
        is_d_v_wide: 0,
    }
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
