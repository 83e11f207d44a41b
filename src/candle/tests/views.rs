use candle_core::{DType, Device, Result, Tensor, Var};

use super::{assert_close, random};
use crate::candle::*;
use crate::gau::MixedChunkOptions;
use crate::linear::LinearOptions;
use crate::performer::PerformerOptions;
use crate::softmax::SoftmaxOptions;

/// The same values as `random(&[2, 3, 5, 4], seed)` in other layouts.
fn layouts(seed: u64) -> Result<Vec<Tensor>> {
    let x = random(&[2, 3, 5, 4], seed)?;
    Ok(vec![
        x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?,
        Tensor::cat(&[&x, &x, &x], 2)?.narrow(2, 5, 5)?,
        Tensor::cat(&[&x, &x], 3)?.narrow(3, 4, 4)?,
        x.transpose(2, 3)?.contiguous()?.transpose(2, 3)?,
        x.permute((3, 2, 1, 0))?.contiguous()?.permute((3, 2, 1, 0))?,
        x,
    ])
}

#[test]
fn any_layout_gives_the_same_bits() -> Result<()> {
    let (k, v) = (random(&[2, 3, 5, 4], 2)?, random(&[2, 3, 5, 4], 3)?);
    let (options, linear_options) = (SoftmaxOptions::default(), LinearOptions::default());
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let run = |x: &Tensor| {
            let [x, k, v] = [x, &k, &v].map(|x| x.to_dtype(dtype));
            let (x, k, v) = (x?, k?, v?);
            Ok::<_, candle_core::Error>([
                softmax_attention(&x, &k, &v, &options)?,
                softmax_attention(&k, &v, &x, &options)?,
                linear_attention(&v, &x, &k, &linear_options)?,
            ])
        };
        let expected = run(&random(&[2, 3, 5, 4], 1)?)?;
        for x in layouts(1)? {
            for (out, expected) in run(&x)?.iter().zip(&expected) {
                assert_close(out, expected, 0.0)?;
            }
        }
    }
    Ok(())
}

#[test]
fn broadcast_operands() -> Result<()> {
    let (q, k) = (random(&[2, 3, 5, 4], 1)?, random(&[1, 1, 5, 4], 2)?);
    let wide = k.broadcast_as((2, 3, 5, 4))?;
    let column = random(&[2, 3, 5, 1], 3)?.broadcast_as((2, 3, 5, 4))?;
    let mask = Tensor::new(&[[1u8, 0, 1, 1, 0]], &Device::Cpu)?.broadcast_as((2, 5))?;
    let options = SoftmaxOptions { key_mask: Some(mask.clone()), ..Default::default() };
    let out = softmax_attention(&q, &wide, &column, &options)?;
    let options = SoftmaxOptions { key_mask: Some(mask.contiguous()?), ..Default::default() };
    assert_close(&out, &softmax_attention(&q, &wide.contiguous()?, &column.contiguous()?, &options)?, 0.0)
}

#[test]
fn nothing_to_attend() -> Result<()> {
    for [batch, queries, keys] in [[0, 5, 5], [2, 0, 5], [2, 5, 0], [2, 0, 0]] {
        let [q, k] = [queries, keys].map(|rows| Var::zeros((batch, 3, rows, 4), DType::F32, &Device::Cpu));
        let (q, k) = (q?, k?);
        let bias = Var::zeros((1, 11), DType::F32, &Device::Cpu)?;
        let bias_tensor = Some(bias.as_tensor().clone());
        let key_mask = Some(Tensor::ones((batch, keys), DType::U8, &Device::Cpu)?);
        let omega = random(&[8, 4], 1)?.to_dtype(DType::F32)?;
        let softmax_options =
            SoftmaxOptions { bias: bias_tensor.clone(), key_mask: key_mask.clone(), ..Default::default() };
        let linear_options = LinearOptions { key_mask, ..Default::default() };
        let mixed = MixedChunkOptions { chunk_size: 2, bias: bias_tensor, ..Default::default() };
        let (out, lse) = softmax_attention_with_lse(&q, &k, &k, &softmax_options)?;
        for out in [
            out,
            linear_attention(&q, &k, &k, &linear_options)?,
            performer_attention(&q, &k, &k, &omega, &PerformerOptions::default())?,
            mixed_chunk_attention(&q, &k, &q, &k, &k, &mixed)?,
        ] {
            assert_eq!(out.dims(), q.dims());
            assert!(out.flatten_all()?.to_vec1::<f32>()?.iter().all(|&x| x == 0.0));
            let gradients = out.sum_all()?.backward()?;
            assert_eq!(gradients.get(&q).map(|x| x.dims()), Some(q.dims()));
            assert_eq!(gradients.get(&k).map(|x| x.dims()), Some(k.dims()));
        }
        if keys == 0 {
            assert!(lse.flatten_all()?.to_vec1::<f32>()?.iter().all(|&x| x == f32::NEG_INFINITY));
        }
        let gradients = lse.sum_all()?.backward()?;
        assert_eq!(gradients.get(&bias).map(|x| x.dims()), Some(bias.dims()));
    }
    Ok(())
}

#[test]
fn states_of_nothing() -> Result<()> {
    let options = LinearOptions { causal: true, ..Default::default() };
    let empty = Tensor::zeros((1, 2, 0, 4), DType::F32, &Device::Cpu)?;
    let (out, state) = linear_attention_with_state(&empty, &empty, &empty, &options, None)?;
    assert_eq!((out.dims(), state.position()), (empty.dims(), 0));
    assert_eq!(state.s().flatten_all()?.to_vec1::<f32>()?, [0.0; 32]);
    Ok(())
}
