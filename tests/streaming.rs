//! A sequence cut into pieces, with the state handed on, gives what it gives at once.

use attn_kernels::gau::GauNorm;
use attn_kernels::problem::{DType, Mask};
use attn_kernels::reference::{Array, StateGradient};

use crate::common::backends::{self, Backend, Pass};
use crate::common::cases::{self, Case, Operation};
use crate::common::compare::Judge;
use crate::common::data::{Data, concatenate_columns, concatenate_rows};
use crate::common::extent::every_second;
use crate::common::random::Random;
use crate::common::reference::Results;

fn is_causal(case: &Case) -> bool {
    match &case.operation {
        Operation::Linear(o) => o.causal,
        Operation::Performer(o, _) => o.causal,
        Operation::Norm(o) => o.causal,
        _ => false,
    }
}

/// Output and last state of `backend` over pieces of the given lengths.
fn in_pieces(backend: &dyn Backend, case: &Case, data: &Data, dtype: DType, lengths: &[usize]) -> Results {
    let mut out: Option<Array> = None;
    let (mut state, mut start) = (data.state.clone(), 0);
    for &length in lengths {
        let (case, mut part) = data.piece(case, start..start + length, start..start + length);
        part.state = state;
        part.position = data.position + start;
        let results = backend.run(&case, &part, dtype, Pass::Forward).unwrap();
        out = Some(match &out {
            Some(out) => concatenate_rows(out, results.out()),
            None => results.out().clone(),
        });
        state = results.state();
        start += length;
    }
    assert_eq!(start, data.q.shape[2]);
    let mut results = Results::default();
    results.push("out", out);
    results.push_state(state.expect("the linear family has states"));
    results
}

/// All results over pieces of the given lengths, the gradients from the last piece to the first.
fn there_and_back(backend: &dyn Backend, case: &Case, data: &Data, dtype: DType, lengths: &[usize]) -> Results {
    let (mut parts, mut state, mut start) = (Vec::new(), data.state.clone(), 0);
    for &length in lengths {
        let (case, mut part) = data.piece(case, start..start + length, start..start + length);
        (part.state, part.position) = (state, data.position + start);
        state = backend.run(&case, &part, dtype, Pass::Forward).unwrap().state();
        start += length;
        parts.push((case, part));
    }
    let (mut d_state, mut back) = (data.d_state.clone(), Vec::new());
    for (case, mut part) in parts.into_iter().rev() {
        part.d_state = d_state;
        let results = backend.run(&case, &part, dtype, Pass::Both).unwrap();
        let sums = results.get("d_state.s").cloned().zip(results.get("d_state.z").cloned());
        d_state = sums.map(|(s, z)| StateGradient { s, z });
        back.push(results);
    }
    back.reverse();
    let mut all = Results::default();
    for name in ["out", "d_q", "d_k", "d_v", "d_log_decay"] {
        let pieces = back.iter().filter_map(|part| part.get(name)).cloned();
        let join = if name == "d_log_decay" { concatenate_columns } else { concatenate_rows };
        all.push(name, pieces.reduce(|first, second| join(&first, &second)));
    }
    all.push_state(state.expect("the linear family has states"));
    if data.state.is_some() {
        let StateGradient { s, z } = d_state.expect("that of the first state");
        all.push("d_state.s", s);
        all.push("d_state.z", z);
    }
    all
}

