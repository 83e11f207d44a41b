use super::{LENGTHS, MASKS, assert_close, check_gradients, key_mask, qkv, random};
use crate::problem::Mask;
use crate::reference::{Array, SoftmaxOutput, softmax_attention, softmax_attention_backward};
use crate::softmax::SoftmaxOptions;

/// Checks all gradients; inputs are q, k, v and the bias of the options, if any.
fn check(heads: [usize; 3], lengths: (usize, usize), options: &SoftmaxOptions<Array>, with_statistic: bool) {
    let mut inputs = qkv(heads, lengths, options.key_mask.as_ref()).to_vec();
    inputs.extend(options.bias.clone());
    let with_bias = |x: &[Array]| SoftmaxOptions { bias: x.get(3).cloned(), ..options.clone() };
    let forward = |x: &[Array]| {
        let SoftmaxOutput { out, log_sum_exp } = softmax_attention(&x[0], &x[1], &x[2], &with_bias(x));
        if with_statistic { vec![out, log_sum_exp] } else { vec![out] }
    };
    let backward = |x: &[Array], d: &[Array]| {
        let gradients = softmax_attention_backward(&x[0], &x[1], &x[2], &with_bias(x), &d[0], d.get(1));
        [Some(gradients.q), Some(gradients.k), Some(gradients.v), gradients.bias].into_iter().flatten().collect()
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
                sequences: None,
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
