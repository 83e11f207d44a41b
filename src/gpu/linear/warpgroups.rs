//! Plans of the kernels for sm_90a (kernels/linear/*.sm90.cu): which problems they are for, and how.

use super::params::{LinearMappedParams, LinearParams};
use super::{LinearLayout, Planner, grid};
use crate::gpu::params::Field;
use crate::gpu::plan::{Argument, TensorMap};
use crate::linear::FeatureMap;
use crate::problem::{DType, Decay, LinearFinish, LinearShapes, Map, Scan};

/// Positions of a chunk, and columns of a warpgroup and of a box, which are 128 bytes.
pub(super) const CHUNK: usize = 64;
pub(super) const STAGES: usize = 2;
/// Bytes of `ChunkScratch`, of `ChunkRows` and of the mbarriers of a stage.
const SCRATCH: usize = 4 * (1024 + CHUNK + 2 * CHUNK + 8);
pub(super) const ROWS: usize = 4 * (6 * CHUNK + 2);
pub(super) const BARRIERS: usize = 16;

/// An instance: D′ and value columns of a block, and tiles of what keys add to S.
pub(super) struct Chunks {
    /// The kernel that reads S.
    reader: &'static str,
    width: usize,
    columns: usize,
    key_terms: usize,
    /// Of q, k and v.
    pub(super) maps: [TensorMap; 3],
}

impl Chunks {
    /// The narrowest instance that is wide enough, if there is one for the problem.
    pub(super) fn of(planner: &Planner<'_>, layout: &LinearLayout, hands_out_state: bool) -> Option<Self> {
        let shapes = planner.shapes();
        let Map::Plain(map) = planner.problem.map else { return None };
        let reader = match planner.problem.scan {
            Scan::Causal => "outputs",
            Scan::Full => "full",
            Scan::ChunkExclusive { chunk } if chunk % CHUNK == 0 && shapes.width <= 2 * CHUNK => "exclusive",
            Scan::ChunkExclusive { .. } => return None,
        };
        let is_flash = map == FeatureMap::Identity
            && matches!(planner.problem.finish, LinearFinish::None | LinearFinish::ChunkNorm { .. });
        let is_for = if reader == "exclusive" { is_flash } else { maps_in_place(map, shapes.dtype) };
        if !(is_for && planner.takes_chunks(layout, hands_out_state)) {
            return None;
        }
        let width = match shapes.width {
            1..=64 => 64,
            65..=128 => 128,
            129..=256 => 256,
            _ => return None,
        };
        let is_narrow = shapes.value_width <= CHUNK && reader != "exclusive";
        let columns = if width > 128 || is_narrow { CHUNK } else { 2 * CHUNK };
        let is_exact = matches!(map, FeatureMap::Identity | FeatureMap::Relu) && shapes.decay == Decay::None;
        let key_terms = match (hands_out_state, shapes.dtype) {
            _ if is_exact => 0,
            // As exact as sums in f32.
            (true, DType::BF16) => 3,
            (true, _) => 2,
            (false, _) => usize::from(shapes.decay != Decay::None),
        };
        let chunks = Self { reader, width, columns, key_terms, maps: maps(shapes, layout)? };
        (chunks.shared_bytes(reader) <= planner.facts.shared_bytes_per_block as usize).then_some(chunks)
    }

    fn threads(&self) -> u32 {
        // A warp that copies, or a warpgroup, which gives its registers away.
        if self.columns == CHUNK { 160 } else { 384 }
    }

    /// Segments for a device with so many multiprocessors. They make k and v be read twice, half as much traffic again, so
    /// a third of the device may rather stay idle; all blocks run at once.
    fn pieces(&self, blocks: usize, processors: usize) -> usize {
        let slots = if (self.width, self.columns) == (CHUNK, CHUNK) { 2 * processors } else { processors };
        if 3 * blocks >= 2 * slots { 1 } else { slots / blocks }
    }

    /// As `ChunkShared` on the device, of a kernel that reads the sums, or takes up keys, or both.
    fn shared_bytes(&self, kernel: &str) -> usize {
        let &Self { width, columns, key_terms, .. } = self;
        let (reads, absorbs) = (kernel != "states", kernel != "full");
        let sides = usize::from(reads) + usize::from(absorbs);
        let stages = STAGES * CHUNK * (sides * width + if absorbs { columns } else { 0 });
        let own = if reads { columns / CHUNK * (width + CHUNK) * CHUNK } else { 0 };
        let key_terms = if absorbs { key_terms } else { 0 };
        let small = SCRATCH + STAGES * (ROWS + BARRIERS);
        (2 * (stages + own) + small).next_multiple_of(1024) + 2 * key_terms * CHUNK * width
    }
}

