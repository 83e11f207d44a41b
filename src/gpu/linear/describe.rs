//! The parameters that every launch of a pass shares.

use super::memory::{block_multiple, wide_row};
use super::params::{LinearParams, PIECES};
use super::{LinearLayout, TILE};
use crate::gau::GlobalNorm;
use crate::gpu::params::{Pointer, Strides};
use crate::gpu::plan::Argument;
use crate::linear::FeatureMap;
use crate::performer::FavorMap;
use crate::problem::{DType, Decay, Linear, LinearFinish, Map, Scan};
use crate::transnormer::NormScope;

/// As on the device.
#[derive(Clone, Copy)]
pub enum Finish {
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
pub fn to_i64(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX).min(1 << 62)
}

/// Whether outputs are divided by the number of keys.
pub fn counts_keys(problem: &Linear) -> bool {
    let LinearFinish::ChunkNorm { norm, .. } = problem.finish else { return false };
    norm == GlobalNorm::Length || (norm == GlobalNorm::Mean && problem.scan == Scan::Full)
}

/// The chunk norm's constant scale, without a key mask; or chunk and offset where it depends on the position.
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
pub fn describe(problem: &Linear, layout: &LinearLayout) -> LinearParams {
    let shapes = &problem.shapes;
    let positions = shapes.queries.max(shapes.keys);
    let is_full = problem.scan == Scan::Full;
    let before = |count: usize| if is_full { 0 } else { to_i64(positions - count) };
    let ((map, directions), (finish, epsilon)) = (map_of(problem.map), finish_of(problem.finish));
    let (norm_factor, norm_chunk, norm_before) = chunk_norm(problem, layout.state.map_or(0, |state| state.position));
    let given = |is_given: bool, argument| Pointer::from(is_given.then_some(argument));
    let state = layout.state.is_some();
    let features = problem.feature_width();
    let no_strides = Strides::from([0; 3]);
    let pair = |strides: Option<[i64; 2]>| Strides::from(strides.map_or([0; 3], |[b, h]| [b, h, 0]));
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
        d_sums: none,
        segment_s: none,
        segment_z: none,
        segment_stabilizer: none,
        entering_stabilizer: none,
        segment_log_decay: none,
        segment_d_s: none,
        segment_d_z: none,
        tile_stabilizers: none,
        d_log: none,
        crossing: none,
        inverse_counts: none,
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
