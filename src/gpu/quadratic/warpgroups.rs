//! Plans of the kernels for sm_90a (`kernels/quadratic/*.sm90.cu`): which problems they are for, and how.

use super::params::{QuadraticMappedParams, QuadraticParams};
use super::{QuadraticLayout, QuadraticSavedLayout, has_norm, row_major};
use crate::gpu::plan::{Argument, DeviceFacts, Plan, TensorMap};
use crate::problem::{DType, Mask, Quadratic, QuadraticShapes, Weight};

/// Rows of a block's own side.
const ROWS: usize = 128;
const THREADS: u32 = 384;
/// Columns of a box, which are 128 bytes.
const PANEL: usize = 64;
/// Room for the mbarriers, behind the tiles.
const BARRIERS: usize = 128;
/// Bytes of the other side that stay in the L2 cache while several blocks read them, for each multiprocessor: two thirds
/// of the cache.
const SECTION_BYTES: usize = 256 << 10;
/// Keys by which the length of parts is counted.
const PART: usize = 64;
/// Of the factors of a row.
const FACTORS: usize = 4 * size_of::<f32>();

/// Sizes of an instance: own rows of a block, columns of queries and keys, and of values, rows of the other side's tiles,
/// and stages for these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    rows: usize,
    width: usize,
    values: usize,
    others: usize,
    stages: usize,
}

impl Tile {
    /// The narrowest instance of forward.sm90.cu that is wide enough; that for rectified weights takes as many tiles of
    /// values as there are.
    fn forward(problem: &Quadratic) -> Option<Self> {
        let shapes = &problem.shapes;
        let of = |width, others| Some(Self { rows: ROWS, width, values: width, others, stages: 2 });
        if problem.weight != Weight::Softmax {
            let tile = Self { rows: ROWS, width: 128, values: 256, others: 80, stages: 2 };
            return (shapes.width <= 128 && !(has_norm(problem) && shapes.value_width > 256)).then_some(tile);
        }
        match shapes.width.max(shapes.value_width) {
            0..=64 => of(64, 128),
            65..=128 if problem.mask == Mask::Full => of(128, 176),
            65..=128 => of(128, 128),
            129..=256 => of(256, 80),
            _ => None,
        }
    }

    /// Of keys.sm90.cu, and of queries.sm90.cu. Gradients of rectified weights have no room in f16, and where rows are
    /// divided by their norms the gradients of the sums are not those of the output.
    fn backward(problem: &Quadratic) -> Option<[Self; 2]> {
        let shapes = &problem.shapes;
        let of = |width, others: [[usize; 2]; 2]| {
            Some(others.map(|[others, stages]| Self { rows: ROWS, width, values: width, others, stages }))
        };
        let is_squared = problem.weight == Weight::ReluSquared && shapes.dtype == DType::BF16 && !has_norm(problem);
        match shapes.width.max(shapes.value_width) {
            0..=64 if problem.weight == Weight::Softmax => of(64, [[112, 4], [96, 4]]),
            0..=128 if problem.weight == Weight::Softmax || is_squared => of(128, [[64, 4], [96, 3]]),
            // Both warpgroups of a block of keys have the same ones.
            129..=256 if problem.weight == Weight::Softmax => {
                of(256, [[64, 2], [48, 2]]).map(|[keys, queries]| [Self { rows: ROWS / 2, ..keys }, queries])
            }
            _ => None,
        }
    }

    /// Bytes of 16-bit matrices: so many of `width` columns of the own side, and two of the other's in each stage.
    fn shared_bytes(&self, own: usize) -> usize {
        2 * (self.width * own * self.rows + self.stages * (self.width + self.values) * self.others) + BARRIERS
    }

    /// With the factors of the other side's rows.
    fn backward_bytes(&self) -> usize {
        self.shared_bytes(2) + self.stages * self.others * FACTORS
    }
}

/// A forward pass that forward.sm90.cu takes.
pub(super) struct Forward<'a> {
    warpgroups: Warpgroups<'a>,
    tile: Tile,
    mapped: QuadraticMappedParams,
    /// Of rows, over all heads and tiles of values.
    pub(super) blocks: usize,
    /// Of keys that a block sees.
    pub(super) tiles: usize,
}

impl Forward<'_> {
    /// Adds the launch, with what has been decided about parts of sums.
    pub(super) fn launch(&self, plan: &mut Plan, params: &QuadraticParams) {
        let mapped = QuadraticMappedParams { problem: *params, ..self.mapped };
        let grid = [self.blocks.min(self.warpgroups.facts.multiprocessors as usize), 1, params.splits as usize];
        self.warpgroups.launch(plan, "forward", self.tile, grid, self.tile.shared_bytes(1), &mapped);
    }
}

/// Launches of a problem that the kernels are for.
pub(super) struct Warpgroups<'a> {
    problem: &'a Quadratic,
    shapes: &'a QuadraticShapes,
    layout: &'a QuadraticLayout,
    facts: &'a DeviceFacts,
}

impl<'a> Warpgroups<'a> {
    /// None if the kernels are not for the problem, or not for the device.
    pub(super) fn of(problem: &'a Quadratic, layout: &'a QuadraticLayout, facts: &'a DeviceFacts) -> Option<Self> {
        let shapes = &problem.shapes;
        let is_softmax = problem.weight == Weight::Softmax;
        let is_plain = shapes.dtype.size() == 2
            && shapes.bias.is_none()
            && layout.key_mask.is_none()
            && problem.soft_cap.is_none()
            && (problem.scale > 0.0 || !is_softmax);
        let fits = is_plain && facts.runs_sm90a && layout.is_aligned;
        fits.then_some(Self { problem, shapes, layout, facts })
    }

