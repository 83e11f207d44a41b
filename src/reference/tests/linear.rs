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
                check([2, 1, 1], lengths, &LinearOptions { map, causal, normalizer, key_mask, ..Default::default() });
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

/// Keys and everything per key at `kept`.
fn gathered(x: &Array, dimension: usize, kept: &[usize]) -> Array {
    let mut shape = x.shape;
    shape[dimension] = kept.len();
    Array::from_fn(shape, |mut at| {
        at[dimension] = kept[at[dimension]];
        x.row(at[0], at[1], at[2])[at[3]]
    })
}

#[test]
fn masked_tokens_are_not_there() {
    let kept = [1, 2, 5, 6];
    let mask = Array::from_fn([1, 1, 2, 8], |[.., j]| f64::from(kept.contains(&j)));
    let [q, k, v] = qkv([2, 2, 2], (8, 8), Some(&mask));
    let d_out = random([2, 2, 8, 4], 8);
    for log_decay in decays([2, 2, 2], 8) {
        let options = LinearOptions { causal: true, log_decay, key_mask: Some(mask.clone()), ..Default::default() };
        let without = LinearOptions {
            log_decay: options
                .log_decay
                .as_ref()
                .map(|g| if g.shape[3] == 8 { gathered(g, 3, &kept) } else { g.clone() }),
            key_mask: None,
            ..options.clone()
        };
        let (out, state) = linear_attention_with_state(&q, &k, &v, &options, None);
        let [few_q, few_k, few_v, few_d] = [&q, &k, &v, &d_out].map(|x| gathered(x, 2, &kept));
        let (few, few_state) = linear_attention_with_state(&few_q, &few_k, &few_v, &without, None);
        assert_eq!(gathered(&out, 2, &kept), few);
        assert_eq!(state, few_state);
        let mut d_kept = Array::zeros(d_out.shape);
        for [b, h, i] in super::super::quadratic::rows(&d_out).filter(|[.., i]| kept.contains(i)) {
            d_kept.row_mut(b, h, i).copy_from_slice(d_out.row(b, h, i));
        }
        let gradients = linear_attention_backward(&q, &k, &v, &options, &d_kept);
        let expected = linear_attention_backward(&few_q, &few_k, &few_v, &without, &few_d);
        assert_close(&gathered(&gradients.k, 2, &kept), &expected.k, 1e-14, "dk");
        let Some(d_decay) = gradients.log_decay else { continue };
        let few = if d_decay.shape[3] == 8 { gathered(&d_decay, 3, &kept) } else { d_decay.clone() };
        assert_close(&few, &expected.log_decay.expect("a decay"), 1e-14, "dg");
        if d_decay.shape[3] == 8 {
            assert!(gathered(&d_decay, 3, &[0, 3, 4, 7]).data.iter().all(|&d| d == 0.0));
        }
    }
}

#[test]
fn cuts_do_not_reach_later_decays() {
    let x = Array { data: vec![1.0; 3], shape: [1, 1, 3, 1] };
    let out = |cut: f64| {
        let log_decay = Some(Array { data: vec![0.0, cut, -1.0], shape: [1, 1, 1, 3] });
        let options = LinearOptions {
            map: FeatureMap::Identity,
            causal: true,
            normalizer: None,
            log_decay,
            ..Default::default()
        };
        let recurrent = linear_attention_with_state(&x, &x, &x, &options, None).0;
        let gradients = linear_attention_backward(&x, &x, &x, &options, &x);
        assert_eq!(recurrent, linear_attention(&x, &x, &x, &options));
        let d_decay = gradients.log_decay.expect("a decay").data;
        assert_eq!(d_decay[..2], [0.0, 0.0]);
        assert!((d_decay[2] - (-1f64).exp()).abs() < 1e-15);
        recurrent.data
    };
    for cut in [f64::NEG_INFINITY, f64::MIN, f64::from(f32::MIN), -1e12, -1e9] {
        let out = out(cut);
        assert_eq!(out[..2], [1.0, 1.0]);
        assert!((out[2] - (1.0 + (-1f64).exp())).abs() < 1e-15, "{cut}: {out:?}");
    }
}

#[test]
fn cosine_of_extreme_rows() {
    let ordinary = random([1, 1, 4, 3], 9);
    let options = LinearOptions { map: FeatureMap::Cosine, normalizer: None, ..Default::default() };
    let (v, d_out) = (random([1, 1, 4, 4], 10), random([1, 1, 4, 4], 11));
    let expected = linear_attention(&ordinary, &ordinary, &v, &options);
    let d_expected = linear_attention_backward(&ordinary, &ordinary, &v, &options, &d_out);
    for scale in [2f64.powi(-1000), 2f64.powi(900)] {
        let scaled = |x: &Array, scale: f64| Array { data: x.data.iter().map(|x| x * scale).collect(), ..x.clone() };
        let x = scaled(&ordinary, scale);
        assert_close(&linear_attention(&x, &x, &v, &options), &expected, 1e-15, "out");
        let gradients = linear_attention_backward(&x, &x, &v, &options, &d_out);
        assert_close(&scaled(&gradients.q, scale), &d_expected.q, 1e-14, "dq");
        assert_close(&scaled(&gradients.k, scale), &d_expected.k, 1e-14, "dk");
    }
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
