//! Whole calls on slices: the results of the reference, states that continue, and refusals.

use attn_kernels::cpu::{self, LinearState};
use attn_kernels::problem::View;
use attn_kernels::{GauOptions, LinearOptions, MixedChunkOptions, SoftmaxOptions};

use crate::agreement;
use crate::common::backends::Calls;
use crate::common::cases;

/// Longer ones pass through the same code: the engines have them.
const LONGEST: usize = 130;

#[test]
fn every_operation_agrees_with_the_reference() {
    for mut cases in cases::lists() {
        cases.retain(|case| case.queries.max(case.keys) <= LONGEST);
        assert!(cases.len() > 10, "{}: {} cases", cases[0].operation.name(), cases.len());
        agreement::check(&cases, &[Box::new(Calls)]);
    }
}

/// Numbers in [−1, 1].
fn wave(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin()).collect()
}

fn largest_difference(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn pieces_of_mixed_chunks_are_the_whole() -> attn_kernels::Result<()> {
    let x = wave(40 * 8, 0.37);
    let options = MixedChunkOptions { chunk_size: 8, causal: true, ..Default::default() };
    let part =
        |range: std::ops::Range<usize>| View::contiguous(&x[range.start * 8..range.end * 8], &[1, 1, range.len(), 8]);
    let whole = cpu::mixed_chunk::<f32>([part(0..40)?; 2], [part(0..40)?; 2], part(0..40)?, &options)?;
    let (mut out, mut state) = (Vec::new(), None);
    for range in [0..16, 16..24, 24..40] {
        let piece = part(range)?;
        let before = state.take();
        let (call, after) =
            cpu::mixed_chunk_with_state::<f32>([piece; 2], [piece; 2], piece, &options, before.as_ref())?;
        out.extend(call.out);
        state = Some(after);
    }
    assert!(largest_difference(&out, &whole.out) < 1e-6);
    assert_eq!(state.as_ref().map(|state| state.position), Some(40));

    let (_, inside) =
        cpu::mixed_chunk_with_state::<f32>([part(0..4)?; 2], [part(0..4)?; 2], part(0..4)?, &options, None)?;
    let piece = part(4..8)?;
    let refused = cpu::mixed_chunk_with_state::<f32>([piece; 2], [piece; 2], piece, &options, Some(&inside));
    assert_eq!(
        refused.unwrap_err().to_string(),
        "cpu::mixed_chunk_with_state: argument `state` is at position 4, needs a position at the end of a chunk of 8"
    );
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> attn_kernels::Result<()> {
    let (x, wide) = (wave(24, 0.7), vec![0f64; 24]);
    let (q, wide) = (View::contiguous(&x[..], &[1, 2, 3, 4])?, View::contiguous(&wide[..], &[1, 2, 3, 4])?);
    let said = |refused: attn_kernels::Result<()>| refused.unwrap_err().to_string();

    let call = cpu::softmax::<f32>(wide, wide, wide, &SoftmaxOptions::default());
    assert_eq!(
        said(call.map(drop)),
        "cpu::softmax: argument `q` has dtype f64, needs f32, the type that the results are asked for in"
    );
    let call = cpu::softmax::<f32>(q, q, q, &SoftmaxOptions::default())?;
    assert_eq!(
        said(call.backward(&x[..23]).map(drop)),
        "cpu::softmax: argument `d_out` has 23 elements, needs those of a tensor [1, 2, 3, 4]"
    );
    assert!(said(call.backward_with_statistic(&x, &x[..5]).map(drop)).contains("`d_statistic` has 5 elements"));
    let call = cpu::gau::<f32>(q, q, q, &GauOptions::default())?;
    assert!(said(call.backward_with_statistic(&x, &x[..6]).map(drop)).contains("needs softmax"));

    let full = LinearOptions::default();
    assert!(said(cpu::linear_with_state::<f32>(q, q, q, &full, None).map(drop)).contains("`true` to carry a state"));
    let causal = LinearOptions { causal: true, ..Default::default() };
    let (_, state) = cpu::linear_with_state::<f32>(q, q, q, &causal, None)?;
    let with = |state: &LinearState<f32>| said(cpu::linear_with_state::<f32>(q, q, q, &causal, Some(state)).map(drop));
    assert!(with(&LinearState { s: vec![0.0; 5], ..state.clone() }).contains("`state.s` has 5 elements"));
    assert!(with(&LinearState { stabilizer: Some(vec![0.0; 2]), ..state.clone() }).contains("`state.stabilizer`"));
    Ok(())
}
