use super::linear::HEADS;
use super::{
    LENGTHS, assert_close, check_gradients, key_mask, normal, place_rows, qkv, random, slice_columns, slice_rows,
};
use crate::performer::{FavorMap, PerformerOptions};
use crate::reference::array::dot;
use crate::reference::{
    Array, performer_attention, performer_attention_backward, performer_attention_with_state, softmax_attention,
};
use crate::softmax::SoftmaxOptions;

const MAPS: [FavorMap; 3] = [FavorMap::Positive, FavorMap::Hyperbolic, FavorMap::Relu];

fn gradients(x: &[Array], omega: &Array, options: &PerformerOptions<Array>, d_out: &Array) -> Vec<Array> {
    let gradients = performer_attention_backward(&x[0], &x[1], &x[2], omega, options, d_out);
    vec![gradients.q, gradients.k, gradients.v]
}

#[test]
fn gradients_where_the_stabilizer_cancels() {
    let omega = normal([1, 1, 5, 3], 4);
    for map in MAPS {
        let epsilon = if map == FavorMap::Relu { 0.1 } else { 0.0 };
        for causal in [false, true] {
            for heads in HEADS {
                for lengths in LENGTHS {
                    let options = PerformerOptions {
                        map,
                        causal,
                        epsilon,
                        key_mask: Some(key_mask(2, lengths.1)),
                        sequences: None,
                    };
                    check_gradients(
                        &qkv(heads, lengths, options.key_mask.as_ref()),
                        |x| vec![performer_attention(&x[0], &x[1], &x[2], &omega, &options)],
                        |x, d| gradients(x, &omega, &options, &d[0]),
                        &format!("{heads:?} {lengths:?} {options:?}"),
                    );
                }
            }
        }
    }
}

fn exponents(x: &[f64], omega: &Array) -> Vec<f64> {
    let scaled: Vec<f64> = x.iter().map(|value| value / (x.len() as f64).powf(0.25)).collect();
    (0..omega.shape[2]).map(|f| dot(omega.row(0, 0, f), &scaled) - dot(&scaled, &scaled) / 2.0).collect()
}

/// Causal attention with positive features of one head, the stabilisers being those of `base` = [q, k].
fn with_stabilizers_of(base: &[Array], x: &[Array], omega: &Array, epsilon: f64) -> Array {
    let largest = |x: &[f64]| exponents(x, omega).into_iter().fold(f64::NEG_INFINITY, f64::max);
    let mut out = Array::zeros(x[2].shape);
    let mut running = f64::NEG_INFINITY;
    for i in 0..out.shape[2] {
        running = running.max(largest(base[1].row(0, 0, i)));
        let stabilizers = largest(base[0].row(0, 0, i)) + running;
        let mut divisor = epsilon;
        for j in 0..=i {
            let (of_q, of_k) = (exponents(x[0].row(0, 0, i), omega), exponents(x[1].row(0, 0, j), omega));
            let terms = of_q.iter().zip(&of_k).map(|(a, b)| (a + b - stabilizers).exp());
            let weight = terms.sum::<f64>() / omega.shape[2] as f64;
            divisor += weight;
            crate::reference::array::add_scaled(out.row_mut(0, 0, i), weight, x[2].row(0, 0, j));
        }
        out.row_mut(0, 0, i).iter_mut().for_each(|o| *o /= divisor);
    }
    out
}

#[test]
fn gradients_with_constant_stabilizers() {
    let omega = normal([1, 1, 5, 3], 4);
    let inputs = [random([1, 1, 7, 3], 1), random([1, 1, 7, 3], 2), random([1, 1, 7, 4], 3)];
    let options = PerformerOptions { causal: true, epsilon: 0.1, ..Default::default() };
    let expected = with_stabilizers_of(&inputs, &inputs, &omega, 0.1);
    let out = performer_attention(&inputs[0], &inputs[1], &inputs[2], &omega, &options);
    assert_close(&out, &expected, 1e-13, "out");
    check_gradients(
        &inputs,
        |x| vec![with_stabilizers_of(&inputs, x, &omega, 0.1)],
        |x, d| gradients(x, &omega, &options, &d[0]),
        "constant stabilisers",
    );
}

#[test]
fn recurrent_is_dense_and_pieces_are_the_whole() {
    let omega = normal([1, 1, 5, 3], 4);
    for map in MAPS {
        for heads in HEADS {
            for (causal, lengths) in LENGTHS.into_iter().flat_map(|lengths| [(false, lengths), (true, lengths)]) {
                let options = PerformerOptions {
                    map,
                    causal,
                    epsilon: 0.1,
                    key_mask: Some(key_mask(2, lengths.1)),
                    sequences: None,
                };
                let [q, k, v] = qkv(heads, lengths, options.key_mask.as_ref());
                let recurrent = performer_attention_with_state(&q, &k, &v, &omega, &options, None).0;
                let dense = performer_attention(&q, &k, &v, &omega, &options);
                assert_close(&recurrent, &dense, 1e-12, &format!("{heads:?} {lengths:?} {options:?}"));
            }
            let options =
                PerformerOptions { map, causal: true, epsilon: 0.1, key_mask: Some(key_mask(2, 9)), sequences: None };
            let [q, k, v] = qkv(heads, (9, 9), options.key_mask.as_ref());
            let (whole, last) = performer_attention_with_state(&q, &k, &v, &omega, &options, None);
            let (mut joined, mut state) = (Array::zeros(whole.shape), None);
            for range in [0..1, 1..4, 4..9] {
                let key_mask = options.key_mask.as_ref().map(|mask| slice_columns(mask, range.clone()));
                let part = PerformerOptions { key_mask, ..options.clone() };
                let [q, k, v] = [&q, &k, &v].map(|x| slice_rows(x, range.clone()));
                let (out, next) = performer_attention_with_state(&q, &k, &v, &omega, &part, state.as_ref());
                place_rows(&mut joined, &out, range.start);
                state = Some(next);
            }
            let state = state.expect("three pieces");
            assert_close(&joined, &whole, 1e-13, "out");
            assert_close(&state.s, &last.s, 1e-13, "S");
            assert_close(&state.z, &last.z, 1e-13, "z");
            assert_eq!(state.stabilizer, last.stabilizer);
        }
    }
}

#[test]
fn large_exponents_stay_finite() {
    let omega = normal([1, 1, 6, 3], 4);
    let [mut q, mut k, v] = qkv([1, 1, 1], (6, 6), None);
    q.data.iter_mut().chain(&mut k.data).for_each(|x| *x *= 100.0);
    for map in MAPS {
        let options = PerformerOptions { map, causal: true, ..Default::default() };
        let dense = performer_attention(&q, &k, &v, &omega, &options);
        let recurrent = performer_attention_with_state(&q, &k, &v, &omega, &options, None).0;
        assert!(dense.data.iter().all(|x| x.is_finite()));
        assert_close(&recurrent, &dense, 1e-12, &format!("{map:?}"));
    }
}

#[test]
fn many_features_estimate_softmax() {
    let omega = normal([1, 1, 20_000, 3], 4);
    let [q, k, v] = qkv([1, 1, 1], (6, 6), None);
    let expected = softmax_attention(&q, &k, &v, &SoftmaxOptions::default()).out;
    for map in [FavorMap::Positive, FavorMap::Hyperbolic] {
        let options = PerformerOptions { map, epsilon: 0.0, ..Default::default() };
        assert_close(&performer_attention(&q, &k, &v, &omega, &options), &expected, 0.01, &format!("{map:?}"));
    }
}
