//! Tile sizes of the instances, as in the instance lists of kernels/quadratic, and the shared memory that they need.

use crate::gpu::plan::DeviceFacts;
use crate::problem::DType;

/// Rows of a block's own side.
pub(super) const ROWS: usize = 64;
/// Pieces start at multiples of this many bytes.
const ALIGN: usize = 128;

/// Arithmetic and tile sizes of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Config {
    /// Whether tiles hold 16-bit elements, else numbers in the type of sums.
    is_native: bool,
    /// Bytes of a number in a tile, and of one in the type of sums.
    number: usize,
    real: usize,
    /// Rows of a tile of the other side.
    pub(super) others: usize,
    /// Columns of panels and sums.
    pub(super) columns: usize,
}

/// How a block uses its shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    /// Whether its own rows stay.
    pub(super) is_resident: bool,
    /// Stages for the others.
    pub(super) stages: usize,
    /// Of shared memory.
    pub(super) bytes: usize,
}

impl Config {
    fn new(dtype: DType, is_softmax: bool, others: usize, columns: usize) -> Self {
        let real = dtype.accumulator().size();
        let is_native = is_softmax && dtype.size() == 2;
        Self { is_native, number: if is_native { 2 } else { real }, real, others, columns }
    }

    /// Of forward.cu.
    pub(super) fn forward(dtype: DType, is_softmax: bool, value_width: usize) -> Self {
        let config = Self::new(dtype, is_softmax, if dtype == DType::F64 { 32 } else { 64 }, 64);
        if config.is_native && value_width > 64 { Self { columns: 128, ..config } } else { config }
    }

    /// Of keys.cu and queries.cu.
    pub(super) fn backward(dtype: DType, is_softmax: bool, width: usize) -> Self {
        let (others, columns) = if dtype == DType::F64 { (16, 32) } else { (32, 64) };
        let config = Self::new(dtype, is_softmax, others, columns);
        match (config.is_native, width > 64) {
            (true, true) => Self { columns: 128, ..config },
            (true, false) => Self { others: 64, ..config },
            _ => config,
        }
    }

    pub(super) fn panels(&self, width: usize) -> usize {
        width.div_ceil(self.columns)
    }

    /// Numbers in a tile.
    fn tile(&self, rows: usize, columns: usize) -> usize {
        rows * if self.is_native { columns.next_multiple_of(64) } else { columns.next_multiple_of(32) + 4 }
    }

    fn piece(&self, numbers: usize) -> usize {
        (numbers * self.number).next_multiple_of(ALIGN)
    }

    fn reals(&self, count: usize) -> usize {
        (count * self.real).next_multiple_of(ALIGN)
    }

    /// The best use of shared memory that the device has room for.
    fn best(&self, facts: &DeviceFacts, bytes: impl Fn(bool, usize) -> usize) -> Memory {
        let limit = facts.shared_bytes_per_block as usize;
        let uses = [(true, 2), (true, 1), (false, 2), (false, 1)];
        let with_bytes =
            uses.map(|(is_resident, stages)| Memory { is_resident, stages, bytes: bytes(is_resident, stages) });
        *with_bytes.iter().find(|memory| memory.bytes <= limit).unwrap_or(&with_bytes[3])
    }

    /// Of forward.cu.
    pub(super) fn forward_memory(&self, width: usize, facts: &DeviceFacts) -> Memory {
        let (own, other) = (self.tile(ROWS, self.columns), self.tile(self.others, self.columns));
        self.best(facts, |is_resident, stages| {
            let resident = if is_resident { self.piece(self.tile(ROWS, width)) } else { 0 };
            resident + self.piece(stages * (other + if is_resident { 0 } else { own }))
        })
    }

    /// Of keys.cu and queries.cu.
    pub(super) fn backward_memory(&self, widths: [usize; 2], has_bias: bool, facts: &DeviceFacts) -> Memory {
        let (own, other) = (self.tile(ROWS, self.columns), self.tile(self.others, self.columns));
        self.best(facts, |is_resident, stages| {
            let resident: usize = widths.iter().map(|&width| self.piece(self.tile(ROWS, width))).sum();
            let diagonals = if has_bias { self.reals(ROWS * (self.others + 4)) } else { 0 };
            let stage = 2 * other + if is_resident { 0 } else { 2 * own };
            let kept = if is_resident { resident } else { 0 };
            kept + self.piece(stages * stage) + self.reals(stages * 2 * self.others) + diagonals
        })
    }
}
