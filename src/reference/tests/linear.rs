use super::{LENGTHS, assert_close, check_gradients, key_mask, place_rows, qkv, random, slice_columns, slice_rows};
use crate::linear::{FeatureMap, LinearOptions};
use crate::reference::{Array, linear_attention, linear_attention_backward, linear_attention_with_state};

pub(super) const MAPS: [FeatureMap; 9] = [
    FeatureMap::Identity,
    FeatureMap::EluPlusOne,
    FeatureMap::Relu,
    FeatureMap::ReluSquared,
    FeatureMap::Silu,
    FeatureMap::Exp,
    FeatureMap::Softmax,
    FeatureMap::Taylor,
    FeatureMap::Cosine,
];

/// Heads of q, k, v.
pub(super) const HEADS: [[usize; 3]; 6] = [[2, 2, 2], [4, 2, 2], [1, 1, 3], [2, 1, 4], [3, 3, 1], [4, 1, 2]];

/// No decay, decay per head, decay per head and token.
pub(super) fn decays(heads: [usize; 3], keys: usize) -> [Option<Array>; 3] {
    let state_heads = heads[1].max(heads[2]);
    let negative = |shape, seed| {
        let mut g = random(shape, seed);
        g.data.iter_mut().for_each(|g| *g = -g.abs());
        g
    };
    [None, Some(negative([1, 1, 1, state_heads], 5)), Some(negative([1, 2, state_heads, keys], 6))]
}

fn check(heads: [usize; 3], lengths: (usize, usize), options: &LinearOptions<Array>) {
    let mut inputs = qkv(heads, lengths, options.key_mask.as_ref()).to_vec();
    inputs.extend(options.log_decay.clone());
    let what = format!("{heads:?} {lengths:?} {options:?}");
    let with_decay = |x: &[Array]| LinearOptions { log_decay: x.get(3).cloned(), ..options.clone() };
    let forward = |x: &[Array]| linear_attention(&x[0], &x[1], &x[2], &with_decay(x));
    let recurrent = linear_attention_with_state(&inputs[0], &inputs[1], &inputs[2], options, None).0;
    assert_close(&recurrent, &forward(&inputs), 1e-11, &format!("{what}: recurrent"));
    check_gradients(
        &inputs,
        |x| vec![forward(x)],
        |x, d| {
            let gradients = linear_attention_backward(&x[0], &x[1], &x[2], &with_decay(x), &d[0]);
            let all = [Some(gradients.q), Some(gradients.k), Some(gradients.v), gradients.log_decay];
            all.into_iter().flatten().collect()
        },
        &what,
    );
}

#[test]
fn gradients_and_recurrence_of_every_map() {
    for map in MAPS {
        // A signed denominator is not kept away from 0.
        let positive = !matches!(map, FeatureMap::Identity | FeatureMap::Silu);
        for causal in [false, true] {
            for lengths in LENGTHS {
                let key_mask = Some(key_mask(2, lengths.1));
                let normalizer = positive.then_some(1e-1);
                check([2, 1, 1], lengths, &LinearOptions { map, causal, normalizer, key_mask, log_decay: None });
                check([2, 2, 2], lengths, &LinearOptions { map, causal, normalizer: None, ..Default::default() });
            }
        }
    }
}

#[test]
fn gradients_and_recurrence_of_every_decay_and_grouping() {
    for heads in HEADS {
        for lengths in LENGTHS {
            for log_decay in decays(heads, lengths.1) {
                for key_mask in [None, Some(key_mask(2, lengths.1))] {
                    let log_decay = log_decay.clone();
                    check(heads, lengths, &LinearOptions { causal: true, log_decay, key_mask, ..Default::default() });
                }
            }
        }
    }
}

