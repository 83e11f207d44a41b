use super::linear::{HEADS, MAPS, decays};
use super::{LENGTHS, assert_close, check_gradients, key_mask, place_rows, qkv, slice_rows};
use crate::reference::{Array, norm_attention, norm_attention_backward, norm_attention_with_state};
use crate::transnormer::{NormOptions, NormScope};

fn check(heads: [usize; 3], lengths: (usize, usize), options: &NormOptions<Array>) {
    let mut inputs = qkv(heads, lengths, options.key_mask.as_ref()).to_vec();
    inputs.extend(options.log_decay.clone());
    let what = format!("{heads:?} {lengths:?} {options:?}");
    let with_decay = |x: &[Array]| NormOptions { log_decay: x.get(3).cloned(), ..options.clone() };
    let forward = |x: &[Array]| norm_attention(&x[0], &x[1], &x[2], &with_decay(x));
    let recurrent = norm_attention_with_state(&inputs[0], &inputs[1], &inputs[2], options, None).0;
    assert_close(&recurrent, &forward(&inputs), 1e-11, &format!("{what}: recurrent"));
    check_gradients(
        &inputs,
        |x| vec![forward(x)],
        |x, d| {
            let gradients = norm_attention_backward(&x[0], &x[1], &x[2], &with_decay(x), &d[0]);
            let all = [Some(gradients.q), Some(gradients.k), Some(gradients.v), gradients.log_decay];
            all.into_iter().flatten().collect()
        },
        &what,
    );
}

#[test]
fn gradients_and_recurrence() {
    for norm in [NormScope::Head, NormScope::AllHeads] {
        for lengths in LENGTHS {
            let key_mask = Some(key_mask(2, lengths.1));
            for map in MAPS {
                check([2, 1, 1], lengths, &NormOptions { map, norm, epsilon: 1e-2, ..Default::default() });
            }
            for heads in HEADS {
                for log_decay in decays(heads, lengths.1) {
                    let (key_mask, causal) = (key_mask.clone(), true);
                    check(heads, lengths, &NormOptions { norm, causal, log_decay, key_mask, ..Default::default() });
                }
            }
        }
    }
}

#[test]
fn pieces_are_the_whole() {
    let [q, k, v] = qkv([4, 2, 2], (8, 8), None);
    let log_decay = decays([4, 2, 2], 8)[1].clone();
    let options = NormOptions { causal: true, norm: NormScope::AllHeads, log_decay, ..Default::default() };
    let (whole, last) = norm_attention_with_state(&q, &k, &v, &options, None);
    let (mut joined, mut state) = (Array::zeros(whole.shape), None);
    for range in [0..3, 3..8] {
        let [q, k, v] = [&q, &k, &v].map(|x| slice_rows(x, range.clone()));
        let (out, next) = norm_attention_with_state(&q, &k, &v, &options, state.as_ref());
        place_rows(&mut joined, &out, range.start);
        state = Some(next);
    }
    assert_close(&joined, &whole, 1e-13, "out");
    assert_close(&state.expect("two pieces").s, &last.s, 1e-13, "S");
}
