//! Plans of the kernel for a token (kernels/linear/step.cu).

use super::{MOST_COLUMNS, Planner, TILE, block_multiple};
use crate::problem::{LinearFinish, Scan};
use crate::transnormer::NormScope;

const THREADS: usize = 256;
/// Bytes of the sums of a thread.
const VECTOR: usize = 16;

impl Planner<'_> {
    /// The launch for a single token of the causal scan, if it is one.
    pub(super) fn token(&mut self) -> Option<()> {
        let shapes = self.shapes();
        if self.problem.scan != Scan::Causal || (shapes.queries, shapes.keys) != (1, 1) {
            return None;
        }
        let numbers = 3 * self.params.features_padded + 2 * self.params.width_padded + 1;
        let shared = numbers as usize * self.real() + THREADS * VECTOR;
        if shared > self.facts.shared_bytes_per_block as usize {
            return None;
        }
        self.params.set_value_tile(self.token_columns());
        self.outputs(|planner| {
            let kernel = format!("linear_step_{}", planner.shapes().dtype);
            planner.launch_of(kernel, planner.blocks(), THREADS, shared);
        });
        Some(())
    }

    /// The most value columns of a block with which blocks still occupy the device, whose multiprocessors hold two; all of
    /// them where a block takes the norm of the row.
    fn token_columns(&self) -> usize {
        let columns = block_multiple(self.shapes().value_width).min(MOST_COLUMNS);
        let is_whole = matches!(self.problem.finish, LinearFinish::RmsNorm { scope: NormScope::Head, .. });
        if is_whole && self.shapes().value_width <= MOST_COLUMNS {
            // A power of two, so that threads share the columns evenly.
            return columns.next_power_of_two();
        }
        let slots = 2 * self.facts.multiprocessors as usize;
        let blocks = |width: usize| self.state_heads() * self.shapes().value_width.div_ceil(width);
        let widths = [MOST_COLUMNS, MOST_COLUMNS / 2].into_iter();
        widths.filter(|&width| width <= columns).find(|&width| blocks(width) >= slots).unwrap_or(TILE)
    }
}
