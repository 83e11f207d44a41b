//! Dropout: its mean is the output without it, and its mask the same however it is computed.

use attn_kernels::cpu::{self, Isa};
use attn_kernels::problem::View;
use attn_kernels::{Dropout, Mask, Sequences, SoftmaxOptions};

use crate::common::random::Random;

fn numbers(name: &'static str, len: usize) -> Vec<f64> {
    Random::new(name).array([1, 1, 1, len], 1.0).data
}

#[test]
fn mean_of_seeds() {
    const SEEDS: u64 = 10_000;
    for (queries, keys) in [(3, 7), (40, 9)] {
        let (q, k, v) = (numbers("q", queries * 4), numbers("k", keys * 4), numbers("v", keys * 3));
        let view = |x: &'static str| match x {
            "q" => View::contiguous(&q[..], &[1, 1, queries, 4]).unwrap(),
            "k" => View::contiguous(&k[..], &[1, 1, keys, 4]).unwrap(),
            _ => View::contiguous(&v[..], &[1, 1, keys, 3]).unwrap(),
        };
        let run = |dropout| {
            let options = SoftmaxOptions { dropout, ..Default::default() };
            let mut out = cpu::softmax::<f64>(view("q"), view("k"), view("v"), &options).unwrap().out;
            out.push(out.iter().sum());
            out
        };
        let expected = run(None);
        let mut sums = vec![[0.0; 2]; expected.len()];
        for seed in 0..SEEDS {
            for (sums, x) in sums.iter_mut().zip(run(Some(Dropout { p: 0.3, seed }))) {
                *sums = [sums[0] + x, sums[1] + x * x];
            }
        }
        let count = SEEDS as f64;
        let deviations = sums.iter().zip(&expected).map(|(&[sum, squares], expected)| {
            let (mean, variance) = (sum / count, squares / count - (sum / count).powi(2));
            (mean - expected) / (variance / count).sqrt()
        });
        let deviations: Vec<f64> = deviations.collect();
        // That of the sum of all elements, and those of elements, of which 1 in 370 is further out by chance.
        let total: f64 = deviations[deviations.len() - 1];
        assert!(total.abs() <= 3.0, "{queries}×{keys}: {total} standard errors");
        let far = deviations.iter().filter(|x| x.abs() > 3.0).count();
        assert!(far * 50 <= deviations.len(), "{queries}×{keys}: {far} of {} beyond 3", deviations.len());
    }
}

/// Values of 0 and 1 show which weights are left.
#[test]
fn mask_is_that_of_the_counters() {
    let dropout = Dropout { p: 0.4, seed: 0x1234_5678_9abc_def0 };
    for (queries, keys) in [(2, 290), (70, 290), (150, 131)] {
        let (q, k) = (numbers("q", 4 * queries * 2), numbers("k", 2 * keys * 2));
        let one = |at: usize| f32::from(at % keys == at / keys % keys);
        let v: Vec<f32> = (0..2 * keys * keys).map(one).collect();
        let [q, k] = [q, k].map(|x| x.into_iter().map(|x| x as f32).collect::<Vec<f32>>());
        let q = View::contiguous(&q[..], &[2, 2, queries, 2]).unwrap();
        let [k, v] = [(&k, 2), (&v, keys)].map(|(x, width)| View::contiguous(&x[..], &[2, 1, keys, width]).unwrap());
        let options = SoftmaxOptions { dropout: Some(dropout), ..Default::default() };
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let run = || isa.force(|| cpu::softmax::<f32>(q, k, v, &options).unwrap().out).unwrap();
                let out = pool.install(run);
                for (at, &weight) in out.iter().enumerate() {
                    let (row, key) = (at / keys, at % keys);
                    let pair = [row / queries / 2, row / queries % 2, row % queries, key];
                    assert_eq!(weight != 0.0, dropout.keeps(pair), "{isa:?}, {pair:?}: {weight}");
                }
            }
        }
    }
}

/// Every sequence has the mask of a batch entry.
#[test]
fn sequences_count_as_batch_entries() {
    let x: Vec<f32> = numbers("x", 3 * 25 * 4).into_iter().map(|x| x as f32).collect();
    let dropout = Some(Dropout { p: 0.3, seed: 5 });
    let options = SoftmaxOptions { mask: Mask::Causal, dropout, ..Default::default() };
    let batch = View::contiguous(&x[..], &[3, 1, 25, 4]).unwrap();
    let packed = View::contiguous(&x[..], &[1, 1, 75, 4]).unwrap();
    let expected = cpu::softmax::<f32>(batch, batch, batch, &options).unwrap();
    let options = SoftmaxOptions { sequences: Some(Sequences::of_lengths([25; 3])), ..options };
    let call = cpu::softmax::<f32>(packed, packed, packed, &options).unwrap();
    assert_eq!(call.out, expected.out);
    assert_eq!(call.backward(&call.out).unwrap().v, expected.backward(&call.out).unwrap().v);
}
