//! Where the pieces of a block's memory lie.

use super::TILE;
use super::params::{LinearParams, PIECES, Piece};
use crate::gpu::params::Pointer;
use crate::gpu::plan::DeviceFacts;

/// Numbers set aside for what a kernel keeps per row, `kRowsSize` on the device.
const ROWS_SIZE: usize = 384;
/// Pieces start at multiples of this many bytes.
const ALIGN: usize = 128;

/// The next multiple of a block's 32 columns.
pub fn block_multiple(size: usize) -> usize {
    size.next_multiple_of(TILE)
}

/// Distance of rows in a tile of `width` columns, as `tile::wide_row`.
pub fn wide_row(width: usize) -> usize {
    width.next_multiple_of(32) + 8
}

/// Offsets of pieces and the memory that they need.
pub struct Memory {
    /// As in the parameters; 0 for those that the kernel does not have.
    pub pieces: [i64; PIECES],
    /// Bytes of shared memory.
    pub shared: usize,
    /// Bytes of global memory for the pieces that do not fit, per block.
    pub spilled: usize,
}

impl Memory {
    /// Places pieces in order, each in shared memory if it still fits.
    pub fn new(params: &LinearParams, pieces: &[Piece], real: usize, facts: &DeviceFacts) -> Self {
        let limit = facts.shared_bytes_per_block as usize;
        let mut memory = Self { pieces: [0; PIECES], shared: 0, spilled: 0 };
        for &piece in pieces {
            let bytes = (size(params, piece) * real).next_multiple_of(ALIGN);
            let at = &mut memory.pieces[piece as usize];
            if memory.shared + bytes <= limit {
                *at = memory.shared as i64;
                memory.shared += bytes;
            } else {
                *at = !(memory.spilled as i64);
                memory.spilled += bytes;
            }
        }
        memory
    }

    /// Bytes wherever they lie.
    pub fn total(&self) -> usize {
        self.shared + self.spilled
    }
}

/// Numbers in a piece.
fn size(params: &LinearParams, piece: Piece) -> usize {
    let [width, features, values, weights] =
        [params.width_row, params.features_row, params.values_row, params.weights_row].map(|row| TILE * row as usize);
    match piece {
        Piece::Rows => ROWS_SIZE,
        Piece::Weights => weights,
        Piece::Pairs if params.d_log == Pointer::default() => 0,
        Piece::Pairs => weights,
        Piece::QueryPhi | Piece::KeyPhi | Piece::DPhi => features,
        Piece::X if params.directions_count == 0 => 0,
        Piece::X => width,
        Piece::Values | Piece::Sums | Piece::DValues => values,
        Piece::Z => params.features_padded as usize,
        Piece::S => params.features_padded as usize * params.values_row as usize,
    }
}
