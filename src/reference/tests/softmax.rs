use super::{LENGTHS, MASKS, assert_close, check_gradients, key_mask, qkv, random};
use crate::problem::Mask;
use crate::reference::{Array, SoftmaxOutput, softmax_attention, softmax_attention_backward};
use crate::softmax::SoftmaxOptions;

/// Checks all gradients; inputs are q, k, v, and bias, attention bias and sinks of the options, if any.
fn check(heads: [usize; 3], lengths: (usize, usize), options: &SoftmaxOptions<Array>, with_statistic: bool) {
    let mut inputs = qkv(heads, lengths, options.key_mask.as_ref()).to_vec();
    inputs.extend([&options.bias, &options.attention_bias, &options.sinks].into_iter().flatten().cloned());
    let with_inputs = |x: &[Array]| {
        let mut rest = x[3..].iter().cloned();
        let bias = options.bias.as_ref().and_then(|_| rest.next());
        let attention_bias = options.attention_bias.as_ref().and_then(|_| rest.next());
        let sinks = options.sinks.as_ref().and_then(|_| rest.next());
        SoftmaxOptions { bias, attention_bias, sinks, ..options.clone() }
    };
    let forward = |x: &[Array]| {
        let SoftmaxOutput { out, log_sum_exp } = softmax_attention(&x[0], &x[1], &x[2], &with_inputs(x));
        if with_statistic { vec![out, log_sum_exp] } else { vec![out] }
    };
    let backward = |x: &[Array], d: &[Array]| {
        let gradients = softmax_attention_backward(&x[0], &x[1], &x[2], &with_inputs(x), &d[0], d.get(1));
        let beside = [gradients.bias, gradients.attention_bias, gradients.sinks];
        [gradients.q, gradients.k, gradients.v].into_iter().chain(beside.into_iter().flatten()).collect()
    };
    check_gradients(&inputs, forward, backward, &format!("{lengths:?} {options:?}"));
}

#[test]
fn gradients_under_every_mask() {
    for mask in MASKS {
        for lengths in LENGTHS {
            check([4, 2, 2], lengths, &SoftmaxOptions { mask, ..Default::default() }, false);
            let options = SoftmaxOptions {
                mask,
                soft_cap: Some(0.8),
                scale: Some(1.3),
                key_mask: Some(key_mask(2, lengths.1)),
                bias: Some(random([1, 1, 1, 33], 5)),
                ..Default::default()
            };
            check([2, 1, 1], lengths, &options, true);
        }
    }
}

#[test]
fn gradients_with_a_bias_per_head() {
    let bias = Some(random([1, 1, 4, 25], 5));
    check([4, 2, 2], (5, 8), &SoftmaxOptions { bias, ..Default::default() }, true);
}

#[test]
fn blind_rows_are_zero() {
    let [q, k, v] = qkv([2, 1, 1], (8, 5), None);
    let options = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
    let SoftmaxOutput { out, log_sum_exp } = softmax_attention(&q, &k, &v, &options);
    let gradients = softmax_attention_backward(&q, &k, &v, &options, &random(out.shape, 4), None);
    for [b, h, i] in crate::reference::quadratic::rows(&out) {
        let blind = i < 3;
        assert_eq!(out.row(b, h, i) == [0.0; 4], blind);
        assert_eq!(log_sum_exp.row(b, h, i)[0] == f64::NEG_INFINITY, blind);
        assert!(!blind || gradients.q.row(b, h, i) == [0.0; 3]);
    }
}

#[test]
fn a_bias_of_minus_infinity_removes_keys() {
    let [q, k, v] = qkv([2, 2, 2], (6, 6), None);
    let causal = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
    let bias = Array::from_fn([1, 1, 1, 11], |[_, _, _, d]| if d > 5 { f64::NEG_INFINITY } else { 0.0 });
    let biased = SoftmaxOptions { bias: Some(bias), ..Default::default() };
    let (x, y) = (softmax_attention(&q, &k, &v, &biased), softmax_attention(&q, &k, &v, &causal));
    assert_close(&x.out, &y.out, 1e-15, "out");
    assert_close(&x.log_sum_exp, &y.log_sum_exp, 1e-15, "log_sum_exp");
}

#[test]
fn gradients_of_attention_biases_and_sinks() {
    for (shape, seed) in [([2, 4, 5, 8], 5), ([1, 1, 5, 8], 6), ([2, 1, 1, 8], 7), ([1, 4, 5, 1], 8), ([1; 4], 9)] {
        let (attention_bias, sinks) = (Some(random(shape, seed)), Some(random([1, 1, 1, 4], seed + 10)));
        let options = SoftmaxOptions { attention_bias, mask: Mask::Causal, ..Default::default() };
        check([4, 2, 2], (5, 8), &options, false);
        check([4, 2, 2], (5, 8), &SoftmaxOptions { sinks, soft_cap: Some(0.9), ..options }, true);
    }
    let sinks = Some(random([1, 1, 1, 2], 3));
    check([2, 1, 1], (7, 4), &SoftmaxOptions { sinks, mask: Mask::Causal, ..Default::default() }, true);
}

/// A sink is one more key, of the value 0.
#[test]
fn sinks_are_keys() {
    let [q, k, v] = qkv([2, 2, 2], (5, 7), None);
    let sinks = random([1, 1, 1, 2], 3);
    let options = SoftmaxOptions { sinks: Some(sinks.clone()), ..Default::default() };
    let with_sinks = softmax_attention(&q, &k, &v, &options);
    let longer = |x: &Array| {
        let [b, h, n, d] = x.shape;
        Array::from_fn([b, h, n + 1, d], |[b, h, i, d]| if i < n { x.row(b, h, i)[d] } else { 0.0 })
    };
    // Its key is 0, so that the bias is its score.
    let bias = Array::from_fn([1, 2, 1, 8], |[_, h, _, j]| if j == 7 { sinks.data[h] } else { 0.0 });
    let options = SoftmaxOptions { attention_bias: Some(bias), ..Default::default() };
    let with_keys = softmax_attention(&q, &longer(&k), &longer(&v), &options);
    assert_close(&with_sinks.out, &with_keys.out, 1e-15, "out");
    assert_close(&with_sinks.log_sum_exp, &with_keys.log_sum_exp, 1e-15, "log_sum_exp");
}
