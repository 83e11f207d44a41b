//! Gradients through states: a sequence in pieces trains as the whole, until it is detached.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::formulas::{decays, elu_plus_one, mix, scores};
use super::{assert_close, assert_same_gradients, loss, random, variable};
use crate::candle::nn::Rotary;
use crate::candle::*;
use crate::gau::{GlobalNorm, MixedChunkOptions};
use crate::linear::{FeatureMap, LinearOptions};
use crate::performer::{FavorMap, PerformerOptions};
use crate::transnormer::{NormOptions, NormScope};

/// The inputs of an operation: q, k, v, a log-decay per token, and for mixed chunks q and k of the global branch.
struct Inputs {
    variables: Vec<Var>,
    lengths: &'static [usize],
}

type Operation<'a> = &'a dyn Fn(&[Tensor], Option<&LinearState>) -> Result<(Tensor, LinearState)>;

impl Inputs {
    fn new(lengths: &'static [usize]) -> Result<Self> {
        let tokens = lengths.iter().sum();
        let shapes: [&[usize]; 6] = [
            &[2, 4, tokens, 6],
            &[2, 2, tokens, 6],
            &[2, 2, tokens, 5],
            &[2, 2, tokens],
            &[2, 4, tokens, 6],
            &[2, 2, tokens, 6],
        ];
        let variables = shapes.iter().zip(1..).map(|(shape, seed)| variable(shape, seed)).collect::<Result<_>>()?;
        Ok(Self { variables, lengths })
    }

