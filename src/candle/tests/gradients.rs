use candle_core::{DType, Result, Tensor};

use super::formulas::{
    bias_matrix, decays, earlier_chunks, elu_plus_one, favor, mix, rms_norm, scores, softmax, visible,
};
use super::{assert_close, assert_same_gradients, loss, random, variable};
use crate::candle::*;
use crate::gau::{GauNorm, GauOptions, MixedChunkOptions};
use crate::linear::{FeatureMap, LinearOptions};
use crate::performer::PerformerOptions;
use crate::problem::Mask;
use crate::softmax::SoftmaxOptions;
use crate::transnormer::{DiagOptions, DiagWeight, NormOptions, NormScope};

#[test]
fn softmax_with_bias_and_log_sum_exp() -> Result<()> {
    // q and k as a projection leaves them, v cut out of something wider.
    let (q, k) = (variable(&[2, 5, 4, 3], 1)?, variable(&[2, 7, 2, 3], 2)?);
    let (v, bias) = (variable(&[2, 2, 7, 6], 3)?, variable(&[4, 13], 4)?);
    let (qt, kt, vt) = (q.transpose(1, 2)?, k.transpose(1, 2)?, v.narrow(3, 1, 4)?);
    let visible = visible(Mask::Causal, 5, 7)?;
    let plain = (scores(&qt, &kt)? * 0.7)?.broadcast_add(&bias_matrix(&bias, 5, 7)?)?;
    let (out, lse) = softmax(&plain, &visible, &vt)?;

    let bias_tensor = Some(bias.as_tensor().clone());
    let options = SoftmaxOptions { mask: Mask::Causal, scale: Some(0.7), bias: bias_tensor, ..Default::default() };
    let ours = softmax_attention(&qt, &kt, &vt, &options)?;
    assert_same_gradients(&loss(&ours)?, &loss(&out)?, &[&q, &k, &v, &bias])?;

    let (ours, our_lse) = softmax_attention_with_lse(&qt, &kt, &vt, &options)?;
    let both = (loss(&ours)? + loss(&our_lse)?)?;
    assert_same_gradients(&both, &(loss(&out)? + loss(&lse)?)?, &[&q, &k, &v, &bias])?;
    assert_same_gradients(&our_lse.sum_all()?, &lse.sum_all()?, &[&q, &k, &bias])
}

#[test]
fn only_what_is_tracked() -> Result<()> {
    let q = random(&[1, 2, 5, 3], 1)?;
    let bias = variable(&[1, 9], 2)?;
    let visible = visible(Mask::Full, 5, 5)?;
    let plain = (scores(&q, &q)? / 3f64.sqrt())?;
    let options = |bias: Option<&Tensor>| SoftmaxOptions { bias: bias.cloned(), ..Default::default() };

    // The bias alone.
    let theirs = softmax(&plain.broadcast_add(&bias_matrix(&bias, 5, 5)?)?, &visible, &q)?.0;
    let ours = softmax_attention(&q, &q, &q, &options(Some(&bias)))?;
    assert_same_gradients(&loss(&ours)?, &loss(&theirs)?, &[&bias])?;

    // Everything but the bias, and the same tensor three times.
    let x = variable(&[1, 2, 5, 3], 1)?;
    let fixed = bias.as_detached_tensor();
    let plain = (scores(&x, &x)? / 3f64.sqrt())?.broadcast_add(&bias_matrix(&fixed, 5, 5)?)?;
    let ours = softmax_attention(&x, &x, &x, &options(Some(&fixed)))?;
    assert_same_gradients(&loss(&ours)?, &loss(&softmax(&plain, &visible, &x)?.0)?, &[&x])?;

    // Nothing: outside of any graph.
    assert!(!softmax_attention(&q, &q, &q, &options(Some(&fixed)))?.track_op());
    assert!(!linear_attention(&q, &q, &q, &LinearOptions::default())?.track_op());
    Ok(())
}

#[test]
fn gradients_that_are_broadcast_or_strided() -> Result<()> {
    // The last dimension is out of order too.
    let stored = variable(&[2, 3, 4, 5], 1)?;
    let x = stored.transpose(2, 3)?;
    let (softmax_options, linear_options) = (SoftmaxOptions::default(), LinearOptions::default());
    for reduce in [
        (|out: &Tensor| out.sum_all()) as fn(&Tensor) -> Result<Tensor>,
        |out| loss(&out.transpose(2, 3)?),
        |out| loss(&out.sum(3)?),
        |out| loss(&out.permute((3, 1, 0, 2))?.narrow(3, 1, 2)?),
    ] {
        let theirs = softmax(&(scores(&x, &x)? / 2.0)?, &visible(Mask::Full, 5, 5)?, &x)?.0;
        let ours = softmax_attention(&x, &x, &x, &softmax_options)?;
        assert_same_gradients(&reduce(&ours)?, &reduce(&theirs)?, &[&stored])?;

        let weights = scores(&elu_plus_one(&x)?, &elu_plus_one(&x)?)?;
        let theirs = mix(&weights, &x)?.broadcast_div(&(weights.sum_keepdim(3)? + 1e-6)?)?;
        let ours = linear_attention(&x, &x, &x, &linear_options)?;
        assert_same_gradients(&reduce(&ours)?, &reduce(&theirs)?, &[&stored])?;
    }
    Ok(())
}

