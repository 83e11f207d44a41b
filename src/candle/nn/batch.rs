//! Batches of sequences that differ in length: padded on any side, or packed.

use candle_core::{DType, Result, Tensor};

use crate::problem::ensure_value;
use crate::{Result as CoreResult, Sequences};

/// Which rows are tokens, and of which sequence.
#[derive(Clone, Copy, Default)]
pub(super) struct Batch<'a> {
    /// `[B, N]`, the visible tokens of each sequence first.
    pub key_mask: Option<&'a Tensor>,
    pub sequences: Option<&'a Sequences>,
}

/// The rows of a batch in another order: in every sequence the visible tokens first, as if it were padded on the right,
/// so that whatever counts positions (rotary embedding, windows, blocks, chunks, distances) counts visible tokens.
struct Gathering {
    /// `[B·N]` u32: the row that comes to each place, and the place that each row came to.
    order: Tensor,
    back: Tensor,
    /// `[B, N]`
    key_mask: Tensor,
}

/// `compute` of rows x `[B, N, width]` and a key mask `[B, N]`, handed over with the visible tokens of each sequence
/// first; the result `[B, N, …]` is in the order of x again.
pub(super) fn gathered(
    x: &Tensor,
    key_mask: Option<&Tensor>,
    compute: impl FnOnce(&Tensor, Batch<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    match key_mask.map(|mask| Gathering::new(x, mask)).transpose()?.flatten() {
        None => compute(x, Batch { key_mask, sequences: None }),
        Some(gathering) => {
            let rows = reordered(x, &gathering.order)?;
            let batch = Batch { key_mask: Some(&gathering.key_mask), sequences: None };
            reordered(&compute(&rows, batch)?, &gathering.back)
        }
    }
}

impl Gathering {
    /// None if the order is that already. A mask that does not fit is left to the operation, which says so.
    fn new(x: &Tensor, key_mask: &Tensor) -> Result<Option<Self>> {
        let [batch, rows, ..] = *x.dims() else { return Ok(None) };
        if key_mask.dims() != [batch, rows] || key_mask.dtype() != DType::U8 || key_mask.track_op() {
            return Ok(None);
        }
        let keep = key_mask.flatten_all()?.to_vec1::<u8>()?;
        let mut order: Vec<u32> = (0..keep.len() as u32).collect();
        if rows > 0 {
            // A stable sort: tokens keep their order.
            order.chunks_mut(rows).for_each(|sequence| sequence.sort_by_key(|row| keep[*row as usize] == 0));
        }
        if order.is_sorted() {
            return Ok(None);
        }
        let mut back = vec![0u32; order.len()];
        order.iter().zip(0..).for_each(|(row, place)| back[*row as usize] = place);
        let mask: Vec<u8> = order.iter().map(|row| keep[*row as usize]).collect();
        let (count, device) = (keep.len(), x.device());
        Ok(Some(Self {
            order: Tensor::from_vec(order, count, device)?,
            back: Tensor::from_vec(back, count, device)?,
            key_mask: Tensor::from_vec(mask, (batch, rows), device)?,
        }))
    }
}

/// Rows of `[B, N, …]` in the order of `[B·N]`.
fn reordered(x: &Tensor, order: &Tensor) -> Result<Tensor> {
    x.flatten(0, 1)?.contiguous()?.index_select(order, 0)?.reshape(x.shape())
}

/// T of a tensor `[1, T, …]` of packed sequences.
pub(super) fn packed_tokens(function: &'static str, argument: &'static str, x: &Tensor) -> CoreResult<usize> {
    let (got, needs) = (format!("shape {:?}", x.dims()), "1 first: packed sequences are one batch entry");
    ensure_value(x.dims().first() == Some(&1) && x.rank() > 1, function, argument, got, needs)?;
    Ok(x.dims()[1])
}
