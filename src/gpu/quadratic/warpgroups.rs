//! Plans of the forward kernels for sm_90a (kernels/quadratic/forward.sm90.cu): which problems they are for, and how.

use super::params::{QuadraticMappedParams, QuadraticParams};
use super::{QuadraticLayout, splits};
use crate::gpu::plan::{Argument, DeviceFacts, Plan, TensorMap};
use crate::problem::{Mask, Quadratic, QuadraticShapes, Weight};

/// Rows of a block's own side.
pub(super) const ROWS: usize = 128;
pub(super) const THREADS: u32 = 384;
const STAGES: usize = 2;
/// Columns of a box, which are 128 bytes.
const PANEL: usize = 64;
/// Room for the mbarriers, behind the tiles.
pub(super) const BARRIERS: usize = 128;

/// Tile sizes of an instance: columns of all operands, rows of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    width: usize,
    keys: usize,
}

impl Tile {
    /// The narrowest instance that is wide enough.
    fn of(shapes: &QuadraticShapes, mask: Mask) -> Option<Self> {
        match shapes.width.max(shapes.value_width) {
            0 => None,
            1..=64 => Some(Self { width: 64, keys: 128 }),
            65..=128 if mask == Mask::Full => Some(Self { width: 128, keys: 176 }),
            65..=128 => Some(Self { width: 128, keys: 128 }),
            129..=256 => Some(Self { width: 256, keys: 80 }),
            _ => None,
        }
    }

    fn shared_bytes(&self) -> usize {
        2 * self.width * (ROWS + 2 * STAGES * self.keys) + BARRIERS
    }
}

/// Adds the launch, if there is a kernel for the problem that pays on the device.
pub(super) fn forward(
    plan: &mut Plan,
    problem: &Quadratic,
    layout: &QuadraticLayout,
    params: &QuadraticParams,
    facts: &DeviceFacts,
) -> Option<()> {
    let shapes = &problem.shapes;
    if !(is_plain(problem, layout) && problem.scale > 0.0 && facts.runs_sm90a && layout.is_aligned) {
        return None;
    }
    let tile = Tile::of(shapes, problem.mask)?;
    let blocks = shapes.batch * shapes.heads * shapes.queries.div_ceil(ROWS);
    let tiles = params.mask.span(ROWS, shapes.keys).div_ceil(tile.keys);
    if splits(blocks, tiles, facts) > 1 {
        return None;
    }
    let map = |argument, strides, [heads, rows, width]: [usize; 3], block_rows| {
        tensor_map(argument, shapes, strides, [width, rows, heads, shapes.batch], block_rows)
    };
    let params = QuadraticMappedParams {
        problem: *params,
        q_map: map(Argument::Q, layout.q, [shapes.heads, shapes.queries, shapes.width], ROWS)?,
        k_map: map(Argument::K, layout.k, [shapes.key_heads, shapes.keys, shapes.width], tile.keys)?,
        v_map: map(Argument::V, layout.v, [shapes.key_heads, shapes.keys, shapes.value_width], tile.keys)?,
    };
    let name = format!("quadratic_forward_sm90_{}_{}_{}", shapes.dtype, tile.width, tile.keys);
    let blocks = u32::try_from(blocks).ok()?;
    plan.launch(name, [blocks, 1, 1], THREADS, tile.shared_bytes() as u32, &params);
    Some(())
}

/// Softmax of scores without extras, in 16 bits.
pub(super) fn is_plain(problem: &Quadratic, layout: &QuadraticLayout) -> bool {
    problem.weight == Weight::Softmax
        && problem.shapes.dtype.size() == 2
        && problem.shapes.bias.is_none()
        && layout.key_mask.is_none()
        && problem.soft_cap.is_none()
}

/// Of an operand with strides in elements along batch, head and row; none if the copy engine cannot have it.
pub(super) fn tensor_map(
    argument: Argument,
    shapes: &QuadraticShapes,
    [batch, head, row]: [i64; 3],
    sizes: [usize; 4],
    block_rows: usize,
) -> Option<TensorMap> {
    let bytes = |elements: i64| u64::try_from(elements).ok().map(|elements| elements * shapes.dtype.size() as u64);
    let mut strides = [bytes(row)?, bytes(head)?, bytes(batch)?];
    let whole_row = (sizes[0] * shapes.dtype.size()).next_multiple_of(16) as u64;
    for (stride, &size) in strides.iter_mut().zip(&sizes[1..]) {
        if size == 1 {
            *stride = whole_row;
        }
    }
    let map = TensorMap {
        argument,
        dtype: shapes.dtype,
        sizes: sizes.map(|size| size as u64),
        strides,
        block: [PANEL as u32, block_rows as u32, 1, 1],
        is_swizzled: true,
    };
    map.is_possible().then_some(map)
}
