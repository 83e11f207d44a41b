//! Plans of the kernels for sm_90a of FAVOR+ features (`kernels/linear/favor_*.sm90.cu`).

use super::params::LinearMappedParams;
use super::warpgroups::{BARRIERS, CHUNK, ROWS, STAGES, maps};
use super::{LinearLayout, Planner};
use crate::gpu::plan::TensorMap;
use crate::problem::{DType, Decay, LinearFinish, Map, Scan};

/// Bytes of `FavorScratch`.
const SCRATCH: usize = 4 * (256 + (4 + 1 + 4 + 1) * CHUNK + 2 + 8 + 2);
/// Two warpgroups of half of the features each, and one whose first warp copies.
const THREADS: u32 = 384;

/// An instance: the kernel that reads S, D and features of a block, filled up, and tiles of what keys add to S.
pub(super) struct Favor {
    reader: &'static str,
    width: usize,
    features: usize,
    key_terms: usize,
    /// Of q, k and v.
    maps: [TensorMap; 3],
}

impl Favor {
    /// The smallest instance that is large enough, if there is one for the problem.
    fn of(planner: &Planner<'_>, layout: &LinearLayout, hands_out_state: bool) -> Option<Self> {
        let (problem, shapes) = (planner.problem, planner.shapes());
        let is_performer = matches!(problem.map, Map::Favor { .. })
            && matches!(problem.finish, LinearFinish::Normalize { .. })
            && shapes.decay == Decay::None;
        if !(is_performer && shapes.width <= CHUNK && planner.takes_chunks(layout, hands_out_state)) {
            return None;
        }
        let reader = match problem.scan {
            Scan::Causal => "outputs",
            Scan::Full => "full",
            Scan::ChunkExclusive { .. } => return None,
        };
        let features = match problem.feature_width() {
            1..=128 => 128,
            129..=256 => 256,
            _ => return None,
        };
        // As exact as sums in f32, or rounded once.
        let key_terms = match (hands_out_state, shapes.dtype) {
            (true, DType::BF16) => 3,
            (true, _) => 2,
            (false, _) => 1,
        };
        let favor = Self { reader, width: CHUNK, features, key_terms, maps: maps(shapes, layout)? };
        (favor.shared_bytes(reader) <= planner.facts.shared_bytes_per_block as usize).then_some(favor)
    }

    /// As `FavorShared` on the device, of a kernel that reads the sums, or takes up keys, or both.
    fn shared_bytes(&self, kernel: &str) -> usize {
        let &Self { width, features, key_terms, .. } = self;
        let (reads, absorbs) = (kernel != "states", kernel != "full");
        let sides = usize::from(reads) + usize::from(absorbs);
        let stages = STAGES * CHUNK * (sides * width + if absorbs { CHUNK } else { 0 });
        let own = features * CHUNK + if reads { (features + CHUNK) * CHUNK } else { 0 };
        let small = SCRATCH + STAGES * (ROWS + BARRIERS);
        2 * (stages + own) + small.next_multiple_of(1024) + 2 * key_terms.max(2) * features * width
    }
}

impl Planner<'_> {
    /// The launches of a forward pass of FAVOR+ features, if there is a kernel for the problem that pays on the device.
    pub(super) fn favor_on_warpgroups(&mut self, layout: &LinearLayout, hands_out_state: bool) -> Option<()> {
        let favor = Favor::of(self, layout, hands_out_state)?;
        self.params.state_heads = self.params.heads;
        self.params.set_value_tile(CHUNK);
        let (blocks, processors) = (self.blocks(), self.facts.multiprocessors as usize);
        self.cut_into(if 3 * blocks >= 2 * processors { 1 } else { processors / blocks });
        if self.params.segments > 1 || self.problem.scan == Scan::Full {
            self.entering_states(|planner| planner.launch_favor("states", &favor));
        }
        self.launch_favor(favor.reader, &favor);
        Some(())
    }

    fn launch_favor(&mut self, kernel: &str, favor: &Favor) {
        let name = format!("linear_favor_{kernel}_sm90_{}_{}_{}", self.shapes().dtype, favor.width, favor.features);
        let [q_map, k_map, v_map] = favor.maps;
        let key_terms = favor.key_terms as i32;
        let mapped = |problem| LinearMappedParams { problem, q_map, k_map, v_map, key_terms };
        self.launch_mapped(name, THREADS, favor.shared_bytes(kernel), mapped);
    }
}
