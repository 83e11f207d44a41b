//! The parameters of the kernels of the linear engine, as in kernels/linear/params.cuh.

use crate::gpu::params::{Pointer, Strides};
use crate::gpu::plan::TensorMap;
use crate::kernel_params;

/// Pieces of a block's memory, by their index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    Rows,
    Weights,
    Pairs,
    QueryPhi,
    KeyPhi,
    X,
    Values,
    Sums,
    DPhi,
    DValues,
    Z,
    S,
}

pub(super) const PIECES: usize = Piece::S as usize + 1;

kernel_params! {
    /// Parameters of every kernel of the engine.
    pub(super) struct LinearParams {
        pub(super) q: Pointer,
        pub(super) k: Pointer,
        pub(super) v: Pointer,
        pub(super) key_mask: Pointer,
        pub(super) log_decay: Pointer,
        pub(super) omega: Pointer,
        pub(super) state_s: Pointer,
        pub(super) state_z: Pointer,
        pub(super) state_stabilizer: Pointer,
        pub(super) d_out: Pointer,
        pub(super) out: Pointer,
        pub(super) statistic: Pointer,
        pub(super) final_s: Pointer,
        pub(super) final_z: Pointer,
        pub(super) final_stabilizer: Pointer,
        pub(super) d_q: Pointer,
        pub(super) d_k: Pointer,
        pub(super) d_v: Pointer,
        pub(super) d_log_decay: Pointer,
        pub(super) directions: Pointer,
        pub(super) raw: Pointer,
        pub(super) deltas: Pointer,
        pub(super) d_sums: Pointer,
        pub(super) segment_s: Pointer,
        pub(super) segment_z: Pointer,
        pub(super) segment_stabilizer: Pointer,
        pub(super) entering_stabilizer: Pointer,
        pub(super) segment_log_decay: Pointer,
        pub(super) segment_d_s: Pointer,
        pub(super) segment_d_z: Pointer,
        pub(super) tile_stabilizers: Pointer,
        pub(super) d_log: Pointer,
        pub(super) crossing: Pointer,
        pub(super) inverse_counts: Pointer,
        pub(super) spill: Pointer,
        pub(super) q_strides: Strides,
        pub(super) k_strides: Strides,
        pub(super) v_strides: Strides,
        pub(super) out_strides: Strides,
        pub(super) d_out_strides: Strides,
        pub(super) state_s_strides: Strides,
        pub(super) state_z_strides: Strides,
        pub(super) state_stabilizer_strides: Strides,
        pub(super) log_decay_strides: Strides,
        pub(super) statistic_strides: Strides,
        pub(super) key_mask_stride: i64,
        pub(super) omega_stride: i64,
        pub(super) batch: i64,
        pub(super) heads: i64,
        pub(super) query_heads: i64,
        pub(super) key_heads: i64,
        pub(super) value_heads: i64,
        pub(super) state_heads: i64,
        pub(super) queries: i64,
        pub(super) keys: i64,
        pub(super) positions: i64,
        pub(super) first_query: i64,
        pub(super) first_key: i64,
        pub(super) chunk: i64,
        pub(super) segments: i64,
        pub(super) segment_length: i64,
        pub(super) spill_bytes: i64,
        pub(super) pieces: [i64; PIECES],
        pub(super) epsilon: f64,
        pub(super) norm_factor: f64,
        pub(super) norm_chunk: i64,
        pub(super) norm_before: i64,
        pub(super) width: i32,
        pub(super) features: i32,
        pub(super) value_width: i32,
        pub(super) directions_count: i32,
        pub(super) width_padded: i32,
        pub(super) features_padded: i32,
        pub(super) value_tile: i32,
        pub(super) value_tiles: i32,
        pub(super) width_row: i32,
        pub(super) features_row: i32,
        pub(super) values_row: i32,
        pub(super) weights_row: i32,
        pub(super) map: i32,
        pub(super) scan: i32,
        pub(super) decay: i32,
        pub(super) finish: i32,
        pub(super) is_out_wide: i32,
        pub(super) is_d_q_wide: i32,
        pub(super) is_d_k_wide: i32,
        pub(super) is_d_v_wide: i32,
    }
}

kernel_params! {
    /// Parameters of the kernels with tensor copies, as in kernels/linear/params.sm90.cuh.
    pub(super) struct LinearMappedParams {
        pub(super) problem: LinearParams,
        pub(super) q_map: TensorMap,
        pub(super) k_map: TensorMap,
        pub(super) v_map: TensorMap,
        pub(super) key_terms: i32,
    }
}

kernel_params! {
    /// Parameters of the kernels of the backward pass with tensor copies, as in kernels/linear/params.sm90.cuh.
    pub(super) struct LinearSweepParams {
        pub(super) problem: LinearParams,
        pub(super) q_map: TensorMap,
        pub(super) k_map: TensorMap,
        pub(super) v_map: TensorMap,
        pub(super) d_sums_map: TensorMap,
        pub(super) has_term: i32,
        pub(super) has_own: i32,
    }
}

kernel_params! {
    /// Sums of the gradients of heads that share an operand, as in kernels/linear/gather.cu.
    pub(super) struct GatherParams {
        pub(super) parts: Pointer,
        pub(super) out: Pointer,
        pub(super) groups: i64,
        pub(super) parts_per_group: i64,
        pub(super) count: i64,
    }
}
