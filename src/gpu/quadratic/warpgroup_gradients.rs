//! Plans of the backward kernels for sm_90a (keys.sm90.cu and queries.sm90.cu of kernels/quadratic): which problems they are
//! for, and how.

use super::params::{QuadraticMappedGradientParams, QuadraticParams};
use super::warpgroups::{BARRIERS, ROWS, THREADS, is_plain, tensor_map};
use super::{QuadraticLayout, QuadraticSavedLayout};
use crate::gpu::plan::{Argument, DeviceFacts, Plan};
use crate::problem::{Quadratic, QuadraticShapes};

/// Sizes of an instance: columns of all operands, rows of a tile of the other side, and how many there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    width: usize,
    others: usize,
    stages: usize,
}

impl Tile {
    /// The narrowest instance of keys.sm90.cu that is wide enough.
    fn keys(shapes: &QuadraticShapes) -> Option<Self> {
        Self::of(shapes, Self { width: 64, others: 112, stages: 4 }, Self { width: 128, others: 64, stages: 4 })
    }

    /// The same of queries.sm90.cu.
    fn queries(shapes: &QuadraticShapes) -> Option<Self> {
        Self::of(shapes, Self { width: 64, others: 96, stages: 4 }, Self { width: 128, others: 96, stages: 3 })
    }

    fn of(shapes: &QuadraticShapes, narrow: Self, wide: Self) -> Option<Self> {
        match shapes.width.max(shapes.value_width) {
            1..=64 => Some(narrow),
            65..=128 => Some(wide),
            _ => None,
        }
    }

    /// Two matrices of the own side, and for each stage as many of the other side and two numbers for each row.
    fn shared_bytes(&self) -> usize {
        let Self { width, others, stages } = self;
        2 * 2 * width * (ROWS + stages * others) + stages * 2 * others * size_of::<f32>() + BARRIERS
    }
}

/// Adds the launches of dk and dv, and of dq, if there are kernels for the problem on the device; `params` has all that they
/// read, and the gradients.
pub(super) fn backward(
    plan: &mut Plan,
    problem: &Quadratic,
    layout: &QuadraticLayout,
    saved: &QuadraticSavedLayout,
    params: &QuadraticParams,
    facts: &DeviceFacts,
) -> Option<()> {
    let shapes = &problem.shapes;
    let is_aligned = layout.is_aligned && saved.is_aligned && !saved.wide_out;
    if !(is_plain(problem, layout) && facts.runs_sm90a && is_aligned) {
        return None;
    }
    let launch = |role: &str, tile: Tile, query_rows, key_rows, blocks: usize| {
        let query_map = |argument, strides, width| {
            tensor_map(argument, shapes, strides, [width, shapes.queries, shapes.heads, shapes.batch], query_rows)
        };
        let key_map = |argument, strides, width| {
            tensor_map(argument, shapes, strides, [width, shapes.keys, shapes.key_heads, shapes.batch], key_rows)
        };
        let params = QuadraticMappedGradientParams {
            problem: *params,
            q_map: query_map(Argument::Q, layout.q, shapes.width)?,
            k_map: key_map(Argument::K, layout.k, shapes.width)?,
            v_map: key_map(Argument::V, layout.v, shapes.value_width)?,
            d_out_map: query_map(Argument::DOut, saved.d_out, shapes.value_width)?,
        };
        let name = format!("quadratic_{role}_sm90_{}_{}", shapes.dtype, tile.width);
        Some((name, u32::try_from(blocks).ok()?, tile.shared_bytes() as u32, params))
    };
    let (keys, queries) = (Tile::keys(shapes)?, Tile::queries(shapes)?);
    let key_blocks = shapes.batch * shapes.key_heads * shapes.keys.div_ceil(ROWS);
    let query_blocks = shapes.batch * shapes.heads * shapes.queries.div_ceil(ROWS);
    let launches = [
        launch("keys", keys, keys.others, ROWS, key_blocks)?,
        launch("queries", queries, ROWS, queries.others, query_blocks)?,
    ];
    for (name, blocks, shared_bytes, params) in launches {
        plan.launch(name, [blocks, 1, 1], THREADS, shared_bytes, &params);
    }
    Some(())
}