#[test]
fn diag_and_gau() -> Result<()> {
    let (q, k, v) = (variable(&[2, 2, 7, 3], 1)?, variable(&[2, 1, 7, 3], 2)?, variable(&[2, 1, 7, 4], 3)?);
    let blocks = visible(Mask::Blocks { size: 3, causal: true }, 7, 7)?;
    let weights = (scores(&q, &k)? * 0.5)?.relu()?.broadcast_mul(&blocks)?;
    let theirs = rms_norm(&mix(&weights, &v)?, 0.1)?;
    let weight = DiagWeight::Relu { epsilon: 0.1 };
    let options =
        DiagOptions { block_size: 3, causal: true, weight, scale: Some(0.5), key_mask: None, sequences: None };
    let ours = diag_attention(&q, &k, &v, &options)?;
    assert_same_gradients(&loss(&ours)?, &loss(&theirs)?, &[&q, &k, &v])?;

    let bias = variable(&[1, 13], 4)?;
    let weights = (scores(&q, &k)? / 2.0)?.broadcast_add(&bias_matrix(&bias, 7, 7)?)?.relu()?.sqr()?;
    let bias_tensor = Some(bias.as_tensor().clone());
    let options = GauOptions { norm: GauNorm::Fixed { length: 2.0 }, bias: bias_tensor, ..Default::default() };
    let ours = gau_attention(&q, &k, &v, &options)?;
    assert_same_gradients(&loss(&ours)?, &loss(&mix(&weights, &v)?)?, &[&q, &k, &v, &bias])
}

#[test]
fn linear_and_norm_with_decay_per_token() -> Result<()> {
    let (q, k, v) = (variable(&[2, 4, 7, 3], 1)?, variable(&[2, 2, 7, 3], 2)?, variable(&[2, 2, 7, 5], 3)?);
    let raw = variable(&[2, 2, 7], 4)?;
    let log_decay = raw.sqr()?.neg()?;
    let decays = decays(&log_decay)?.unsqueeze(2)?.broadcast_as((2, 2, 2, 7, 7))?.reshape((2, 4, 7, 7))?;

    let weights = (scores(&elu_plus_one(&q)?, &elu_plus_one(&k)?)? * &decays)?;
    let theirs = mix(&weights, &v)?.broadcast_div(&(weights.sum_keepdim(3)? + 0.01)?)?;
    let options = LinearOptions {
        causal: true,
        normalizer: Some(0.01),
        log_decay: Some(log_decay.clone()),
        ..Default::default()
    };
    let ours = linear_attention(&q, &k, &v, &options)?;
    assert_same_gradients(&loss(&ours)?, &loss(&theirs)?, &[&q, &k, &v, &raw])?;

    let theirs = rms_norm(&mix(&(scores(&q, &k)? * &decays)?, &v)?, 0.1)?;
    let map = FeatureMap::Identity;
    let options =
        NormOptions { map, causal: true, epsilon: 0.1, log_decay: Some(log_decay.clone()), ..Default::default() };
    let ours = norm_attention(&q, &k, &v, &options)?;
    assert_same_gradients(&loss(&ours)?, &loss(&theirs)?, &[&q, &k, &v, &raw])?;

    // The log-decay alone.
    let [q, k, v] = [&q, &k, &v].map(|x| x.as_detached_tensor());
    let theirs = rms_norm(&mix(&(scores(&q, &k)? * &decays)?, &v)?, 0.1)?;
    assert_same_gradients(&loss(&norm_attention(&q, &k, &v, &options)?)?, &loss(&theirs)?, &[&raw])
}

#[test]
fn norm_over_all_heads() -> Result<()> {
    for heads in [1, 3] {
        let x = variable(&[2, heads, 6, 4], 1)?;
        let raw = mix(&scores(&elu_plus_one(&x)?, &elu_plus_one(&x)?)?, &x)?;
        let rows = raw.transpose(1, 2)?.reshape((2, 6, heads * 4))?;
        let theirs = rms_norm(&rows, 0.1)?.reshape((2, 6, heads, 4))?.transpose(1, 2)?;
        let options = NormOptions { norm: NormScope::AllHeads, epsilon: 0.1, ..Default::default() };
        assert_same_gradients(&loss(&norm_attention(&x, &x, &x, &options)?)?, &loss(&theirs)?, &[&x])?;
    }
    Ok(())
}

