use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::rotary_emb::{rope, rope_i};

use super::engine::accumulator;
use super::own_gradient::with_gradient;
use super::rotary_config::RotaryConfig;
use crate::problem::ensure_value;

/// Rotary position embedding (Su et al. 2021, RoFormer) of rows of width D at positions p: with angles θ_i = p·base^{−2i/D},
///
/// ```text
/// y_i         = x_i cos θ_i − x_{i+D/2} sin θ_i        i < D/2
/// y_{i+D/2}   = x_{i+D/2} cos θ_i + x_i sin θ_i
/// ```
///
/// so that ⟨y(p), y'(p')⟩ depends on p − p' alone. The halves of a row are rotated against each other, as in GPT-NeoX and
/// LLaMA checkpoints of the transformers library.
///
/// A [`RotaryConfig`] rotates neighbours instead, x_{2i} against x_{2i+1}, or the first w numbers of a row alone, for which
/// w takes the place of D; or it scales the angles, θ_i = p·f_i, for texts longer than those of the training. YaRN multiplies
/// cos θ_i and sin θ_i by a factor, so that products ⟨y, y'⟩ grow by its square.
///
/// Angles are computed in f64, the rotation in f32 (f64 for f64). Gradients: x, by the transposed rotation.
///
/// Cosines and sines are kept in blocks of 1024 positions, of those asked for last: a clone shares them.
///
/// # Example
/// ```
/// use attn_kernels::nn::Rotary;
/// use candle_core::{Device, Tensor};
///
/// let rotary = Rotary::new(8, 10000.0)?;
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 5, 8), &Device::Cpu)?;
/// // Rows 3 and 4 of a sequence, as they come in decoding.
/// let tail = rotary.apply(&x.narrow(2, 3, 2)?, 3)?;
/// let error = (rotary.apply(&x, 0)?.narrow(2, 3, 2)? - tail)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert_eq!(error, 0.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Rotary {
    width: usize,
    /// Numbers at the beginning of a row that are rotated.
    rotated: usize,
    config: RotaryConfig,
    blocks: Arc<Mutex<Blocks>>,
}

/// cos and sin `[ROWS, D/2]` of the positions of a block, by its number.
type Blocks = BTreeMap<usize, [Tensor; 2]>;

/// Positions in a block.
const ROWS: usize = 1024;

/// Blocks that are kept, unless a call needs more.
const KEPT: usize = 32;

/// Positions stay below this, where f64 still gives angles to 1e-6.
const LIMIT: usize = u32::MAX as usize;

impl Rotary {
    /// For rows of an even width (or of which an even part is rotated): a base, 10000 in most models, or a configuration.
    ///
    /// # Errors
    /// An odd width, a base that is not a number above 1, a part that is wider, a scaling of numbers that are none above 0.
    pub fn new(width: usize, config: impl Into<RotaryConfig>) -> Result<Self> {
        let config = config.into();
        let rotated = config.rotated("Rotary::new", "width", width)?;
        Ok(Self { width, rotated, config, blocks: Arc::default() })
    }

    /// Width of the rows.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What rotated numbers are multiplied by beside the rotation.
    pub(super) fn attention_factor(&self) -> f64 {
        self.config.attention_factor()
    }

    /// Rotates x `[B, H, N, D]`, whose first row is at `position`.
    ///
    /// # Errors
    /// Another rank or width; positions beyond 2³² − 1.
    pub fn apply(&self, x: &Tensor, position: usize) -> Result<Tensor> {
        self.apply_to_pieces(x, &[(position, x.dims4()?.2)])
    }