    fn piece(&self, start: usize, length: usize) -> Result<Vec<Tensor>> {
        self.variables.iter().map(|x| x.narrow(2, start, length)).collect()
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Output over all pieces, and the last state, from `first`. `between` is what happens to a state on its way.
    fn run(
        &self,
        operation: Operation<'_>,
        first: Option<&LinearState>,
        between: fn(&LinearState) -> LinearState,
    ) -> Result<(Tensor, LinearState)> {
        let (mut state, mut start, mut outs) = (first.cloned(), 0, Vec::new());
        for &length in self.lengths {
            let (out, next) = operation(&self.piece(start, length)?, state.as_ref())?;
            (state, start) = (Some(between(&next)), start + length);
            outs.push(out);
        }
        Ok((Tensor::cat(&outs, 2)?, state.expect("at least one piece")))
    }

    /// A state that is tracked, as after a few tokens.
    fn first(&self, operation: Operation<'_>, tokens: usize) -> Result<(LinearState, [Var; 2])> {
        let few: Vec<Tensor> = self.piece(0, tokens)?.iter().map(Tensor::detach).collect();
        let (_, state) = operation(&few, None)?;
        let sums = [Var::from_tensor(state.s())?, Var::from_tensor(state.z())?];
        let [s, z] = sums.each_ref().map(|sums| sums.as_tensor().clone());
        Ok((LinearState::new(s, z, state.stabilizer().cloned(), state.position()), sums))
    }
}

fn all(out: &Tensor, state: &LinearState) -> Result<Tensor> {
    (loss(out)? + loss(state.s())?)? + loss(state.z())?
}

/// The pieces give the gradients of the whole, of the loss of the output alone and with the last state, from nothing and
/// from a state that is tracked itself. `used` are the variables that the operation reads.
fn assert_trains(operation: Operation<'_>, lengths: &'static [usize], used: &[usize], first: usize) -> Result<()> {
    let inputs = Inputs::new(lengths)?;
    let whole = inputs.piece(0, inputs.tokens())?;
    let variables: Vec<&Var> = used.iter().map(|&index| &inputs.variables[index]).collect();

    let (out, _) = operation(&whole, None)?;
    let (cut, _) = inputs.run(operation, None, LinearState::clone)?;
    assert_same_gradients(&loss(&cut)?, &loss(&out)?, &variables)?;

    let (state, sums) = inputs.first(operation, first)?;
    let with_sums: Vec<&Var> = variables.iter().copied().chain(&sums).collect();
    let (out, last) = operation(&whole, Some(&state))?;
    let (cut, cut_last) = inputs.run(operation, Some(&state), LinearState::clone)?;
    assert_eq!(cut_last.position(), last.position());
    assert_same_gradients(&all(&cut, &cut_last)?, &all(&out, &last)?, &with_sums)?;
    // S alone: no output of the last piece counts.
    let keys = if used.contains(&5) { 5 } else { 1 };
    let of_keys = [&inputs.variables[keys], &inputs.variables[2], &sums[0]];
    assert_same_gradients(&loss(cut_last.s())?, &loss(last.s())?, &of_keys)
}

fn decay(x: &[Tensor]) -> Result<Option<Tensor>> {
    Ok(Some((x[3].sqr()? * -0.4)?))
}

#[test]
fn linear() -> Result<()> {
    let lengths = &[7, 1, 0, 40];
    for map in [FeatureMap::EluPlusOne, FeatureMap::Softmax, FeatureMap::Taylor, FeatureMap::Cosine] {
        let options = LinearOptions { map, causal: true, ..Default::default() };
        assert_trains(
            &|x, state| linear_attention_with_state(&x[0], &x[1], &x[2], &options, state),
            lengths,
            &[0, 1, 2],
            5,
        )?;
    }
    let log_decay = Some(random(&[2], 9)?.abs()?.neg()?);
    let retention =
        LinearOptions { map: FeatureMap::Identity, causal: true, normalizer: None, log_decay, ..Default::default() };
    assert_trains(
        &|x, state| linear_attention_with_state(&x[0], &x[1], &x[2], &retention, state),
        lengths,
        &[0, 1, 2],
        5,
    )?;
    let per_token = |x: &[Tensor], state: Option<&LinearState>| {
        let options = LinearOptions { causal: true, log_decay: decay(x)?, ..Default::default() };
        linear_attention_with_state(&x[0], &x[1], &x[2], &options, state)
    };
    assert_trains(&per_token, lengths, &[0, 1, 2, 3], 5)
}

#[test]
fn norm() -> Result<()> {
    for norm in [NormScope::Head, NormScope::AllHeads] {
        let operation = |x: &[Tensor], state: Option<&LinearState>| {
            let options = NormOptions { causal: true, epsilon: 0.1, norm, log_decay: decay(x)?, ..Default::default() };
            norm_attention_with_state(&x[0], &x[1], &x[2], &options, state)
        };
        assert_trains(&operation, &[3, 20, 9], &[0, 1, 2, 3], 5)?;
    }
    Ok(())
}

#[test]
fn performer() -> Result<()> {
    let omega = random(&[8, 6], 30)?;
    for map in [FavorMap::Positive, FavorMap::Hyperbolic, FavorMap::Relu] {
        let options = PerformerOptions { map, causal: true, ..Default::default() };
        let operation = |x: &[Tensor], state: Option<&LinearState>| {
            performer_attention_with_state(&x[0], &x[1], &x[2], &omega, &options, state)
        };
        assert_trains(&operation, &[12, 1, 30], &[0, 1, 2], 5)?;
        let rotary = Rotary::new(map.feature_width(8), 100.0)?;
        let operation = |x: &[Tensor], state: Option<&LinearState>| {
            rotary_performer_attention_with_state(&x[0], &x[1], &x[2], &omega, &rotary, &options, state)
        };
        assert_trains(&operation, &[12, 1, 30], &[0, 1, 2], 5)?;
    }
    Ok(())
}

#[test]
fn rotary() -> Result<()> {
    let rotary = Rotary::new(6, 100.0)?;
    for map in [FeatureMap::EluPlusOne, FeatureMap::Cosine] {
        let operation = |x: &[Tensor], state: Option<&LinearState>| {
            let options = LinearOptions { map, causal: true, log_decay: decay(x)?, ..Default::default() };
            rotary_linear_attention_with_state(&x[0], &x[1], &x[2], &rotary, &options, state)
        };
        assert_trains(&operation, &[12, 1, 30], &[0, 1, 2, 3], 5)?;
        let operation = |x: &[Tensor], state: Option<&LinearState>| {
            let options = NormOptions { map, causal: true, epsilon: 0.1, ..Default::default() };
            rotary_norm_attention_with_state(&x[0], &x[1], &x[2], &rotary, &options, state)
        };
        assert_trains(&operation, &[12, 1, 30], &[0, 1, 2], 5)?;
    }
    Ok(())
}

#[test]
fn mixed_chunk() -> Result<()> {
    for global_norm in [GlobalNorm::Mean, GlobalNorm::Chunk] {
        let options = MixedChunkOptions { chunk_size: 4, causal: true, global_norm, ..Default::default() };
        let operation = |x: &[Tensor], state: Option<&LinearState>| {
            mixed_chunk_attention_with_state(&x[0], &x[1], &x[4], &x[5], &x[2], &options, state)
        };
        assert_trains(&operation, &[8, 4, 20, 6], &[0, 1, 2, 4, 5], 4).map_err(|error| error.context("mixed chunk"))?;
    }
    Ok(())
}

/// The gradient that a state gives back is that of candle for the plain formula.
#[test]
fn plain_formula() -> Result<()> {
    let (q, k, v) = (variable(&[2, 2, 7, 3], 1)?, variable(&[2, 2, 7, 3], 2)?, variable(&[2, 2, 7, 4], 3)?);
    let (raw, s, z) = (variable(&[2, 2, 7], 4)?, variable(&[2, 2, 3, 4], 5)?, variable(&[2, 2, 3], 6)?);
    let log_decay = raw.sqr()?.neg()?;
    let options =
        LinearOptions { causal: true, normalizer: None, log_decay: Some(log_decay.clone()), ..Default::default() };
    let state = LinearState::new(s.as_tensor().clone(), z.as_tensor().clone(), None, 3);
    let (out, last) = linear_attention_with_state(&q, &k, &v, &options, Some(&state))?;

    let (phi_q, phi_k) = (elu_plus_one(&q)?, elu_plus_one(&k)?);
    let between = decays(&log_decay)?;
    // What is left of the first state at each token, and of each token at the last.
    let rest = (between.narrow(3, 0, 1)?.squeeze(3)? * log_decay.narrow(2, 0, 1)?.exp()?.broadcast_as((2, 2, 7))?)?;
    let at_end = between.narrow(2, 6, 1)?.squeeze(2)?.unsqueeze(3)?;
    let weights = (scores(&phi_q, &phi_k)? * &between)?;
    let theirs = (mix(&weights, &v)? + phi_q.broadcast_mul(&rest.unsqueeze(3)?)?.matmul(&s)?)?;
    let left = phi_k.broadcast_mul(&at_end)?;
    let end = rest.narrow(2, 6, 1)?;
    let last_s = (left.transpose(2, 3)?.contiguous()?.matmul(&v)? + s.broadcast_mul(&end.unsqueeze(3)?)?)?;
    let last_z = (left.sum(2)? + z.broadcast_mul(&end)?)?;
    let theirs = ((loss(&theirs)? + loss(&last_s)?)? + loss(&last_z)?)?;
    assert_same_gradients(&all(&out, &last)?, &theirs, &[&q, &k, &v, &raw, &s, &z])
}

/// Behind a detached state there is no gradient, before it that of its own piece.
#[test]
fn detached_states_truncate() -> Result<()> {
    let options = LinearOptions { causal: true, ..Default::default() };
    let operation =
        |x: &[Tensor], state: Option<&LinearState>| linear_attention_with_state(&x[0], &x[1], &x[2], &options, state);
    let inputs = Inputs::new(&[9, 14, 5])?;
    let (out, state) = inputs.run(&operation, None, LinearState::detach)?;
    assert!(out.track_op() && !state.s().track_op() && !state.z().track_op());
    let truncated = loss(&out)?.backward()?;
    // Each piece after the state of the pieces before as a constant.
    let weights = random(out.dims(), 77)?;
    let (mut start, mut state) = (0, None);
    for &length in inputs.lengths {
        let (out, next) = operation(&inputs.piece(start, length)?, state.as_ref())?;
        let alone = (out * weights.narrow(2, start, length)?)?.sum_all()?.backward()?;
        for variable in &inputs.variables[..3] {
            let [alone, truncated] =
                [&alone, &truncated].map(|all| all.get(variable).expect("a gradient").narrow(2, start, length));
            assert_close(&truncated?, &alone?, 1e-12)?;
        }
        let constant = |x: &Tensor| Tensor::from_vec(x.flatten_all()?.to_vec1::<f64>()?, x.shape(), &Device::Cpu);
        (state, start) =
            (Some(LinearState::new(constant(next.s())?, constant(next.z())?, None, next.position())), start + length);
    }
    Ok(())
}

#[test]
fn what_is_not_tracked_stays_so() -> Result<()> {
    let options = LinearOptions { causal: true, ..Default::default() };
    let (x, tracked) = (random(&[1, 2, 5, 3], 1)?, variable(&[1, 2, 5, 3], 2)?);
    let (out, state) = linear_attention_with_state(&x, &x, &x, &options, None)?;
    assert!(!out.track_op() && state.tensors().all(|tensor| !tensor.track_op()));
    // Any one of them is enough, a state as well.
    let (out, state) = linear_attention_with_state(&x, &x, &tracked, &options, Some(&state))?;
    assert!(out.track_op() && state.tensors().all(Tensor::track_op));
    let (out, last) = linear_attention_with_state(&x, &x, &x, &options, Some(&state))?;
    assert!(out.track_op() && last.tensors().all(Tensor::track_op));
    let gradients = loss(&out)?.backward()?;
    let gradient = gradients.get(&tracked).expect("a gradient").sqr()?.sum_all()?.to_scalar::<f64>()?;
    assert!(gradient > 0.0);
    // Twice the same way back.
    let again = loss(&out)?.backward()?;
    assert_close(gradients.get(&tracked).unwrap(), again.get(&tracked).unwrap(), 0.0)
}

#[test]
fn half_precision() -> Result<()> {
    let options = LinearOptions { causal: true, ..Default::default() };
    let x = Var::from_tensor(&random(&[1, 2, 40, 8], 1)?.to_dtype(DType::BF16)?)?;
    let halves = [x.narrow(2, 0, 30)?, x.narrow(2, 30, 10)?];
    let (first, state) = linear_attention_with_state(&halves[0], &halves[0], &halves[0], &options, None)?;
    let (second, _) = linear_attention_with_state(&halves[1], &halves[1], &halves[1], &options, Some(&state))?;
    let cut = loss(&Tensor::cat(&[first, second], 2)?)?.backward()?;
    let whole = loss(&linear_attention(&x, &x, &x, &options)?)?.backward()?;
    let [cut, whole] = [cut, whole].map(|gradients| gradients.get(&x).expect("a gradient").to_dtype(DType::F32));
    let (cut, whole) = (cut?, whole?);
    let error = (&cut - &whole)?.abs()?.max_all()?.to_scalar::<f32>()?;
    let largest = whole.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(error <= largest / 64.0, "{error} of {largest}");
    Ok(())
}