#[test]
fn rows_without_a_key() -> Result<()> {
    let (q, k) = (variable(&[1, 1, 5, 3], 1)?, variable(&[1, 1, 3, 3], 2)?);
    let options = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
    let (out, lse) = softmax_attention_with_lse(&q, &k, &k, &options)?;
    assert_eq!(lse.flatten_all()?.to_vec1::<f64>()?[..2], [f64::NEG_INFINITY; 2]);
    let gradients = (loss(&out)? + loss(&lse)?)?.backward()?;
    for variable in [&q, &k] {
        let gradient = gradients.get(variable).expect("tracked").flatten_all()?.to_vec1::<f64>()?;
        assert!(gradient.iter().all(|x| x.is_finite()) && gradient[8] != 0.0);
    }
    let blind = gradients.get(&q).expect("tracked").narrow(2, 0, 2)?;
    assert_close(&blind, &blind.zeros_like()?, 0.0)
}

#[test]
fn performer() -> Result<()> {
    let (q, k, v) = (variable(&[1, 2, 6, 4], 1)?, variable(&[1, 2, 6, 4], 2)?, variable(&[1, 2, 6, 3], 3)?);
    let omega = random(&[8, 4], 4)?;
    let causal = visible(Mask::Causal, 6, 6)?;
    let weights = scores(&favor(&q, &omega)?, &favor(&k, &omega)?)?.broadcast_mul(&causal)?;
    let theirs = mix(&weights, &v)?.broadcast_div(&weights.sum_keepdim(3)?)?;
    let options = PerformerOptions { causal: true, epsilon: 0.0, ..Default::default() };
    let ours = performer_attention(&q, &k, &v, &omega, &options)?;
    assert_same_gradients(&loss(&ours)?, &loss(&theirs)?, &[&q, &k, &v])
}

#[test]
fn mixed_chunk() -> Result<()> {
    let dims = [2, 1, 7, 3];
    let (q, k, ql, kl) = (variable(&dims, 1)?, variable(&dims, 2)?, variable(&dims, 3)?, variable(&dims, 4)?);
    let (v, bias) = (variable(&[2, 1, 7, 4], 5)?, variable(&[1, 5], 6)?);
    let blocks = visible(Mask::Blocks { size: 3, causal: true }, 7, 7)?;
    let local = (scores(&q, &k)? / 3.0)?.broadcast_add(&bias_matrix(&bias, 7, 7)?)?.relu()?.sqr()?;
    let global = scores(&ql, &kl)?.broadcast_mul(&earlier_chunks(7, 3)?)?;
    let theirs = mix(&(local.broadcast_mul(&blocks)? + global)?, &v)?;

    let bias_tensor = Some(bias.as_tensor().clone());
    let options = MixedChunkOptions { chunk_size: 3, causal: true, bias: bias_tensor, ..Default::default() };
    let ours = mixed_chunk_attention(&q, &k, &ql, &kl, &v, &options)?;
    assert_same_gradients(&loss(&ours)?, &loss(&theirs)?, &[&q, &k, &ql, &kl, &v, &bias])
}

#[test]
fn mixed_chunk_rounds_once() -> Result<()> {
    let options = MixedChunkOptions { chunk_size: 8, causal: true, ..Default::default() };
    let x = random(&[1, 1, 40, 8], 1)?.to_dtype(DType::F16)?;
    let wide = x.to_dtype(DType::F32)?;
    let out = mixed_chunk_attention(&x, &x, &x, &x, &x, &options)?.to_dtype(DType::F32)?;
    let expected = mixed_chunk_attention(&wide, &wide, &wide, &wide, &wide, &options)?;
    // Half a unit in the last place of f16, or of its smallest numbers.
    let allowed = ((expected.abs()? * (0.501 / 1024.0))? + 1e-7)?;
    let excess = ((out - expected)?.abs()? - allowed)?.max_all()?.to_scalar::<f32>()?;
    assert!(excess <= 0.0, "{excess}");
    Ok(())
}

#[test]
fn half_precision_with_four_inputs() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let [x, raw, bias] =
            [(&[1, 2, 6, 8][..], 1), (&[1, 2, 6], 2), (&[2, 11], 3)].map(|(dims, seed)| variable(dims, seed));
        let (x, raw, bias) = (x?, raw?, bias?);
        let half = x.to_dtype(dtype)?;
        let log_decay = raw.sqr()?.neg()?.to_dtype(DType::F32)?;
        let options = LinearOptions { causal: true, log_decay: Some(log_decay), ..Default::default() };
        let out = linear_attention(&half, &half, &half, &options)?;
        let options = SoftmaxOptions { bias: Some(bias.to_dtype(dtype)?), ..Default::default() };
        let (attended, lse) = softmax_attention_with_lse(&out, &half, &half, &options)?;
        assert_eq!((attended.dtype(), lse.dtype()), (dtype, DType::F32));
        let gradients = (attended.to_dtype(DType::F32)?.sum_all()? + lse.sum_all()?)?.backward()?;
        for variable in [&x, &raw, &bias] {
            let gradient = gradients.get(variable).expect("tracked");
            assert!(gradient.sqr()?.sum_all()?.to_scalar::<f64>()? > 0.0);
        }
    }
    Ok(())
}
