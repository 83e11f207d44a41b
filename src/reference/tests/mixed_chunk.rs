use super::{assert_close, check_gradients, key_mask, poison, random};
use crate::gau::{GlobalNorm, MixedChunkOptions};
use crate::reference::{Array, mixed_chunk_attention, mixed_chunk_attention_backward, mixed_chunk_attention_recurrent};

/// Heads of q_quad, k_quad, q_lin, k_lin; v has those of k_quad.
const HEADS: [[usize; 4]; 3] = [[1, 1, 1, 1], [2, 2, 1, 1], [4, 2, 4, 2]];

fn inputs(heads: [usize; 4], (queries, keys): (usize, usize), key_mask: Option<&Array>) -> Vec<Array> {
    let mut inputs = vec![
        random([2, heads[0], queries, 3], 1),
        random([2, heads[1], keys, 3], 2),
        random([2, heads[2], queries, 5], 3),
        random([2, heads[3], keys, 5], 4),
        random([2, heads[1], keys, 4], 5),
    ];
    for x in [1, 3, 4] {
        poison(&mut inputs[x], key_mask);
    }
    inputs
}

fn check(heads: [usize; 4], lengths: (usize, usize), options: &MixedChunkOptions<Array>) {
    let mut inputs = inputs(heads, lengths, options.key_mask.as_ref());
    inputs.extend(options.bias.clone());
    let what = format!("{heads:?} {lengths:?} {options:?}");
    let with_bias = |x: &[Array]| MixedChunkOptions { bias: x.get(5).cloned(), ..options.clone() };
    let forward = |x: &[Array]| mixed_chunk_attention(&x[0], &x[1], &x[2], &x[3], &x[4], &with_bias(x));
    let [q_quad, k_quad, q_lin, k_lin, v] = [0, 1, 2, 3, 4].map(|n| &inputs[n]);
    let recurrent = mixed_chunk_attention_recurrent(q_quad, k_quad, q_lin, k_lin, v, options);
    assert_close(&recurrent, &forward(&inputs), 1e-13, &format!("{what}: recurrent"));
    check_gradients(
        &inputs,
        |x| vec![forward(x)],
        |x, d| {
            let g = mixed_chunk_attention_backward(&x[0], &x[1], &x[2], &x[3], &x[4], &with_bias(x), &d[0]);
            let all = [Some(g.q_quad), Some(g.k_quad), Some(g.q_lin), Some(g.k_lin), Some(g.v), g.bias];
            all.into_iter().flatten().collect()
        },
        &what,
    );
}

#[test]
fn gradients_and_recurrence() {
    for heads in HEADS {
        for global_norm in [GlobalNorm::Mean, GlobalNorm::Chunk, GlobalNorm::Length] {
            for (causal, lengths) in [(true, (8, 8)), (true, (9, 9)), (false, (8, 8)), (false, (5, 8)), (false, (8, 5))]
            {
                let plain = MixedChunkOptions { chunk_size: 3, causal, global_norm, ..Default::default() };
                check(heads, lengths, &plain);
                let bias = Some(random([1, 1, heads[0], 7], 6));
                let key_mask = Some(key_mask(2, lengths.1));
                check(heads, lengths, &MixedChunkOptions { scale: Some(0.7), bias, key_mask, ..plain });
            }
        }
    }
}

#[test]
fn the_future_does_not_change_the_past() {
    let options = MixedChunkOptions { chunk_size: 3, causal: true, ..Default::default() };
    let whole = inputs([1; 4], (8, 8), None);
    let out = |x: &[Array]| mixed_chunk_attention(&x[0], &x[1], &x[2], &x[3], &x[4], &options);
    let start: Vec<Array> = whole.iter().map(|x| super::slice_rows(x, 0..5)).collect();
    assert_close(&out(&start), &super::slice_rows(&out(&whole), 0..5), 0.0, "out");
}
