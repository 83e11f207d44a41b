use super::{LENGTHS, assert_close, check_gradients, key_mask, qkv};
use crate::problem::Mask;
use crate::reference::{diag_attention, diag_attention_backward, softmax_attention};
use crate::softmax::SoftmaxOptions;
use crate::transnormer::{DiagOptions, DiagWeight};

#[test]
fn gradients() {
    for weight in [DiagWeight::Softmax, DiagWeight::Relu { epsilon: 1e-2 }, DiagWeight::Relu { epsilon: 1e-6 }] {
        for causal in [false, true] {
            for lengths in LENGTHS {
                for key_mask in [None, Some(key_mask(2, lengths.1))] {
                    let inputs = qkv([4, 2, 2], lengths, key_mask.as_ref());
                    let options = DiagOptions { block_size: 4, causal, weight, scale: None, key_mask, sequences: None };
                    check_gradients(
                        &inputs,
                        |x| vec![diag_attention(&x[0], &x[1], &x[2], &options)],
                        |x, d| {
                            let gradients = diag_attention_backward(&x[0], &x[1], &x[2], &options, &d[0]);
                            vec![gradients.q, gradients.k, gradients.v]
                        },
                        &format!("{lengths:?} {options:?}"),
                    );
                }
            }
        }
    }
}

#[test]
fn softmax_weights_are_those_of_softmax_attention() {
    let [q, k, v] = qkv([4, 2, 2], (8, 8), None);
    let diag = DiagOptions { block_size: 3, causal: true, ..Default::default() };
    let plain = SoftmaxOptions { mask: Mask::Blocks { size: 3, causal: true }, ..Default::default() };
    let expected = softmax_attention(&q, &k, &v, &plain).out;
    assert_close(&diag_attention(&q, &k, &v, &diag), &expected, 0.0, "out");
}
