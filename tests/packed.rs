//! Packed sequences give what each gives alone: the same bits forward, and gradients within a rounding.

use attn_kernels::Sequences;
use attn_kernels::problem::DType;
use attn_kernels::reference::{Array, State, StateGradient};

use crate::common::backends::{self, Backend, Pass};
use crate::common::buffers::unit;
use crate::common::cases::{self, Case, Operation};
use crate::common::data::{Data, entry_dtype, slice_columns, slice_rows};
use crate::common::extent::every_second;
use crate::common::random::Random;
use crate::common::reference::{Results, with_state};

/// Longer ones pass through the same code.
const LONGEST: usize = 400;

/// Offsets that cut so many tokens at random places, some of them twice.
fn offsets(random: &mut Random, tokens: usize, count: usize) -> Vec<u32> {
    let mut cuts: Vec<u32> = (1..count).map(|_| (random.uniform() * (tokens + 1) as f64) as u32).collect();
    cuts.extend([0, tokens as u32]);
    if count > 3 {
        cuts[1] = cuts[0];
    }
    cuts.sort_unstable();
    cuts
}

/// What a sequence has of the results of all, less what is shared: gradients of the bias and the sinks.
fn part_of(name: &str, all: &Array, queries: &[u32], keys: &[u32], sequence: usize) -> Option<Array> {
    let range = |offsets: &[u32]| offsets[sequence] as usize..offsets[sequence + 1] as usize;
    Some(match name {
        "out" | "log_sum_exp" | "d_q" | "d_q_global" => slice_rows(all, range(queries)),
        "d_k" | "d_v" | "d_k_global" => slice_rows(all, range(keys)),
        "d_log_decay" => slice_columns(all, range(keys)),
        "state.s" | "state.z" | "d_state.s" | "d_state.z" => entry(all, sequence),
        // [1, 1, sequences, heads]
        "state.stabilizer" => slice_rows(all, sequence..sequence + 1),
        "d_bias" | "d_sinks" => return None,
        other => panic!("{other} of a sequence"),
    })
}

/// That of one sequence.
fn entry(all: &Array, sequence: usize) -> Array {
    Array::from_fn([1, all.shape[1], all.shape[2], all.shape[3]], |[_, h, i, d]| all.row(sequence, h, i)[d])
}

/// A state for each sequence, and a gradient for each after it.
fn add_states(case: &Case, data: &mut Data, sequences: usize) {
    let Some(StateGradient { s, z }) = &data.d_state else { return };
    let stabilizer = with_state(case, data, None).1.stabilizer;
    let random = &mut Random::new("states of sequences");
    let mut sums = |of: &Array, std| {
        let mut sums = random.array([sequences, of.shape[1], of.shape[2], of.shape[3]], std);
        sums.data.iter_mut().for_each(|x| *x = f64::from(*x as f32));
        sums
    };
    let stabilizer = stabilizer.map(|c| Array::filled([1, 1, sequences, c.shape[3]], 0.25));
    let mut state = State { s: sums(s, 1.0), z: sums(z, 1.0), stabilizer };
    state.z.data.iter_mut().for_each(|z| *z = z.abs() + 1.0);
    data.d_state = Some(StateGradient { s: sums(s, 1.0), z: sums(z, 1.0) });
    data.state = Some(state);
}

/// Those of one sequence.
fn take_states(part: &mut Data, sequence: usize) {
    let state = part.state.as_ref();
    part.state = state.map(|State { s, z, stabilizer }| State {
        s: entry(s, sequence),
        z: entry(z, sequence),
        stabilizer: stabilizer.as_ref().map(|c| slice_rows(c, sequence..sequence + 1)),
    });
    let d_state = part.d_state.as_ref();
    part.d_state = d_state.map(|StateGradient { s, z }| StateGradient { s: entry(s, sequence), z: entry(z, sequence) });
}

/// The largest difference over the largest number, ∞ between finite numbers and others.
fn difference(x: &Array, y: &Array) -> f64 {
    assert_eq!(x.shape, y.shape);
    let largest = y.data.iter().filter(|y| y.is_finite()).fold(f64::MIN_POSITIVE, |most, y| most.max(y.abs()));
    let apart = |(x, y): (&f64, &f64)| match x.is_finite() && y.is_finite() {
        true => (x - y).abs() / largest,
        false if x.to_bits() == y.to_bits() => 0.0,
        false => f64::INFINITY,
    };
    x.data.iter().zip(&y.data).map(apart).fold(0.0, f64::max)
}

fn is_forward(name: &str) -> bool {
    !name.starts_with("d_")
}

