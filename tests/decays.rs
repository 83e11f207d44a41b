//! Decays that leave nothing, tokens that are not there, and the gradient of the log-decay over long sequences.

use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::DType;
use attn_kernels::reference::Array;
use attn_kernels::transnormer::{NormOptions, NormScope};

use crate::common::backends::{self, Backend, Pass};
use crate::common::cases::{Case, Extra, Operation};
use crate::common::data::{Data, fill_masked, rows, slice_columns, slice_rows};
use crate::common::reference::Results;

fn undivided(log_decay: Extra) -> Operation {
    let map = FeatureMap::Identity;
    let options =
        LinearOptions { map, causal: true, normalizer: None, log_decay: Some(log_decay), ..Default::default() };
    Operation::Linear(options)
}

/// Runs three tokens of one number each on every backend and type.
fn three(case: &Case, change: impl Fn(&mut Data), check: impl Fn(&Results, &str)) {
    for backend in backends::all().iter().filter(|backend| backend.is_available()) {
        for dtype in [DType::F32, DType::F64] {
            let mut data = Data::new(case, dtype);
            change(&mut data);
            check(&backend.run(case, &data, dtype, Pass::Both).unwrap(), &format!("{} {dtype}", backend.name()));
        }
    }
}

#[test]
fn resets_do_not_reach_later_decays() {
    let case = Case::new("three tokens", undivided(Extra::PerToken)).heads(1, 1, 1).lengths(3, 3).widths(1, 1);
    for reset in [f64::NEG_INFINITY, f32::MIN.into(), -1e12, -1e9, -1e3] {
        let change = |data: &mut Data| {
            [&mut data.q, &mut data.k, &mut data.v, &mut data.d_out].into_iter().for_each(|x| x.data.fill(1.0));
            data.extras.log_decay = Some(Array { data: vec![0.0, reset, -1.0], shape: [1, 1, 1, 3] });
        };
        three(&case, change, |results, what| {
            let rest = (-1f64).exp();
            let expect = |name: &str, expected: [f64; 3]| {
                let got = &results.get(name).unwrap().data;
                let fits = got.iter().zip(expected).all(|(x, y)| (x - y).abs() <= 1e-6);
                assert!(fits, "{what}, {reset:e}: {name} is {got:?}, expected {expected:?}");
            };
            expect("out", [1.0, 1.0, 1.0 + rest]);
            expect("d_q", [1.0, 1.0, 1.0 + rest]);
            expect("d_v", [1.0, 1.0 + rest, 1.0]);
            expect("d_log_decay", [0.0, 0.0, rest]);
            assert_eq!(results.get("d_log_decay").unwrap().data[..2], [0.0; 2], "{what}, {reset:e}");
        });
    }
}

#[test]
fn jumps_of_the_stabilizer_do_not_reach_later_ones() {
    let options = PerformerOptions { causal: true, epsilon: 0.0, ..Default::default() };
    let case = Case::new("three tokens", Operation::Performer(options, 1)).heads(1, 1, 1).lengths(3, 3).widths(1, 1);
    let change = |data: &mut Data| {
        data.omega.as_mut().unwrap().data.fill(0.0);
        data.q.data.fill(0.0);
        data.k.data = vec![1e9, 2.0, 0.0];
        data.v.data = vec![0.0, 1.0, 0.0];
    };
    three(&case, change, |results, what| {
        let rest = (-2f64).exp();
        let (got, expected) = (results.out().data[2], rest / (1.0 + rest));
        assert!((got - expected).abs() < 1e-7, "{what}: {got}, expected {expected}");
    });
}

fn masked(operation: &Operation) -> Operation {
    let mut operation = operation.clone();
    let key_mask = match &mut operation {
        Operation::Linear(options) => &mut options.key_mask,
        Operation::Performer(options, _) => &mut options.key_mask,
        Operation::Norm(options) => &mut options.key_mask,
        _ => unreachable!("an operation with a state"),
    };
    *key_mask = Some(Extra::SomeKeys);
    operation
}

/// Tokens `kept` of a run, as a run of their own.
fn cut(case: &Case, data: &Data, kept: std::ops::Range<usize>) -> (Case, Data) {
    let mut few = data.clone();
    for x in [&mut few.q, &mut few.k, &mut few.v, &mut few.d_out] {
        *x = slice_rows(x, kept.clone());
    }
    if !case.has_decay_per_head() {
        few.extras.log_decay = few.extras.log_decay.map(|g| slice_columns(&g, kept.clone()));
    }
    (case.clone().lengths(kept.len(), kept.len()), few)
}

/// The largest difference of two arrays, as a part of the largest number.
fn difference(x: &Array, y: &Array) -> f64 {
    assert_eq!(x.shape, y.shape);
    let largest = y.data.iter().fold(f64::MIN_POSITIVE, |largest, y| largest.max(y.abs()));
    x.data.iter().zip(&y.data).fold(0.0, |worst: f64, (x, y)| worst.max((x - y).abs())) / largest
}

