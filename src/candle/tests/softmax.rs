//! What softmax has besides: attention biases, masks of pairs, sinks.

use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::formulas::{bias_matrix, mix, scores, visible};
use super::{assert_close, assert_same_gradients, loss, random, variable};
use crate::candle::*;
use crate::problem::Mask;
use crate::relative_bias::alibi_bias;
use crate::softmax::SoftmaxOptions;

/// Softmax attention and its log-sum-exp over scores, beside a sink [H]; hidden scores are far below.
fn softmax(scores: &Tensor, visible: &Tensor, v: &Tensor, sinks: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let hidden = ((visible - 1.0)? * 1e9)?;
    let weights = scores.broadcast_mul(visible)?.broadcast_add(&hidden)?.exp()?;
    let sums = weights.sum_keepdim(D::Minus1)?;
    let sums = match sinks {
        Some(sinks) => sums.broadcast_add(&sinks.exp()?.reshape((1, sinks.dim(0)?, 1, 1))?)?,
        None => sums,
    };
    Ok((mix(&weights.broadcast_div(&sums)?, v)?, sums.log()?.squeeze(D::Minus1)?))
}

#[test]
fn attention_bias_and_sinks() -> Result<()> {
    let (q, k, v) = (variable(&[2, 4, 5, 3], 1)?, variable(&[2, 2, 7, 3], 2)?, variable(&[2, 2, 7, 4], 3)?);
    let (bias, sinks) = (variable(&[4, 13], 4)?, variable(&[4], 5)?);
    let causal = visible(Mask::Causal, 5, 7)?;
    let plain = (scores(&q, &k)? * 0.7)?;
    for dims in [[2, 4, 5, 7], [1, 1, 5, 7], [2, 1, 1, 7], [1, 4, 5, 1], [1, 1, 1, 1]] {
        let term = variable(&dims, 6)?;
        let biased = plain.broadcast_add(&term)?;
        let attention_bias = Some(term.as_tensor().clone());
        let options = SoftmaxOptions { mask: Mask::Causal, scale: Some(0.7), attention_bias, ..Default::default() };
        let (out, lse) = softmax(&biased, &causal, &v, None)?;
        let (ours, our_lse) = softmax_attention_with_lse(&q, &k, &v, &options)?;
        let both = (loss(&ours)? + loss(&our_lse)?)?;
        assert_same_gradients(&both, &(loss(&out)? + loss(&lse)?)?, &[&q, &k, &v, &term])?;

        // With everything that can be tracked, and with some of it.
        let biased = biased.broadcast_add(&bias_matrix(&bias, 5, 7)?)?;
        let (out, lse) = softmax(&biased, &causal, &v, Some(&sinks))?;
        let (bias_tensor, sink_tensor) = (bias.as_tensor().clone(), sinks.as_tensor().clone());
        let options = SoftmaxOptions { bias: Some(bias_tensor), sinks: Some(sink_tensor), ..options };
        let (ours, our_lse) = softmax_attention_with_lse(&q, &k, &v, &options)?;
        let both = (loss(&ours)? + loss(&our_lse)?)?;
        assert_same_gradients(&both, &(loss(&out)? + loss(&lse)?)?, &[&q, &k, &v, &bias, &term, &sinks])?;
        let options = SoftmaxOptions { attention_bias: Some(term.as_detached_tensor()), ..options };
        let ours = softmax_attention(&q, &k, &v, &options)?;
        assert_same_gradients(&loss(&ours)?, &loss(&out)?, &[&q, &bias, &sinks])?;
    }
    Ok(())
}

/// Broadcast and transposed tensors are what they show.
#[test]
fn views_of_attention_biases() -> Result<()> {
    let x = variable(&[2, 3, 5, 4], 1)?;
    let term = variable(&[5, 5], 2)?;
    let wide = |term: &Tensor| term.reshape((1, 1, 5, 5))?.broadcast_as((2, 3, 5, 5));
    for term_view in [wide(&term)?, wide(&term.t()?)?, wide(&term.narrow(1, 2, 1)?.broadcast_as((5, 5))?)?] {
        let theirs = (scores(&x, &x)? / 2.0)?.broadcast_add(&term_view)?;
        let (out, _) = softmax(&theirs, &visible(Mask::Full, 5, 5)?, &x, None)?;
        let options = SoftmaxOptions { attention_bias: Some(term_view), ..Default::default() };
        let ours = softmax_attention(&x, &x, &x, &options)?;
        assert_same_gradients(&loss(&ours)?, &loss(&out)?, &[&x, &term])?;
    }
    Ok(())
}