#[test]
fn pieces_are_the_whole() {
    for heads in HEADS {
        for log_decay in decays(heads, 9) {
            let options =
                LinearOptions { causal: true, log_decay, key_mask: Some(key_mask(2, 9)), ..Default::default() };
            let [q, k, v] = qkv(heads, (9, 9), options.key_mask.as_ref());
            let (whole, last) = linear_attention_with_state(&q, &k, &v, &options, None);
            let (mut joined, mut state) = (Array::zeros(whole.shape), None);
            for range in [0..3, 3..4, 4..4, 4..9] {
                let per_token = |x: Array| if x.shape[3] == 9 { slice_columns(&x, range.clone()) } else { x };
                let part = LinearOptions {
                    log_decay: options.log_decay.clone().map(per_token),
                    key_mask: options.key_mask.clone().map(per_token),
                    ..options.clone()
                };
                let [q, k, v] = [&q, &k, &v].map(|x| slice_rows(x, range.clone()));
                let (out, next) = linear_attention_with_state(&q, &k, &v, &part, state.as_ref());
                place_rows(&mut joined, &out, range.start);
                state = Some(next);
            }
            let state = state.expect("four pieces");
            assert_close(&joined, &whole, 1e-13, "out");
            assert_close(&state.s, &last.s, 1e-13, "S");
            assert_close(&state.z, &last.z, 1e-13, "z");
        }
    }
}

#[test]
fn full_attention_reads_the_last_state() {
    let [q, k, v] = qkv([2, 2, 2], (6, 6), None);
    let full = LinearOptions::default();
    let cut = |x: &Array, range| slice_rows(x, range);
    let state = linear_attention_with_state(&q, &cut(&k, 0..4), &cut(&v, 0..4), &full, None).1;
    let out = linear_attention_with_state(&q, &cut(&k, 4..6), &cut(&v, 4..6), &full, Some(&state)).0;
    assert_close(&out, &linear_attention(&q, &k, &v, &full), 1e-13, "out");
}

#[test]
fn a_decay_of_minus_infinity_forgets() {
    let [q, k, v] = qkv([1, 1, 1], (6, 6), None);
    let g = Array::from_fn([1, 2, 1, 6], |[_, _, _, t]| if t == 3 { f64::NEG_INFINITY } else { -0.1 });
    let options = LinearOptions { causal: true, log_decay: Some(g.clone()), ..Default::default() };
    let whole = linear_attention(&q, &k, &v, &options);
    assert_close(&linear_attention_with_state(&q, &k, &v, &options, None).0, &whole, 1e-13, "recurrent");
    let [q, k, v] = [&q, &k, &v].map(|x| slice_rows(x, 3..6));
    let rest = LinearOptions { log_decay: Some(slice_columns(&g, 3..6)), ..options };
    assert_close(&slice_rows(&whole, 3..6), &linear_attention(&q, &k, &v, &rest), 1e-13, "after the reset");
}

#[test]
fn zero_rows_of_cosine_have_no_gradient() {
    let [mut q, k, v] = qkv([1, 1, 1], (4, 4), None);
    q.row_mut(0, 0, 1).fill(0.0);
    let options = LinearOptions { map: FeatureMap::Cosine, ..Default::default() };
    let gradients = linear_attention_backward(&q, &k, &v, &options, &random([2, 1, 4, 4], 4));
    assert_eq!(gradients.q.row(0, 0, 1), [0.0; 3]);
}

#[test]
fn a_zero_divisor_gives_zero() {
    let [q, mut k, v] = qkv([1, 1, 1], (4, 4), None);
    k.data.fill(-1.0);
    let options = LinearOptions { map: FeatureMap::Relu, normalizer: Some(0.0), ..Default::default() };
    assert!(linear_attention(&q, &k, &v, &options).data.iter().all(|&x| x == 0.0));
    let gradients = linear_attention_backward(&q, &k, &v, &options, &random([2, 1, 4, 4], 4));
    assert!(gradients.q.data.iter().chain(&gradients.k.data).all(|&x| x == 0.0));
}
