use candle_core::{DType, Device, Result, Tensor, Var};

use super::{random, variable};
use crate::candle::*;
use crate::gau::MixedChunkOptions;
use crate::linear::LinearOptions;
use crate::performer::PerformerOptions;
use crate::softmax::SoftmaxOptions;
use crate::transnormer::NormOptions;

#[track_caller]
fn assert_refused<T>(result: Result<T>, words: &[&str]) {
    let message = result.err().expect("refused").to_string();
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

#[test]
fn errors_keep_their_words() -> Result<()> {
    let (q, k) = (random(&[1, 2, 5, 3], 1)?, random(&[1, 2, 5, 4], 2)?);
    let options = SoftmaxOptions::default();
    assert_refused(softmax_attention(&q, &k, &k, &options), &["softmax_attention", "`k`", "[1, 2, 5, 4]"]);
    let scalar = Tensor::new(1.0, &Device::Cpu)?;
    assert_refused(softmax_attention(&scalar, &k, &k, &options), &["softmax_attention", "`q`"]);
    let ids = q.to_dtype(DType::U32)?;
    assert_refused(softmax_attention(&ids, &ids, &ids, &options), &["softmax_attention", "`q`", "u32"]);
    Ok(())
}

#[test]
fn tracked_inputs_without_a_gradient() -> Result<()> {
    let x = random(&[1, 2, 5, 3], 1)?;
    let refused = |result: Result<Tensor>, argument: &str| {
        assert_refused(result, &[argument, "tracked for gradients"]);
    };
    let key_mask = || Ok::<_, candle_core::Error>(Some(Var::ones((1, 5), DType::U8, &Device::Cpu)?.into_inner()));
    let options = SoftmaxOptions { key_mask: key_mask()?, ..Default::default() };
    refused(softmax_attention(&x, &x, &x, &options), "key_mask");
    let options = LinearOptions { key_mask: key_mask()?, ..Default::default() };
    refused(linear_attention(&x, &x, &x, &options), "key_mask");

    let omega = variable(&[8, 3], 2)?;
    let options = PerformerOptions::default();
    refused(performer_attention(&x, &x, &x, &omega, &options), "omega");
    refused(performer_attention(&x, &x, &x, &(omega.as_tensor() * 2.0)?, &options), "omega");
    performer_attention(&x, &x, &x, &omega.as_detached_tensor(), &options)?;

    let log_decay = Some(variable(&[2], 3)?.abs()?.neg()?);
    let options = NormOptions { causal: true, log_decay, ..Default::default() };
    refused(norm_attention(&x, &x, &x, &options), "log_decay");
    Ok(())
}

#[test]
fn states() -> Result<()> {
    let x = random(&[1, 2, 5, 3], 1)?;
    let causal = LinearOptions { causal: true, ..Default::default() };
    let function = "linear_attention_with_state";
    let full = LinearOptions::default();
    assert_refused(linear_attention_with_state(&x, &x, &x, &full, None), &[function, "causal"]);

    let (_, state) = linear_attention_with_state(&x, &x, &x, &causal, None)?;
    let with = |s: Tensor, z: Tensor, stabilizer| {
        let state = LinearState::new(s, z, stabilizer, 5);
        linear_attention_with_state(&x, &x, &x, &causal, Some(&state))
    };
    let (s, z) = (state.s().clone(), state.z().clone());
    with(s.clone(), z.clone(), None)?;
    assert_refused(with(z.clone(), z.clone(), None), &[function, "state.s"]);
    assert_refused(with(s.clone(), z.to_dtype(DType::F32)?, None), &[function, "state.z", "f64"]);
    assert_refused(with(s.clone(), z.clone(), Some(z.clone())), &[function, "state.stabilizer"]);

    let omega = random(&[8, 3], 2)?;
    let options = PerformerOptions { causal: true, ..Default::default() };
    let result = performer_attention_with_state(&x, &x, &x, &omega, &options, Some(&state));
    assert_refused(result, &["performer_attention_with_state", "state"]);
    let (_, of_performer) = performer_attention_with_state(&x, &x, &x, &omega, &options, None)?;
    let tracked = of_performer.stabilizer().map(|c| Var::from_tensor(c).map(Var::into_inner)).transpose()?;
    let tracked = LinearState::new(of_performer.s().clone(), of_performer.z().clone(), tracked, 5);
    let result = performer_attention_with_state(&x, &x, &x, &omega, &options, Some(&tracked));
    assert_refused(result, &["performer_attention_with_state", "state.stabilizer", "tracked for gradients"]);

    // A position at the end of the range does not overflow.
    let last = LinearState::new(s, z, None, usize::MAX);
    assert_eq!(linear_attention_with_state(&x, &x, &x, &causal, Some(&last))?.1.position(), usize::MAX);
    Ok(())
}

#[test]
fn mixed_chunk() -> Result<()> {
    let x = random(&[1, 1, 8, 3], 1)?;
    let options = MixedChunkOptions { chunk_size: 4, causal: true, ..Default::default() };
    let run = |length: usize, state: Option<&LinearState>| {
        let x = x.narrow(2, 0, length)?;
        mixed_chunk_attention_with_state(&x, &x, &x, &x, &x, &options, state)
    };
    let (_, whole) = run(8, None)?;
    let (_, inside) = run(6, Some(&whole))?;
    assert_refused(run(8, Some(&inside)), &["mixed_chunk_attention_with_state", "state", "14", "chunk of 4"]);

    let two_heads = random(&[1, 2, 8, 3], 2)?;
    let result = mixed_chunk_attention(&x, &x, &two_heads, &x, &x, &options);
    assert_refused(result, &["mixed_chunk_attention", "global branch", "2 heads"]);
    let wide = random(&[1, 1, 8, 5], 3)?;
    let result = mixed_chunk_attention(&x, &wide, &x, &x, &x, &options);
    assert_refused(result, &["mixed_chunk_attention", "local branch", "`k`"]);
    Ok(())
}