/// What differs between a packed run and those of its sequences.
fn complaints(backend: &dyn Backend, case: &Case, dtype: DType, queries: &[u32], keys: &[u32]) -> Vec<String> {
    let mut data = Data::new(case, dtype);
    add_states(case, &mut data, queries.len() - 1);
    let packed = Case { operation: case.operation.clone().on(Sequences::with_keys(queries, keys)), ..case.clone() };
    let all = backend.run(&packed, &data, dtype, Pass::Both).unwrap_or_else(|error| panic!("{packed}: {error}"));
    let mut complaints = Vec::new();
    let mut shared: Vec<(&str, Array)> = Vec::new();
    for sequence in 0..queries.len() - 1 {
        let range = |offsets: &[u32]| offsets[sequence] as usize..offsets[sequence + 1] as usize;
        let (small, mut part) = data.piece(case, range(queries), range(keys));
        take_states(&mut part, sequence);
        // candle has no gradient for what nobody asks of.
        let pass = if small.queries == 0 { Pass::Forward } else { Pass::Both };
        let alone: Results = backend.run(&small, &part, dtype, pass).unwrap();
        let is_silent = |name: &str| small.queries == 0 && !is_forward(name) && !name.starts_with("d_state.");
        for (name, all) in all.0.iter().filter(|(name, _)| is_silent(name)) {
            let own = part_of(name, all, queries, keys, sequence);
            if own.is_some_and(|own| own.data.iter().any(|&x| x != 0.0)) {
                complaints.push(format!("{name} of sequence {sequence}, which has no query, is not 0"));
            }
        }
        for (name, alone) in &alone.0 {
            let Some(own) = part_of(name, all.get(name).unwrap(), queries, keys, sequence) else {
                if shared.iter().all(|(other, _)| other != name) {
                    shared.push((name, Array::zeros(alone.shape)));
                }
                let (_, sum) = shared.iter_mut().find(|(other, _)| other == name).unwrap();
                sum.data.iter_mut().zip(&alone.data).for_each(|(sum, x)| *sum += x);
                continue;
            };
            let apart = difference(&own, alone);
            let bound = if is_forward(name) { 0.0 } else { 4.0 * unit(dtype) };
            if apart > bound || own.shape != alone.shape {
                complaints.push(format!("{name} of sequence {sequence} is {apart:.1e} off"));
            }
        }
    }
    for (name, sum) in shared {
        let apart = difference(all.get(name).unwrap(), &sum);
        // Those of sinks are in the dtype of these.
        let sinks = case.operation.sinks().filter(|_| name == "d_sinks");
        if apart > 8.0 * unit(sinks.map_or(dtype, |kind| entry_dtype(kind, dtype))) {
            complaints.push(format!("{name} is {apart:.1e} off"));
        }
    }
    let line = |complaint| format!("{} {dtype} {case}, cut at {queries:?} and {keys:?}: {complaint}", backend.name());
    complaints.into_iter().map(line).collect()
}

#[test]
fn sequences_are_alone() {
    let (mut found, mut partitions) = (Vec::new(), 0);
    let random = &mut Random::new("partitions");
    let backends: Vec<_> = backends::all().into_iter().filter(|backend| backend.is_available()).collect();
    let all = cases::all().into_iter().chain(cases::state_gradients().concat());
    for (number, case) in all.enumerate() {
        let is_small = case.queries.max(case.keys) <= LONGEST && case.heads[0] * case.batch < 100;
        // An attention bias is refused, and every sequence has a dropout mask of its own.
        let is_taken = case.operation.attention_bias().is_none() && case.operation.dropout().is_none();
        let is_cut_apart = case.state_gradient && case.queries != case.keys;
        if case.batch != 1 || case.prefix > 0 || !is_small || !is_taken || is_cut_apart {
            continue;
        }
        let count = 1 + number % 6;
        let queries = offsets(random, case.queries, count);
        let needs_pairs = matches!(&case.operation, Operation::MixedChunk(options) if options.causal);
        let is_square = case.queries == case.keys && (needs_pairs || case.state_gradient || number % 3 > 0);
        let keys = if is_square { queries.clone() } else { offsets(random, case.keys, count) };
        partitions += 1;
        for dtype in every_second(case.dtypes, number) {
            for backend in backends.iter().filter(|backend| backend.takes(&case)) {
                found.extend(complaints(backend.as_ref(), &case, dtype, &queries, &keys));
            }
        }
    }
    assert!(found.is_empty(), "{} complaints\n{}", found.len(), found.join("\n"));
    assert!(partitions >= 200, "{partitions} partitions");
}
