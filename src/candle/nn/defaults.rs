//! What a configuration of a mechanism leaves out.

use std::f64::consts::TAU;

use crate::gau::GauNorm;
use crate::random_features::FeatureKind;
use crate::transnormer::DiagWeight;

pub(super) fn features() -> usize {
    256
}

pub(super) fn feature_kind() -> FeatureKind {
    FeatureKind::Orthogonal
}

pub(super) fn epsilon() -> f64 {
    1e-6
}

pub(super) fn norm_epsilon() -> f64 {
    1e-5
}

pub(super) fn low_rank() -> usize {
    16
}

pub(super) fn gate_divisor() -> f64 {
    16.0
}

pub(super) fn states() -> usize {
    16
}

pub(super) fn group_epsilon() -> f64 {
    64e-5
}

/// Half of the 64 of S4D's program.
pub(super) fn complex_states() -> usize {
    32
}

pub(super) fn radii() -> [f64; 2] {
    [0.0, 1.0]
}

pub(super) fn phase() -> f64 {
    TAU
}

pub(super) fn taps() -> usize {
    4
}

pub(super) fn block() -> usize {
    64
}

pub(super) fn diag_weight() -> DiagWeight {
    DiagWeight::Softmax
}

pub(super) fn key_width() -> usize {
    128
}

pub(super) fn expansion() -> usize {
    2
}

pub(super) fn reach() -> Option<usize> {
    Some(128)
}

pub(super) fn chunk() -> usize {
    256
}

pub(super) fn gau_norm() -> GauNorm {
    GauNorm::RowSum { epsilon: 1e-6 }
}
