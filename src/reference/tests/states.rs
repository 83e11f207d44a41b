//! Gradients through the states at both ends, against central differences.

use super::linear::{HEADS, MAPS, decays};
use super::{LENGTHS, check_gradients, key_mask, normal, qkv, random};
use crate::linear::{FeatureMap, LinearOptions};
use crate::performer::{FavorMap, PerformerOptions};
use crate::reference::{
    Array, Gradients, State, StateGradient, linear_attention_with_state, linear_attention_with_state_backward,
    norm_attention_with_state, norm_attention_with_state_backward, performer_attention_with_state,
    performer_attention_with_state_backward,
};
use crate::transnormer::{NormOptions, NormScope};

/// q, k, v, then S and z of two batch entries and the log-decay. No divisor is near 0 for positive features.
fn inputs(
    heads: [usize; 3],
    lengths: (usize, usize),
    features: usize,
    key_mask: Option<&Array>,
    log_decay: Option<&Array>,
) -> Vec<Array> {
    let state_heads = heads[1].max(heads[2]);
    let mut z = random([2, 1, state_heads, features], 21);
    z.data.iter_mut().for_each(|z| *z = z.abs() + 0.5);
    let sums = [random([2, state_heads, features, 4], 20), z];
    qkv(heads, lengths, key_mask).into_iter().chain(sums).chain(log_decay.cloned()).collect()
}

fn state(x: &[Array], stabilizer: Option<f64>) -> State {
    let heads = x[3].shape[1];
    let stabilizer = stabilizer.map(|c| Array::filled([1, 1, 2, heads], c));
    State { s: x[3].clone(), z: x[4].clone(), stabilizer }
}

/// S and z in another unit than their stabiliser.
fn in_unit(state: &State, unit: Option<&Array>) -> [Array; 2] {
    let factor = |b: usize, h: usize| match (&state.stabilizer, unit) {
        (Some(c), Some(unit)) => (c.row(0, 0, b)[h] - unit.row(0, 0, b)[h]).exp(),
        _ => 1.0,
    };
    let s = Array::from_fn(state.s.shape, |[b, h, f, c]| factor(b, h) * state.s.row(b, h, f)[c]);
    let z = Array::from_fn(state.z.shape, |[b, _, h, f]| factor(b, h) * state.z.row(b, 0, h)[f]);
    [s, z]
}

fn check(
    inputs: &[Array],
    forward: impl Fn(&[Array]) -> (Array, State),
    backward: impl Fn(&[Array], &Array, &StateGradient) -> (Gradients, StateGradient),
    what: &str,
) {
    let unit = forward(inputs).1.stabilizer;
    check_gradients(
        inputs,
        |x| {
            let (out, last) = forward(x);
            std::iter::once(out).chain(in_unit(&last, unit.as_ref())).collect()
        },
        |x, d| {
            let d_state = StateGradient { s: d[1].clone(), z: d[2].clone() };
            let (Gradients { q, k, v, log_decay, .. }, first) = backward(x, &d[0], &d_state);
            [q, k, v, first.s, first.z].into_iter().chain(log_decay).collect()
        },
        what,
    );
}

fn check_linear(heads: [usize; 3], lengths: (usize, usize), options: &LinearOptions<Array>) {
    let (mask, log_decay) = (options.key_mask.as_ref(), options.log_decay.as_ref());
    let inputs = inputs(heads, lengths, options.map.feature_width(3), mask, log_decay);
    let with_decay = |x: &[Array]| LinearOptions { log_decay: x.get(5).cloned(), ..options.clone() };
    check(
        &inputs,
        |x| linear_attention_with_state(&x[0], &x[1], &x[2], &with_decay(x), Some(&state(x, None))),
        |x, d, d_state| {
            let first = state(x, None);
            let options = with_decay(x);
            linear_attention_with_state_backward(&x[0], &x[1], &x[2], &options, Some(&first), (d, Some(d_state)))
        },
        &format!("{heads:?} {lengths:?} {options:?}"),
    );
}

#[test]
fn linear() {
    for map in MAPS {
        let positive = !matches!(map, FeatureMap::Identity | FeatureMap::Silu);
        for causal in [false, true] {
            for lengths in LENGTHS {
                let key_mask = Some(key_mask(2, lengths.1));
                let normalizer = positive.then_some(1e-1);
                let options = LinearOptions { map, causal, normalizer, key_mask, ..Default::default() };
                check_linear([2, 1, 1], lengths, &options);
            }
        }
    }
    for heads in HEADS {
        for log_decay in decays(heads, 8) {
            let key_mask = Some(key_mask(2, 8));
            let options = LinearOptions { causal: true, log_decay, key_mask, ..Default::default() };
            check_linear(heads, (5, 8), &options);
        }
    }
}

#[test]
fn norm() {
    let heads = [4, 2, 2];
    for (norm, log_decay) in [NormScope::Head, NormScope::AllHeads, NormScope::Head].into_iter().zip(decays(heads, 8)) {
        let options = NormOptions { causal: true, epsilon: 0.1, norm, log_decay, ..Default::default() };
        let inputs = inputs(heads, (5, 8), 3, None, options.log_decay.as_ref());
        let with_decay = |x: &[Array]| NormOptions { log_decay: x.get(5).cloned(), ..options.clone() };
        check(
            &inputs,
            |x| norm_attention_with_state(&x[0], &x[1], &x[2], &with_decay(x), Some(&state(x, None))),
            |x, d, d_state| {
                let first = state(x, None);
                let options = with_decay(x);
                norm_attention_with_state_backward(&x[0], &x[1], &x[2], &options, Some(&first), (d, Some(d_state)))
            },
            &format!("{options:?}"),
        );
    }
}

#[test]
fn performer() {
    let omega = normal([1, 1, 5, 3], 4);
    for (map, stabilizer) in [
        (FavorMap::Positive, Some(-9.0)),
        (FavorMap::Positive, Some(0.2)),
        (FavorMap::Hyperbolic, Some(9.0)),
        (FavorMap::Relu, None),
    ] {
        for causal in [false, true] {
            let epsilon = if map == FavorMap::Relu { 0.1 } else { 0.0 };
            let key_mask = Some(key_mask(2, 8));
            let options = PerformerOptions { map, causal, epsilon, key_mask, sequences: None };
            let inputs = inputs([4, 2, 2], (5, 8), map.feature_width(5), options.key_mask.as_ref(), None);
            let first = |x: &[Array]| state(x, stabilizer);
            check(
                &inputs,
                |x| performer_attention_with_state(&x[0], &x[1], &x[2], &omega, &options, Some(&first(x))),
                |x, d, d_state| {
                    let [q, k, v] = [&x[0], &x[1], &x[2]];
                    let (first, d_state) = (first(x), Some(d_state));
                    performer_attention_with_state_backward(q, k, v, &omega, &options, Some(&first), (d, d_state))
                },
                &format!("{stabilizer:?} {options:?}"),
            );
        }
    }
}
