//! Packed sequences, computed at once and one by one, as where there is no launch for all.

use candle_core::{Device, Result, Tensor, Var};

use super::super::engine::{LinearCall, LinearTensors, QuadraticCall};
use super::super::{LinearState, linear_attention_with_state, mixed_chunk_attention_with_state};
use crate::{LinearOptions, Mask, MixedChunkOptions, Sequences, SoftmaxOptions};

const LENGTHS: [u32; 4] = [5, 0, 70, 9];

fn tokens(heads: usize, width: usize) -> Result<Var> {
    Var::randn(0f32, 1.0, (1, heads, 84, width), &Device::Cpu)
}

fn assert_same(x: &Tensor, y: &Tensor) -> Result<()> {
    assert_eq!(x.dims(), y.dims());
    assert_eq!(x.flatten_all()?.to_vec1::<f32>()?, y.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}

#[test]
fn calls_of_sequences_are_the_call() -> Result<()> {
    let (q, k, v) = (tokens(4, 8)?, tokens(2, 8)?, tokens(2, 16)?);
    let sequences = Some(Sequences::of_lengths(LENGTHS));
    let key_mask = Some(Tensor::arange(0u32, 84, &Device::Cpu)?.ne(3u32)?.unsqueeze(0)?);
    let options = SoftmaxOptions { mask: Mask::Causal, key_mask, sequences: sequences.clone(), ..Default::default() };
    let call = || {
        let problem = options.problem("softmax", &q, &k, &v)?;
        QuadraticCall::new(problem, [&q, &k, &v], options.key_mask.as_ref(), None)
    };
    let alone: Vec<Tensor> = call()?.parts().map(|part| part?.output()).collect::<Result<_>>()?;
    let (alone, all) = (Tensor::cat(&alone, 2)?, call()?.output()?);
    assert_same(&alone, &all)?;
    let [alone, all] = [alone.sqr()?.sum_all()?.backward()?, all.sqr()?.sum_all()?.backward()?];
    for input in [&q, &k, &v] {
        assert_same(alone.get(input).unwrap(), all.get(input).unwrap())?;
    }

    let log_decay = Some((tokens(4, 1)?.squeeze(3)?.sqr()? * -0.1)?.detach());
    let options = LinearOptions { causal: true, log_decay, sequences, ..Default::default() };
    let state = linear_attention_with_state(&q, &k, &v, &LinearOptions { log_decay: None, ..options.clone() }, None)?.1;
    let (k, v) = (tokens(4, 8)?, tokens(4, 16)?);
    let wide = |x: &Tensor| Tensor::cat(&[x, x], 1);
    let stabilizer = state.stabilizer().cloned();
    let state = LinearState::new(wide(state.s())?, wide(state.z())?, stabilizer, state.position());
    let problem = options.problem("linear", &q, &k, &v)?;
    let tensors = LinearTensors { log_decay: options.log_decay.as_ref(), state: Some(&state), ..Default::default() };
    let call = LinearCall::new(problem, [&q, &k, &v], tensors)?;
    let pairs: Vec<_> = call.parts().map(|part| part?.output_and_state()).collect::<Result<_>>()?;
    let (outs, states): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let (out, after) = call.output_and_state()?;
    assert_same(&Tensor::cat(&outs, 2)?, &out)?;
    let joined = LinearState::cat(&states)?;
    assert_same(joined.s(), after.s())?;
    assert_same(joined.z(), after.z())?;
    assert_eq!((joined.position(), after.position()), (140, 140));
    Ok(())
}

#[test]
fn pieces_of_sequences_are_the_sequences() -> Result<()> {
    let x = tokens(2, 8)?;
    let options = |lengths: &[u32]| LinearOptions {
        causal: true,
        sequences: Some(Sequences::of_lengths(lengths.iter().copied())),
        ..Default::default()
    };
    let (whole, last) = linear_attention_with_state(&x, &x, &x, &options(&LENGTHS), None)?;
    // Of each sequence its first three tokens at most, then the others.
    let starts = [0, 5, 5, 75];
    let (firsts, others) = (LENGTHS.map(|length| length.min(3)), LENGTHS.map(|length| length.saturating_sub(3)));
    let pick = |x: &Tensor, skip: [u32; 4], lengths: [u32; 4]| {
        let rows = |i: usize| x.narrow(2, starts[i] + skip[i] as usize, lengths[i] as usize);
        Tensor::cat(&(0..4).map(rows).collect::<Result<Vec<_>>>()?, 2)
    };
    let first = pick(&x, [0; 4], firsts)?;
    let (out, state) = linear_attention_with_state(&first, &first, &first, &options(&firsts), None)?;
    assert_same(&out, &pick(&whole, [0; 4], firsts)?)?;
    let second = pick(&x, firsts, others)?;
    let (out, state) = linear_attention_with_state(&second, &second, &second, &options(&others), Some(&state))?;
    let error = |x: &Tensor, y: &Tensor| (x - y)?.abs()?.max_all()?.to_scalar::<f32>();
    assert!(error(&out, &pick(&whole, firsts, others)?)? < 1e-5);
    assert!(error(state.s(), last.s())? < 1e-4);
    Ok(())
}

#[test]
fn what_has_one_position_for_all_is_refused() -> Result<()> {
    let x = tokens(1, 8)?;
    let options = MixedChunkOptions {
        chunk_size: 8,
        causal: true,
        sequences: Some(Sequences::of_lengths(LENGTHS)),
        ..Default::default()
    };
    let refused = mixed_chunk_attention_with_state(&x, &x, &x, &x, &x, &options, None);
    let message = refused.unwrap_err().to_string();
    let words = "argument `sequences` is given, needs none with a state, which has one position for all";
    assert!(message.contains(words), "{message}");
    Ok(())
}