#[test]
fn masks_of_pairs() -> Result<()> {
    let (q, k) = (variable(&[2, 2, 6, 3], 1)?, variable(&[2, 2, 9, 3], 2)?);
    for dims in [[2, 2, 6, 9], [1, 1, 6, 9], [2, 1, 1, 9]] {
        let keep = random(&dims, 3)?.ge(-0.4)?;
        let visible = keep.to_dtype(DType::F64)?;
        let theirs = softmax(&(scores(&q, &k)? / 3f64.sqrt())?, &visible, &k, None)?.0;
        let options = SoftmaxOptions { attention_bias: Some(keep.clone()), ..Default::default() };
        let ours = softmax_attention(&q, &k, &k, &options)?;
        assert_same_gradients(&loss(&ours)?, &loss(&theirs)?, &[&q, &k])?;

        let minus_infinity = Tensor::full(f64::NEG_INFINITY, &dims[..], &Device::Cpu)?;
        let biased = keep.where_cond(&visible.zeros_like()?, &minus_infinity)?;
        let options = SoftmaxOptions { attention_bias: Some(biased), ..Default::default() };
        assert_close(&softmax_attention(&q, &k, &k, &options)?, &ours, 1e-15)?;
    }
    let tracked = Var::ones((1, 1, 6, 9), DType::U8, &Device::Cpu)?.into_inner();
    let options = SoftmaxOptions { attention_bias: Some(tracked), ..Default::default() };
    let message = softmax_attention(&q, &k, &k, &options).unwrap_err().to_string();
    assert!(message.contains("attention_bias") && message.contains("tracked for gradients"), "{message}");
    Ok(())
}

/// Parts of the keys, of which one has the sinks, merge by their log-sum-exp.
#[test]
fn parts_merge_with_sinks() -> Result<()> {
    let (q, k, sinks) = (random(&[1, 2, 5, 4], 1)?, random(&[1, 2, 9, 4], 2)?, random(&[2], 3)?);
    let options = |sinks: Option<Tensor>| SoftmaxOptions { sinks, ..Default::default() };
    let (whole, lse) = softmax_attention_with_lse(&q, &k, &k, &options(Some(sinks.clone())))?;
    let part = |start, len, sinks| {
        let k = k.narrow(2, start, len)?;
        softmax_attention_with_lse(&q, &k, &k, &options(sinks))
    };
    let (first, second) = (part(0, 4, Some(sinks))?, part(4, 5, None)?);
    let all = (first.1.exp()? + second.1.exp()?)?.log()?;
    assert_close(&all, &lse, 1e-14)?;
    let share = |(out, part): &(Tensor, Tensor)| out.broadcast_mul(&(part - &all)?.exp()?.unsqueeze(3)?);
    assert_close(&(share(&first)? + share(&second)?)?, &whole, 1e-14)
}

/// The bias of ALiBi is −m·|j − i| with the slopes 2^{−8h/H}.
#[test]
fn alibi_is_its_formula() -> Result<()> {
    let (q, k) = (random(&[1, 4, 6, 3], 1)?, random(&[1, 4, 9, 3], 2)?);
    let slope = |h: usize| 0.25f64.powi(h as i32 + 1);
    let entry = |h: usize, i: usize, j: usize| -slope(h) * (i as f64 + 3.0 - j as f64).abs();
    let entries = (0..4 * 6 * 9).map(|at| entry(at / 54, at / 9 % 6, at % 9)).collect();
    let plain = (scores(&q, &k)? / 3f64.sqrt())?;
    let plain = plain.broadcast_add(&Tensor::from_vec(entries, (1, 4, 6, 9), &Device::Cpu)?)?;
    for mask in [Mask::Full, Mask::Causal] {
        let theirs = softmax(&plain, &visible(mask, 6, 9)?, &k, None)?.0;
        let bias = Some(Tensor::from_vec(alibi_bias(4, 8), (4, 17), &Device::Cpu)?);
        let ours = softmax_attention(&q, &k, &k, &SoftmaxOptions { mask, bias, ..Default::default() })?;
        assert_close(&ours, &theirs, 1e-12)?;
    }
    Ok(())
}

/// NaN and +∞ make the rows NaN that see them, and no others.
#[test]
fn bad_numbers_stay_in_their_rows() -> Result<()> {
    let x = random(&[1, 2, 6, 3], 1)?;
    for bad in [f64::NAN, f64::INFINITY] {
        let entries = (0..36).map(|at| if at == 2 * 6 + 1 { bad } else { 0.0 }).collect();
        let attention_bias = Some(Tensor::from_vec(entries, (1, 1, 6, 6), &Device::Cpu)?);
        let options = SoftmaxOptions { attention_bias, ..Default::default() };
        let out = softmax_attention(&x, &x, &x, &options)?;
        for (row, numbers) in out.reshape((12, 3))?.to_vec2::<f64>()?.iter().enumerate() {
            assert!(numbers.iter().all(|number| number.is_nan() == (row % 6 == 2)), "{bad}, row {row}: {numbers:?}");
        }
        let sinks = Some(Tensor::new(&[bad, 0.0], &Device::Cpu)?);
        let out = softmax_attention(&x, &x, &x, &SoftmaxOptions { sinks, ..Default::default() })?;
        let heads = out.reshape((2, 18))?.to_vec2::<f64>()?;
        assert!(heads[0].iter().all(|x| x.is_nan()) && heads[1].iter().all(|x| x.is_finite()), "{bad}");
    }
    Ok(())
}
