use super::{LENGTHS, MASKS, check_gradients, key_mask, qkv, random};
use crate::gau::{GauNorm, GauOptions};
use crate::reference::{Array, gau_attention, gau_attention_backward};

const NORMS: [GauNorm; 5] = [
    GauNorm::Length,
    GauNorm::LengthWidth,
    GauNorm::RowSum { epsilon: 0.1 },
    GauNorm::RowSum { epsilon: 0.0 },
    GauNorm::Fixed { length: 2.5 },
];

fn check(heads: [usize; 3], lengths: (usize, usize), options: &GauOptions<Array>) {
    let mut inputs = qkv(heads, lengths, options.key_mask.as_ref()).to_vec();
    inputs.extend(options.bias.clone());
    let with_bias = |x: &[Array]| GauOptions { bias: x.get(3).cloned(), ..options.clone() };
    check_gradients(
        &inputs,
        |x| vec![gau_attention(&x[0], &x[1], &x[2], &with_bias(x))],
        |x, d| {
            let gradients = gau_attention_backward(&x[0], &x[1], &x[2], &with_bias(x), &d[0]);
            [Some(gradients.q), Some(gradients.k), Some(gradients.v), gradients.bias].into_iter().flatten().collect()
        },
        &format!("{lengths:?} {options:?}"),
    );
}

#[test]
fn gradients() {
    for norm in NORMS {
        for mask in MASKS {
            for lengths in LENGTHS {
                check([4, 2, 2], lengths, &GauOptions { mask, norm, ..Default::default() });
                let key_mask = Some(key_mask(2, lengths.1));
                check(
                    [2, 1, 1],
                    lengths,
                    &GauOptions { mask, norm, key_mask, bias: Some(random([1, 1, 2, 33], 5)), sequences: None },
                );
            }
        }
    }
}

#[test]
fn a_zero_row_sum_gives_zero() {
    let [q, k, v] = qkv([1, 1, 1], (4, 4), None);
    let bias = Some(Array::filled([1, 1, 1, 9], -1e3));
    let options = GauOptions { norm: GauNorm::RowSum { epsilon: 0.0 }, bias, ..Default::default() };
    let out = gau_attention(&q, &k, &v, &options);
    assert!(out.data.iter().all(|&x| x == 0.0));
    let gradients = gau_attention_backward(&q, &k, &v, &options, &random(out.shape, 4));
    assert!(gradients.q.data.iter().chain(&gradients.v.data).all(|&x| x == 0.0));
}
