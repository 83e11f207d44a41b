//! The parameters of the kernels of the quadratic engine, as in kernels/quadratic/params.cuh.

use crate::gpu::params::{Pointer, Strides};
use crate::gpu::plan::TensorMap;
use crate::kernel_params;
use crate::problem;

kernel_params! {
    /// Keys around a query's position.
    pub(super) struct Mask {
        pub(super) left: i64,
        pub(super) right: i64,
        pub(super) block: i64,
    }
}

/// Beyond any length, and small enough to be added to positions.
const UNLIMITED: i64 = i64::MAX / 4;

impl From<problem::Mask> for Mask {
    fn from(mask: problem::Mask) -> Self {
        let count = |count: usize| i64::try_from(count).unwrap_or(UNLIMITED).min(UNLIMITED);
        let (left, right, block) = match mask {
            problem::Mask::Full => (UNLIMITED, UNLIMITED, 0),
            problem::Mask::Causal => (UNLIMITED, 0, 0),
            problem::Mask::Window { left, right } => (left.map_or(UNLIMITED, count), right.map_or(UNLIMITED, count), 0),
            problem::Mask::Blocks { size, causal } => (UNLIMITED, if causal { 0 } else { UNLIMITED }, count(size)),
            // No range around the query: refused before a launch.
            problem::Mask::Streaming { .. }
            | problem::Mask::Prefix { .. }
            | problem::Mask::Strided { .. }
            | problem::Mask::Fixed { .. }
            | problem::Mask::Dilated { .. } => (UNLIMITED, UNLIMITED, 0),
        };
        Self { left, right, block }
    }
}

impl Mask {
    /// An upper bound of the keys that `rows` neighbouring queries see together.
    pub(super) fn span(&self, rows: usize, keys: usize) -> usize {
        let window = self.left.saturating_add(self.right).saturating_add(1);
        let block = if self.block == 0 { UNLIMITED } else { self.block };
        let own = window.min(block.saturating_mul(2)).saturating_add(rows as i64);
        usize::try_from(own).unwrap_or(usize::MAX).min(keys)
    }
}

kernel_params! {
    /// Parameters of every kernel of the engine.
    pub(super) struct QuadraticParams {
        pub(super) q: Pointer,
        pub(super) k: Pointer,
        pub(super) v: Pointer,
        pub(super) key_mask: Pointer,
        pub(super) bias: Pointer,
        pub(super) d_statistic: Pointer,
        pub(super) out: Pointer,
        pub(super) d_out: Pointer,
        pub(super) statistic: Pointer,
        pub(super) d_q: Pointer,
        pub(super) d_k: Pointer,
        pub(super) d_v: Pointer,
        pub(super) d_bias: Pointer,
        pub(super) partial_sums: Pointer,
        pub(super) partial_weights: Pointer,
        pub(super) factors: Pointer,
        pub(super) partial_bias: Pointer,
        pub(super) first_distance: Pointer,
        pub(super) bias_sums: Pointer,
        pub(super) inverse_counts: Pointer,
        pub(super) q_strides: Strides,
        pub(super) k_strides: Strides,
        pub(super) v_strides: Strides,
        pub(super) out_strides: Strides,
        pub(super) d_out_strides: Strides,
        pub(super) statistic_strides: Strides,
        pub(super) d_statistic_strides: Strides,
        pub(super) key_mask_stride: i64,
        pub(super) bias_stride: i64,
        pub(super) batch: i64,
        pub(super) heads: i64,
        pub(super) key_heads: i64,
        pub(super) queries: i64,
        pub(super) keys: i64,
        pub(super) bias_radius: i64,
        pub(super) bias_span: i64,
        pub(super) first_block: i64,
        pub(super) blocks: i64,
        pub(super) mask: Mask,
        pub(super) scale: f64,
        pub(super) soft_cap: f64,
        pub(super) cap_scale: f64,
        pub(super) constant: f64,
        pub(super) width: i32,
        pub(super) value_width: i32,
        pub(super) weight: i32,
        pub(super) finish: i32,
        pub(super) is_out_wide: i32,
        pub(super) splits: i32,
        pub(super) has_partial_sums: i32,
        pub(super) is_resident: i32,
        pub(super) stages: i32,
        pub(super) bias_heads: i32,
        pub(super) per_key: i32,
    }
}

kernel_params! {
    /// Parameters of the kernels with tensor copies.
    pub(super) struct QuadraticMappedParams {
        pub(super) problem: QuadraticParams,
        pub(super) q_map: TensorMap,
        pub(super) k_map: TensorMap,
        pub(super) v_map: TensorMap,
        pub(super) d_out_map: Option<TensorMap>,
        pub(super) factors_map: Option<TensorMap>,
        pub(super) section: i32,
    }
}