    /// Rotates x `[B, H, N, D]`, row n of batch entry b as at position `positions[b, n]`, u32 `[B, N]`: for rows that are
    /// padded, packed or picked from several places. The positions are read on the host.
    ///
    /// # Errors
    /// As [`Self::apply`]; positions of another shape or dtype.
    ///
    /// ```
    /// use attn_kernels::nn::Rotary;
    /// use candle_core::{Device, Tensor};
    ///
    /// let rotary = Rotary::new(8, 10000.0)?;
    /// let x = Tensor::randn(0f32, 1.0, (2, 1, 3, 8), &Device::Cpu)?;
    /// let y = rotary.apply_at(&x, &Tensor::new(&[[0u32, 1, 2], [7, 8, 0]], &Device::Cpu)?)?;
    /// let of = |x: &Tensor, row| x.get(1)?.unsqueeze(0)?.narrow(2, row, 1);
    /// let alone = rotary.apply(&of(&x, 1)?, 8)?;
    /// assert_eq!((alone - of(&y, 1)?)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn apply_at(&self, x: &Tensor, positions: &Tensor) -> Result<Tensor> {
        let (batch, _, rows, _) = x.dims4()?;
        let (function, argument) = ("Rotary::apply_at", "positions");
        if positions.dims() != [batch, rows] {
            let (got, needs) = (format!("shape {:?}", positions.dims()), format!("[{batch}, {rows}]"));
            return Err(crate::Error::Shape { function, argument, got, needs }.into());
        }
        if positions.dtype() != DType::U32 {
            let got = positions.dtype().as_str().into();
            return Err(crate::Error::DType { function, argument, got, needs: "u32".into() }.into());
        }
        // Rows that follow each other are a piece.
        let mut pieces: Vec<(usize, usize)> = Vec::new();
        for position in positions.flatten_all()?.to_vec1::<u32>()? {
            match pieces.last_mut() {
                Some((first, count)) if *first + *count == position as usize => *count += 1,
                _ => pieces.push((position as usize, 1)),
            }
        }
        // Every row of every entry in a line, each under its heads.
        let line = x.transpose(0, 1)?.flatten(1, 2)?.unsqueeze(0)?;
        let (_, heads, _, width) = x.dims4()?;
        self.apply_to_pieces(&line, &pieces)?.reshape((heads, batch, rows, width))?.transpose(0, 1)
    }

    /// Rotates x `[B, H, N, D]`, whose rows are pieces of so many rows from a position on.
    pub(super) fn apply_to_pieces(&self, x: &Tensor, pieces: &[(usize, usize)]) -> Result<Tensor> {
        let (_, _, rows, width) = x.dims4()?;
        let function = "Rotary::apply";
        let needs = format!("width {}", self.width);
        ensure_value(width == self.width, function, "x", format!("{width} wide"), &needs)?;
        let beyond = pieces.iter().find(|(position, rows)| position.checked_add(*rows).is_none_or(|end| end > LIMIT));
        let (position, count) = beyond.copied().unwrap_or_default();
        let needs = format!("its {count} rows to end within {LIMIT}");
        ensure_value(beyond.is_none(), function, "position", position, &needs)?;
        let sums = accumulator(x.dtype());
        let wide = x.to_dtype(sums)?.contiguous()?;
        if rows == 0 {
            return wide.to_dtype(x.dtype());
        }
        let [cos, sin] = self.angles(pieces, sums, x.device())?;
        let rotation = if self.config.interleaved { rope_i } else { rope };
        let part = wide.narrow(D::Minus1, 0, self.rotated)?;
        let rotated = rotation(&part.detach().contiguous()?, &cos, &sin)?;
        // The rotation of candle-nn has no gradient: it is the rotation back, times the same factor.
        let back = move |gradient: &Tensor| rotation(&gradient.contiguous()?, &cos, &sin.neg()?);
        let rotated = with_gradient("rotary", &part, rotated, back)?;
        let all = match self.width - self.rotated {
            0 => rotated,
            rest => Tensor::cat(&[rotated, wide.narrow(D::Minus1, self.rotated, rest)?], D::Minus1)?,
        };
        all.to_dtype(x.dtype())
    }

    /// cos and sin `[rows, D/2]` of pieces of so many rows from a position on.
    fn angles(&self, pieces: &[(usize, usize)], dtype: DType, device: &Device) -> Result<[Tensor; 2]> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut parts, mut needed) = ([Vec::new(), Vec::new()], BTreeSet::new());
        for &(position, rows) in pieces.iter().filter(|(_, rows)| *rows > 0) {
            for index in position / ROWS..(position + rows).div_ceil(ROWS) {
                let fits = |pair: &&[Tensor; 2]| pair[0].dtype() == dtype && pair[0].device().same_device(device);
                let pair = match blocks.get(&index).filter(fits) {
                    Some(pair) => pair.clone(),
                    None => self.block(index, dtype, device)?,
                };
                // The rows of the block that are asked for.
                let (start, end) = (position.max(index * ROWS), (position + rows).min((index + 1) * ROWS));
                for (parts, table) in parts.iter_mut().zip(&pair) {
                    parts.push(table.narrow(0, start - index * ROWS, end - start)?);
                }
                blocks.insert(index, pair);
                needed.insert(index);
            }
        }
        if blocks.len() > KEPT {
            blocks.retain(|index, _| needed.contains(index));
        }
        let [cos, sin] =
            parts.map(|parts| if parts.len() == 1 { Ok(parts[0].clone()) } else { Tensor::cat(&parts, 0) });
        Ok([cos?, sin?])
    }

    fn block(&self, index: usize, dtype: DType, device: &Device) -> Result<[Tensor; 2]> {
        let (frequencies, factor) = (self.config.frequencies(self.rotated), self.attention_factor());
        let positions = index * ROWS..(index + 1) * ROWS;
        let angles = positions.flat_map(|p| frequencies.iter().map(move |frequency| p as f64 * frequency));
        let half = self.rotated / 2;
        let angles = Tensor::from_vec(angles.collect::<Vec<f64>>(), (ROWS, half), &Device::Cpu)?;
        let convert = |x: Tensor| (x * factor)?.to_dtype(dtype)?.to_device(device);
        Ok([convert(angles.cos()?)?, convert(angles.sin()?)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(rotary: &Rotary) -> usize {
        let size = |table: &Tensor| table.elem_count() * table.dtype().size_in_bytes();
        rotary.blocks.lock().unwrap().values().flatten().map(size).sum()
    }

    #[test]
    fn tables_are_as_large_as_what_is_asked_for() -> Result<()> {
        let rotary = Rotary::new(128, 10000.0)?;
        let row = Tensor::ones((1, 1, 1, 128), DType::F32, &Device::Cpu)?;
        let block = ROWS * 2 * 64 * 4;
        rotary.apply(&row, 1_000_000)?;
        assert_eq!(bytes(&rotary), block);
        rotary.apply(&row.broadcast_as((1, 1, 5000, 128))?, 1_000_000)?;
        assert_eq!(bytes(&rotary), 6 * block);
        // A long text, token by token: what lies far behind is dropped.
        for position in (0..100 * ROWS).step_by(ROWS / 2) {
            rotary.apply(&row, position)?;
            assert!(bytes(&rotary) <= KEPT * block);
        }
        // A clone shares the tables, another dtype takes their place.
        assert_eq!(bytes(&rotary.clone()), bytes(&rotary));
        let before = bytes(&rotary);
        rotary.clone().apply(&row.to_dtype(DType::F64)?, 99 * ROWS)?;
        assert_eq!(bytes(&rotary), before + block);
        Ok(())
    }

    /// Rows are the same whichever blocks they are cut from, from several threads as well.
    #[test]
    fn blocks_do_not_show() -> Result<()> {
        let rotary = Rotary::new(8, 100.0)?;
        let x = Tensor::arange(0f64, 8.0 * 3000.0, &Device::Cpu)?.reshape((1, 1, 3000, 8))?;
        let whole = rotary.apply(&x, 700)?;
        let check = |start: usize| -> Result<()> {
            let part = rotary.apply(&x.narrow(2, start, 400)?, 700 + start)?;
            let difference = (part - whole.narrow(2, start, 400)?)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert_eq!(difference, 0.0, "from {start}");
            Ok(())
        };
        std::thread::scope(|scope| {
            let check = &check;
            let threads: Vec<_> =
                (0..4).map(|t| scope.spawn(move || (t..2600).step_by(37).try_for_each(check))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap())
        })
    }

    /// cos and sin of the angle in f64, rounded once.
    #[test]
    fn far_positions_are_exact() -> Result<()> {
        let rotary = Rotary::new(4, 10000.0)?;
        for position in [0, 1023, 1024, 1_000_000, LIMIT - 1] {
            let x = Tensor::new(&[[[[1f32, 1.0, 0.0, 0.0]]]], &Device::Cpu)?;
            let y = rotary.apply(&x, position)?.flatten_all()?.to_vec1::<f32>()?;
            for (pair, frequency) in [1.0, 0.01].into_iter().enumerate() {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                let error = (f64::from(y[pair]) - cos).abs().max((f64::from(y[pair + 2]) - sin).abs());
                assert!(error < 2e-6, "{position}: {y:?}");
            }
        }
        let x = Tensor::zeros((1, 1, 2, 4), DType::F32, &Device::Cpu)?;
        for position in [LIMIT - 1, usize::MAX] {
            let error = rotary.apply(&x, position).unwrap_err().to_string();
            assert!(error.contains("`position`") && error.contains("2 rows"), "{error}");
        }
        assert_eq!(rotary.apply(&x.narrow(2, 0, 0)?, 5)?.dims(), [1, 1, 0, 4]);
        Ok(())
    }
}
