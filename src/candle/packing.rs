//! Rows without those that a key mask removes.

use candle_core::{DType, Result, Tensor};

use crate::{Error, Sequences};

/// Rows `[B, N, …]` without those that a key mask removes, as packed sequences `[1, T, …]`.
pub(super) struct Packing {
    pub sequences: Sequences,
    /// `[T]` u32: which rows of `[B·N]` are left.
    order: Tensor,
    /// `[B·N]` u32: where each row came to; T where it was removed.
    back: Tensor,
    dims: [usize; 2],
}

impl Packing {
    pub fn new(function: &'static str, x: &Tensor, key_mask: &Tensor) -> Result<Self> {
        let argument = "key_mask";
        let dims = match *x.dims() {
            [batch, rows, ..] if key_mask.dims() == [batch, rows] => [batch, rows],
            _ => {
                let got = format!("shape {:?}", key_mask.dims());
                let needs = format!("the first two of {:?}", x.dims());
                return Err(Error::Shape { function, argument, got, needs }.into());
            }
        };
        if key_mask.dtype() != DType::U8 {
            let got = key_mask.dtype().as_str().into();
            return Err(Error::DType { function, argument, got, needs: "u8".into() }.into());
        }
        let keep = key_mask.flatten_all()?.to_vec1::<u8>()?;
        let order: Vec<u32> = (0u32..).zip(&keep).filter(|(_, keep)| **keep != 0).map(|(row, _)| row).collect();
        let mut back = vec![order.len() as u32; keep.len()];
        order.iter().zip(0..).for_each(|(row, place)| back[*row as usize] = place);
        let kept = |rows: &[u8]| rows.iter().filter(|keep| **keep != 0).count() as u32;
        let lengths = (0..dims[0]).map(|entry| kept(&keep[entry * dims[1]..][..dims[1]]));
        let (count, device) = (order.len(), x.device());
        Ok(Self {
            sequences: Sequences::of_lengths(lengths),
            order: Tensor::from_vec(order, count, device)?,
            back: Tensor::from_vec(back, keep.len(), device)?,
            dims,
        })
    }

    /// `[B, N, …]` → `[1, T, …]`
    pub fn packed(&self, x: &Tensor) -> Result<Tensor> {
        x.flatten(0, 1)?.contiguous()?.index_select(&self.order, 0)?.unsqueeze(0)
    }

    /// `[1, T, width]` → `[B, N, width]`; 0 where rows were removed.
    pub fn unpacked(&self, y: &Tensor) -> Result<Tensor> {
        let (y, [batch, rows]) = (y.squeeze(0)?, self.dims);
        let nothing = Tensor::zeros((1, y.dim(1)?), y.dtype(), y.device())?;
        Tensor::cat(&[&y, &nothing], 0)?.index_select(&self.back, 0)?.reshape((batch, rows, ()))
    }
}