#[test]
fn padding_is_not_there() {
    let mut operations = Vec::new();
    for decay in [Extra::PerHead, Extra::PerToken, Extra::Resets] {
        let log_decay = Some(decay);
        operations.push(Operation::Linear(LinearOptions { causal: true, log_decay, ..Default::default() }));
        let norm = NormScope::AllHeads;
        operations.push(Operation::Norm(NormOptions { causal: true, log_decay, norm, ..Default::default() }));
    }
    operations.push(Operation::Performer(PerformerOptions { causal: true, ..Default::default() }, 20));
    for operation in operations {
        for (length, kept) in [(12, 0..7), (12, 5..12), (700, 0..300), (700, 300..700), (700, 33..650)] {
            let case = Case::new("padded", operation.clone()).lengths(length, length).after(9);
            let mut data = Data::new(&case, DType::F32);
            for [b, h, i] in rows(&data.d_out).filter(|[.., i]| !kept.contains(i)) {
                data.d_out.row_mut(b, h, i).fill(0.0);
            }
            let (small, few) = cut(&case, &data, kept.clone());
            let mask = Array::from_fn([1, 1, 1, length], |[.., j]| f64::from(kept.contains(&j)));
            [&mut data.k, &mut data.v].into_iter().for_each(|x| fill_masked(x, &mask, f64::NAN));
            data.extras.key_mask = Some(mask);
            let case = Case { operation: masked(&operation), ..case };
            let run = |case: &Case, data: &Data| backends::default().run(case, data, DType::F32, Pass::Both).unwrap();
            let (padded, plain) = (run(&case, &data), run(&small, &few));
            for (name, expected) in &plain.0 {
                let got = padded.get(name).unwrap();
                let is_state = name.starts_with("state.");
                let got = match *name {
                    "d_log_decay" => slice_columns(got, kept.clone()),
                    _ if is_state => got.clone(),
                    _ => slice_rows(got, kept.clone()),
                };
                let (error, bound) = (difference(&got, expected), if is_state && kept.start == 0 { 0.0 } else { 3e-6 });
                assert!(error <= bound, "{case}, {kept:?} kept: {name} differs by {error:e}");
            }
        }
    }
}

/// Gradient of the log-decay of S_t = e^g S_{t−1} + k_t v_tᵀ, o_t = q_t S_t for one head: dg_t = e^g ⟨S_{t−1}, R_t⟩
/// with R_t = q_t do_tᵀ + e^g R_{t+1}; every result through `round`.
fn scan(data: &Data, log_decay: f64, round: fn(f64) -> f64) -> Vec<f64> {
    let [_, _, tokens, width] = data.q.shape;
    let decay = round(log_decay.exp());
    let add = |sums: &mut [f64], x: &Array, y: &Array, t: usize| {
        for (sums, x) in sums.chunks_exact_mut(width).zip(x.row(0, 0, t)) {
            let products = sums.iter_mut().zip(y.row(0, 0, t));
            products.for_each(|(sum, y)| *sum = round(round(*sum * decay) + round(x * y)));
        }
    };
    let mut states = vec![vec![0.0; width * width]];
    for t in 0..tokens {
        let mut state = states[t].clone();
        add(&mut state, &data.k, &data.v, t);
        states.push(state);
    }
    let (mut gradient, mut later) = (vec![0.0; tokens], vec![0.0; width * width]);
    for t in (0..tokens).rev() {
        add(&mut later, &data.q, &data.d_out, t);
        let product = states[t].iter().zip(&later).fold(0.0, |sum, (s, r)| round(sum + round(s * r)));
        gradient[t] = round(decay * product);
    }
    gradient
}

#[test]
fn gradient_of_the_log_decay_over_many_tokens() {
    for count in [1, 100, 10_000, 40_000, 80_000, 120_000, 500_000] {
        let case = Case::new("many tokens", undivided(Extra::Constant(count)))
            .heads(1, 1, 1)
            .lengths(8192, 8192)
            .widths(16, 16);
        let data = Data::new(&case, DType::F32);
        let log_decay = data.extras.log_decay.as_ref().unwrap().data[0];
        let expected = scan(&data, log_decay, |x| x);
        let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
        let worst = |got: &[f64]| got.iter().zip(&expected).fold(0.0, |w: f64, (x, y)| w.max((x - y).abs())) / largest;
        let plain = worst(&scan(&data, log_decay, |x| f64::from(x as f32)));
        let results = backends::default().run(&case, &data, DType::F32, Pass::Both).unwrap();
        let error = worst(&results.get("d_log_decay").unwrap().data);
        let bound = 2.0 * plain + f64::from(f32::EPSILON);
        println!("log-decay {log_decay}: error {error:.1e}, of a scan in f32 {plain:.1e}");
        assert!(error <= bound, "log-decay {log_decay}: {error:e}, bound {bound:e}");
    }
}
