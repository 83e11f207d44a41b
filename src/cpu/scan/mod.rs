//! Recurrences whose numbers do not mix: the diagonal scan, and the selective scan on it.
//!
//! A task takes some channels of a batch entry through all steps: steps wait for each other, channels do not.

mod columns;
mod diagonal;
mod selective;

pub use diagonal::{DiagonalScan, diagonal_scan, diagonal_scan_backward, first_gradient};
pub use selective::{SelectiveGradients, SelectiveOperands, SelectiveScan, selective_scan, selective_scan_backward};