/// One to three places at random.
fn random_cuts(random: &mut Random, length: usize) -> Vec<usize> {
    let count = 1 + (random.uniform() * 3.0) as usize;
    let mut places: Vec<usize> = (0..count).map(|_| (random.uniform() * (length + 1) as f64) as usize).collect();
    places.extend([0, length]);
    places.sort_unstable();
    places.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// A sequence in pieces trains as the whole.
#[test]
fn gradients_of_pieces_are_those_of_the_whole() {
    let random = &mut Random::new("cuts");
    let mut complaints = Vec::new();
    let mut counts = [0; 3];
    let backends: Vec<_> = backends::all().into_iter().filter(|backend| backend.is_available()).collect();
    for (index, list) in cases::state_gradients().iter().enumerate() {
        let cuttable = |case: &&Case| is_causal(case) && case.queries == case.keys && case.queries > 1;
        for (number, case) in list.iter().filter(cuttable).enumerate() {
            let dtypes: Vec<_> = cases::judged(case).iter().copied().filter(|dtype| *dtype != DType::F16).collect();
            for dtype in every_second(&dtypes, number) {
                let data = Data::new(case, dtype);
                let judge = Judge::new(case, &data, dtype);
                for backend in &backends {
                    let lengths = random_cuts(random, case.queries);
                    counts[index] += 1;
                    let found = judge.complaints(&there_and_back(backend.as_ref(), case, &data, dtype, &lengths));
                    let name = backend.name();
                    complaints
                        .extend(found.iter().map(|found| format!("{name} {dtype} {case} in {lengths:?}: {found}")));
                }
            }
        }
    }
    assert!(counts.iter().all(|&count| count >= 60), "{counts:?}");
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

/// Ways to cut `length` tokens.
fn cuts(length: usize) -> Vec<Vec<usize>> {
    let mut odd = Vec::new();
    let mut rest = length;
    for piece in [1, 0, 3, 64, 7, 65, 2, 128, 33, 5].into_iter().cycle() {
        let piece = piece.min(rest);
        odd.push(piece);
        rest -= piece;
        if rest == 0 {
            break;
        }
    }
    let mut cuts = vec![vec![length], vec![length / 2, length - length / 2], odd];
    if length <= 200 {
        cuts.push(vec![1; length]);
    }
    cuts
}

#[test]
fn pieces_are_the_whole() {
    let mut complaints = Vec::new();
    let mut counts = [0; 3];
    for (index, list) in [cases::linear(), cases::performer(), cases::norm()].iter().enumerate() {
        let cuttable =
            |case: &&Case| is_causal(case) && case.queries == case.keys && case.queries > 1 && case.batch < 100;
        for (number, case) in list.iter().filter(cuttable).enumerate() {
            let mut dtypes = vec![DType::F32, DType::BF16];
            dtypes.retain(|dtype| case.dtypes.contains(dtype));
            for dtype in every_second(&dtypes, number) {
                let data = Data::new(case, dtype);
                let judge = Judge::new(case, &data, dtype);
                for lengths in cuts(case.queries) {
                    counts[index] += 1;
                    let results = in_pieces(&backends::default(), case, &data, dtype, &lengths);
                    let found = judge.complaints(&results);
                    complaints.extend(found.iter().map(|found| format!("{dtype} {case} in {lengths:?}: {found}")));
                }
            }
        }
    }
    assert!(counts.iter().all(|&count| count >= 60), "{counts:?}");
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

/// With a cache of keys and values, queries in pieces are the rows of one pass, be they one at a time or many.
#[test]
fn queries_in_pieces_are_rows() {
    let mut complaints = Vec::new();
    let mut count = 0;
    for list in [cases::softmax(), cases::diag(), cases::gau()] {
        let cuttable = |case: &&Case| {
            let operation = &case.operation;
            let of_pairs = operation.attention_bias().is_some() || operation.dropout().is_some();
            let per_key = operation.key_mask().is_some() || counts_keys(case) || operation.bias().is_some() || of_pairs;
            sees_no_future(case)
                && !per_key
                && case.queries == case.keys
                && (2..=200).contains(&case.queries)
                && case.batch < 100
        };
        for case in list.iter().filter(cuttable) {
            for dtype in [DType::F32, DType::BF16].into_iter().filter(|dtype| case.dtypes.contains(dtype)) {
                let data = Data::new(case, dtype);
                let judge = Judge::new(case, &data, dtype);
                for lengths in cuts(case.queries) {
                    count += 1;
                    let found = judge.complaints(&rows_in_pieces(case, &data, dtype, &lengths));
                    complaints.extend(found.iter().map(|found| format!("{dtype} {case} in {lengths:?}: {found}")));
                }
            }
        }
    }
    assert!(count >= 100, "{count}");
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

fn sees_no_future(case: &Case) -> bool {
    match &case.operation {
        Operation::Softmax(o) => is_past(o.mask),
        Operation::Diag(o) => o.causal,
        Operation::Gau(o) => is_past(o.mask),
        _ => false,
    }
}

fn is_past(mask: Mask) -> bool {
    matches!(mask, Mask::Causal | Mask::Window { right: Some(0), .. } | Mask::Blocks { causal: true, .. })
}

/// Whether a row depends on the number of keys.
fn counts_keys(case: &Case) -> bool {
    matches!(&case.operation, Operation::Gau(o) if matches!(o.norm, GauNorm::Length | GauNorm::LengthWidth))
}

/// Output and log-sum-exp of pieces of queries, each with the keys up to its end.
fn rows_in_pieces(case: &Case, data: &Data, dtype: DType, lengths: &[usize]) -> Results {
    let mut parts: Vec<Results> = Vec::new();
    let mut start = 0;
    for &length in lengths {
        let (case, part) = data.piece(case, start..start + length, 0..start + length);
        parts.push(backends::default().run(&case, &part, dtype, Pass::Forward).unwrap());
        start += length;
    }
    let mut results = Results::default();
    for name in ["out", "log_sum_exp"] {
        let rows = parts.iter().filter_map(|part| part.get(name)).cloned();
        results.push(name, rows.reduce(|first, second| concatenate_rows(&first, &second)));
    }
    results
}

/// Not causal, a query reads what came so far: keys first, then the queries.
#[test]
fn keys_in_pieces_then_queries() {
    let mut complaints = Vec::new();
    let mut count = 0;
    for list in [cases::linear(), cases::performer(), cases::norm()] {
        for case in list.iter().filter(|case| !is_causal(case) && case.keys > 1) {
            let data = Data::new(case, DType::F32);
            let judge = Judge::new(case, &data, DType::F32);
            for cut in [1, case.keys / 2, case.keys] {
                count += 1;
                let (small, first) = data.piece(case, 0..0, 0..cut);
                let run = |case, data| backends::default().run(case, data, DType::F32, Pass::Forward).unwrap();
                let state = run(&small, &first).state();
                let (small, mut second) = data.piece(case, 0..case.queries, cut..case.keys);
                second.state = state;
                let found = judge.complaints(&run(&small, &second));
                complaints.extend(found.iter().map(|found| format!("{case} after {cut} keys: {found}")));
            }
        }
    }
    assert!(count >= 30, "{count}");
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}
