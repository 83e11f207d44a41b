use candle_core::{DType, Result, Tensor};

use super::{assert_close, random};
use crate::candle::*;
use crate::gau::MixedChunkOptions;
use crate::linear::LinearOptions;
use crate::performer::PerformerOptions;
use crate::transnormer::NormOptions;

type Piece<'a> = &'a dyn Fn(&Tensor, Option<&LinearState>) -> Result<(Tensor, LinearState)>;

/// Runs `piece` over pieces of x and compares with the whole.
fn assert_pieces(x: &Tensor, lengths: &[usize], whole: &Tensor, piece: Piece<'_>) -> Result<LinearState> {
    let (mut state, mut start, mut outs) = (None, 0, Vec::new());
    for &length in lengths {
        let (out, next) = piece(&x.narrow(2, start, length)?, state.as_ref())?;
        (state, start) = (Some(next), start + length);
        outs.push(out);
    }
    assert_close(&Tensor::cat(&outs, 2)?, whole, 1e-10)?;
    let state = state.expect("at least one piece");
    assert_eq!(state.position(), x.dim(2)?);
    assert!(!state.s().track_op() && !state.z().track_op());
    Ok(state)
}

#[test]
fn pieces_are_the_whole() -> Result<()> {
    let x = random(&[2, 3, 20, 4], 1)?;
    let lengths = [7, 1, 0, 12];

    let log_decay = Some(random(&[3], 2)?.abs()?.neg()?);
    let options = LinearOptions { causal: true, log_decay: log_decay.clone(), ..Default::default() };
    let whole = linear_attention(&x, &x, &x, &options)?;
    let state = assert_pieces(&x, &lengths, &whole, &|x, state| linear_attention_with_state(x, x, x, &options, state))?;
    assert_eq!((state.s().dims(), state.z().dims()), (&[2, 3, 4, 4][..], &[2, 3, 4][..]));
    assert_eq!(state.size_in_bytes(), 8 * (2 * 3 * 4 * 4 + 2 * 3 * 4));

    let options = NormOptions { causal: true, log_decay, ..Default::default() };
    let whole = norm_attention(&x, &x, &x, &options)?;
    assert_pieces(&x, &lengths, &whole, &|x, state| norm_attention_with_state(x, x, x, &options, state))?;

    let omega = random(&[8, 4], 3)?;
    let options = PerformerOptions { causal: true, ..Default::default() };
    let whole = performer_attention(&x, &x, &x, &omega, &options)?;
    let piece =
        |x: &Tensor, state: Option<&LinearState>| performer_attention_with_state(x, x, x, &omega, &options, state);
    let state = assert_pieces(&x, &lengths, &whole, &piece)?;
    assert_eq!(state.stabilizer().map(Tensor::dims), Some(&[2, 3][..]));

    let options = MixedChunkOptions { chunk_size: 4, causal: true, ..Default::default() };
    let whole = mixed_chunk_attention(&x, &x, &x, &x, &x, &options)?;
    let piece =
        |x: &Tensor, state: Option<&LinearState>| mixed_chunk_attention_with_state(x, x, x, x, x, &options, state);
    assert_pieces(&x, &[4, 8, 0, 4, 4], &whole, &piece)?;
    Ok(())
}

#[test]
fn half_precision_states_are_f32() -> Result<()> {
    let x = random(&[1, 1, 6, 4], 1)?.to_dtype(DType::BF16)?;
    let options = LinearOptions { causal: true, ..Default::default() };
    let (out, state) = linear_attention_with_state(&x, &x, &x, &options, None)?;
    assert_eq!((out.dtype(), state.s().dtype(), state.z().dtype()), (DType::BF16, DType::F32, DType::F32));
    Ok(())
}