    /// The forward pass, if the kernel takes it.
    pub(super) fn forward(self, params: &QuadraticParams) -> Option<Forward<'a>> {
        let shapes = self.shapes;
        let tile = Tile::forward(self.problem)?;
        let value_tiles = shapes.value_width.div_ceil(tile.values);
        let blocks = self.blocks(shapes.heads * value_tiles, shapes.queries, ROWS)?;
        let tiles = params.mask.span(ROWS, shapes.keys).div_ceil(PART);
        let mut mapped = self.mapped(params, ROWS, tile.others)?;
        mapped.section *= value_tiles as i32;
        Some(Forward { warpgroups: self, tile, mapped, blocks, tiles })
    }

    /// Adds the gradients of k and v, and of q, after the factors of the rows, if the kernels take them.
    pub(super) fn backward(
        &self,
        plan: &mut Plan,
        params: &QuadraticParams,
        saved: &QuadraticSavedLayout,
    ) -> Option<()> {
        let shapes = self.shapes;
        let [keys, queries] = Tile::backward(self.problem)?;
        if saved.wide_out || !saved.is_aligned {
            return None;
        }
        let d_out = |rows| self.query_map(Argument::DOut, saved.d_out, shapes.value_width, rows);
        let sizes = [4, shapes.queries, shapes.heads, shapes.batch];
        let factors = TensorMap::of(params.factors.0?, DType::F32, row_major(shapes, 4), sizes, [4, keys.others])?;
        let of_keys = QuadraticMappedParams {
            d_out_map: Some(d_out(keys.others)?),
            factors_map: Some(factors),
            section: self.key_heads_together(self.group() * shapes.queries) as i32,
            ..self.mapped(params, keys.others, keys.rows)?
        };
        let of_queries =
            QuadraticMappedParams { d_out_map: Some(d_out(ROWS)?), ..self.mapped(params, ROWS, queries.others)? };
        let key_blocks = self.blocks(shapes.key_heads, shapes.keys, keys.rows)?;
        let query_blocks = self.blocks(shapes.heads, shapes.queries, ROWS)?;
        self.launch(plan, "keys", keys, [key_blocks, 1, 1], keys.backward_bytes(), &of_keys);
        self.launch(plan, "queries", queries, [query_blocks, 1, 1], queries.backward_bytes(), &of_queries);
        Some(())
    }

    /// Query heads of a key head.
    fn group(&self) -> usize {
        self.shapes.heads / self.shapes.key_heads
    }

    /// Blocks of `size` out of so many rows of so many heads; none if they are too many to be counted.
    fn blocks(&self, heads: usize, rows: usize, size: usize) -> Option<usize> {
        let blocks = self.shapes.batch * heads * rows.div_ceil(size);
        (blocks <= i32::MAX as usize).then_some(blocks)
    }

    /// Key heads, over the batch, of which so many rows of the other side are read from the L2 cache together.
    fn key_heads_together(&self, rows: usize) -> usize {
        let shapes = self.shapes;
        let bytes = rows * (shapes.width + shapes.value_width) * shapes.dtype.size();
        let room = SECTION_BYTES * self.facts.multiprocessors as usize;
        (room / bytes.max(1)).clamp(1, shapes.batch * shapes.key_heads)
    }

    fn launch(
        &self,
        plan: &mut Plan,
        role: &str,
        tile: Tile,
        grid: [usize; 3],
        bytes: usize,
        params: &QuadraticMappedParams,
    ) {
        let family = if self.problem.weight == Weight::Softmax { "" } else { "relu_" };
        let name = format!("quadratic_{role}_sm90_{family}{}_{}_{}", self.shapes.dtype, tile.width, tile.others);
        plan.launch(name, grid.map(|blocks| blocks as u32), THREADS, bytes as u32, params);
    }

    /// Parameters with maps of q, k and v in tiles of so many rows; none if the copy engine cannot have them.
    fn mapped(&self, params: &QuadraticParams, of_queries: usize, of_keys: usize) -> Option<QuadraticMappedParams> {
        let Self { shapes, layout, .. } = self;
        let of_keys = |argument, strides, width| {
            let sizes = [width, shapes.keys, shapes.key_heads, shapes.batch];
            TensorMap::of(argument, shapes.dtype, strides, sizes, [PANEL, of_keys])
        };
        Some(QuadraticMappedParams {
            problem: *params,
            q_map: self.query_map(Argument::Q, layout.q, shapes.width, of_queries)?,
            k_map: of_keys(Argument::K, layout.k, shapes.width)?,
            v_map: of_keys(Argument::V, layout.v, shapes.value_width)?,
            d_out_map: None,
            factors_map: None,
            section: (self.key_heads_together(shapes.keys) * self.group()) as i32,
        })
    }

    fn query_map(&self, argument: Argument, strides: [i64; 3], width: usize, rows: usize) -> Option<TensorMap> {
        let shapes = self.shapes;
        let sizes = [width, shapes.queries, shapes.heads, shapes.batch];
        TensorMap::of(argument, shapes.dtype, strides, sizes, [PANEL, rows])
    }
}