/// Whether features take the place of what they are of, elements of this type.
fn maps_in_place(map: FeatureMap, dtype: DType) -> bool {
    match map {
        FeatureMap::Identity | FeatureMap::EluPlusOne | FeatureMap::Relu | FeatureMap::Silu => true,
        // Beyond the range of f16.
        FeatureMap::ReluSquared | FeatureMap::Exp => dtype == DType::BF16,
        FeatureMap::Softmax | FeatureMap::Taylor | FeatureMap::Cosine => false,
    }
}

impl Planner<'_> {
    /// Whether the kernels of chunks are for the problem, its map aside. They know one output head for each state head;
    /// where nobody sees the state, each output head may have one of its own.
    pub(super) fn takes_chunks(&self, layout: &LinearLayout, hands_out_state: bool) -> bool {
        let shapes = self.shapes();
        let has_own_state = shapes.decay == Decay::None && layout.state.is_none() && !hands_out_state;
        self.facts.runs_sm90a
            && layout.is_aligned
            && shapes.dtype.size() == 2
            && (shapes.heads() == shapes.state_heads() || has_own_state)
            && shapes.queries.min(shapes.keys) > 0
            && shapes.queries.max(shapes.keys) >= CHUNK
    }

    /// The launches of a forward pass, if there is a kernel for the problem that pays on the device.
    pub(super) fn on_warpgroups(&mut self, layout: &LinearLayout, hands_out_state: bool) -> Option<()> {
        let chunks = Chunks::of(self, layout, hands_out_state)?;
        self.params.state_heads = self.params.heads;
        self.params.set_value_tile(chunks.columns);
        self.cut_into(chunks.pieces(self.blocks(), self.facts.multiprocessors as usize));
        if self.params.segments > 1 || self.problem.scan == Scan::Full {
            self.entering_chunks(&chunks);
        }
        self.outputs(|planner| planner.launch_chunks(chunks.reader, &chunks));
        Some(())
    }

    /// The sums of the segments that the positions are cut into, and from them what enters each.
    pub(super) fn entering_chunks(&mut self, chunks: &Chunks) {
        self.params.set_value_tile(chunks.columns);
        self.entering_states(|planner| planner.launch_chunks("states", chunks));
    }

    fn launch_chunks(&mut self, kernel: &str, chunks: &Chunks) {
        let name = format!("linear_{kernel}_sm90_{}_{}_{}", self.shapes().dtype, chunks.width, chunks.columns);
        let [q_map, k_map, v_map] = chunks.maps;
        let key_terms = chunks.key_terms as i32;
        let mapped = |problem| LinearMappedParams { problem, q_map, k_map, v_map, key_terms };
        self.launch_mapped(name, chunks.threads(), chunks.shared_bytes(kernel), mapped);
    }

    /// Adds a launch for every segment of every state head and value tile, with the current parameters and tensor maps.
    pub(super) fn launch_mapped<P: Field>(
        &mut self,
        name: String,
        threads: u32,
        shared: usize,
        params: impl FnOnce(LinearParams) -> P,
    ) {
        let blocks = self.blocks() * self.params.segments as usize;
        self.plan.launch(name, [grid(blocks), 1, 1], threads, shared as u32, &params(self.params));
    }
}

/// Of q, k and v, if the copy engine can have them.
pub(super) fn maps(shapes: &LinearShapes, layout: &LinearLayout) -> Option<[TensorMap; 3]> {
    let map = |argument, strides, [heads, rows, width]: [usize; 3]| {
        TensorMap::of(argument, shapes.dtype, strides, [width, rows, heads, shapes.batch], [CHUNK; 2])
    };
    Some([
        map(Argument::Q, layout.q, [shapes.query_heads, shapes.queries, shapes.width])?,
        map(Argument::K, layout.k, [shapes.key_heads, shapes.keys, shapes.width])?,
        map(Argument::V, layout.v, [shapes.value_heads, shapes.keys, shapes.value_width])?,
    ])
}
