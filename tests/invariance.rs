//! What must not matter: strides, the order of heads, what masked rows hold, padding behind a key mask, the size of sums,
//! sharing a head or repeating it, a decay of 0, the number of threads and of batch entries, what was computed before.

use attn_kernels::gau::{GauNorm, GauOptions, GlobalNorm, MixedChunkOptions};
use attn_kernels::linear::LinearOptions;
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::{DType, Mask};
use attn_kernels::reference::Array;
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{DiagOptions, DiagWeight, NormOptions, NormScope};

use crate::common::backends::{self, Backend, Pass};
use crate::common::buffers::Layout;
use crate::common::cases::{self, Case, Extra, Operation};
use crate::common::compare::{Judge, error, magnitude};
use crate::common::data::{Data, fill_masked, rows};
use crate::common::random::Random;
use crate::common::reference::{Results, expected};

fn run(case: &Case, data: &Data) -> Results {
    backends::default().run(case, data, DType::F32, Pass::Both).unwrap()
}

#[track_caller]
fn assert_same_bits(first: &Results, second: &Results, what: &str) {
    for ((name, x), (_, y)) in first.0.iter().zip(&second.0) {
        assert_eq!(x.shape, y.shape, "{what}: {name}");
        let differs = x.data.iter().zip(&y.data).position(|(x, y)| x.to_bits() != y.to_bits());
        assert!(differs.is_none(), "{what}: {name} differs at element {differs:?}");
    }
}

/// Every case but those of very many heads.
fn cases() -> impl Iterator<Item = Case> {
    cases::all().into_iter().filter(|case| case.batch < 100)
}

#[test]
fn strides() {
    for case in cases() {
        let data = Data::new(&case, DType::F32);
        let in_layout = |layout| run(&Case { layout, ..case.clone() }, &data);
        let contiguous = in_layout(Layout::Contiguous);
        assert_same_bits(&contiguous, &in_layout(Layout::Tokens), &format!("{case}, as tokens"));
        assert_same_bits(&contiguous, &in_layout(Layout::Gaps), &format!("{case}, with gaps"));
    }
}

#[test]
fn what_masked_rows_hold() {
    let mut count = 0;
    for case in cases().filter(|case| case.operation.key_mask().is_some()) {
        let mut data = Data::new(&case, DType::F32);
        let mask = data.extras.key_mask.clone().unwrap();
        let mut filled = |value| {
            let global = data.global.iter_mut().map(|[_, k]| k);
            [&mut data.k, &mut data.v].into_iter().chain(global).for_each(|x| fill_masked(x, &mask, value));
            if let Some(g) = data.extras.log_decay.as_mut().filter(|_| !case.has_decay_per_head()) {
                let (heads, keys) = (g.shape[2], g.shape[3]);
                for (index, g) in g.data.iter_mut().enumerate() {
                    let kept = mask.row(0, 0, index / (heads * keys))[index % keys] != 0.0;
                    *g = if kept || value.is_nan() { *g } else { -value.abs() };
                }
            }
            run(&case, &data)
        };
        let zero = filled(0.0);
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 3e38, -7.0] {
            assert_same_bits(&zero, &filled(value), &format!("{case}, {value} in masked rows"));
        }
        count += 1;
    }
    assert!(count >= 20, "{count}");
}

/// The head `order[h]` of `x` as head h.
fn permuted(x: &Array, axis: usize, order: &[usize]) -> Array {
    Array::from_fn(x.shape, |mut at| {
        at[axis] = order[at[axis]];
        let [_, b, c, d] = x.shape;
        x.data[((at[0] * b + at[1]) * c + at[2]) * d + at[3]]
    })
}

#[test]
fn order_of_heads() {
    let order = [2, 0, 3, 1];
    let mut count = 0;
    for case in cases() {
        // A norm over all heads sums in their order.
        let together = matches!(&case.operation, Operation::Norm(o) if o.norm == NormScope::AllHeads);
        let case = Case { prefix: 0, ..case.heads(4, 4, 4) };
        // Every head has a dropout mask of its own.
        let together = together || case.operation.dropout().is_some();
        if together || case.queries.max(case.keys) > 400 || case.value_width > 1000 {
            continue;
        }
        count += 1;
        let data = Data::new(&case, DType::F32);
        let mut other = data.clone();
        let heads = |x: &mut Array| *x = permuted(x, 1, &order);
        [&mut other.q, &mut other.k, &mut other.v, &mut other.d_out].into_iter().for_each(heads);
        other.global.iter_mut().flatten().chain(&mut other.d_lse).for_each(heads);
        let per_head = |x: &mut Array, axis| {
            if x.shape[axis] == 4 {
                *x = permuted(x, axis, &order);
            }
        };
        other.extras.bias.iter_mut().for_each(|x| per_head(x, 2));
        other.extras.attention_bias.iter_mut().for_each(|x| per_head(x, 1));
        other.extras.sinks.iter_mut().for_each(|x| per_head(x, 3));
        other.extras.log_decay.iter_mut().for_each(|x| per_head(x, if case.has_decay_per_head() { 3 } else { 2 }));
        let (mut expected, mut found) = (run(&case, &data), run(&case, &other));
        // What heads share sums their gradients in their order.
        for results in [&mut expected, &mut found] {
            results.0.retain(|(name, x)| match *name {
                "d_bias" => x.shape[2] == 4,
                "d_attention_bias" => x.shape[1] == 4,
                _ => true,
            });
        }
        for (name, x) in &mut expected.0 {
            match *name {
                "state.z" | "d_log_decay" | "d_bias" => *x = permuted(x, 2, &order),
                "state.stabilizer" | "d_sinks" => *x = permuted(x, 3, &order),
                _ => *x = permuted(x, 1, &order),
            }
        }
        assert_same_bits(&expected, &found, &format!("{case}, heads in another order"));
    }
    assert!(count >= 200, "{count}");
}

/// Every head of `x` `times` times.
fn repeated(x: &Array, times: usize) -> Array {
    let [batch, heads, rows, width] = x.shape;
    Array::from_fn([batch, heads * times, rows, width], |[b, h, i, d]| x.row(b, h / times, i)[d])
}

/// The sums over `times` consecutive heads.
fn summed(x: &Array, times: usize) -> Array {
    let [batch, heads, rows, width] = x.shape;
    let sum = |[b, h, i, d]: [usize; 4]| (0..times).map(|member| x.row(b, h * times + member, i)[d]).sum();
    Array::from_fn([batch, heads / times, rows, width], sum)
}

#[test]
fn grouped_heads_are_repeated_heads() {
    let grouped = |case: &Case| case.heads[0] > case.heads[1] && case.heads[1] == case.heads[2] && case.prefix == 0;
    let mut operations = Vec::new();
    for case in cases().filter(grouped) {
        operations.push(case.operation.name());
        let times = case.heads[0] / case.heads[1];
        let data = Data::new(&case, DType::F32);
        let mut wide = data.clone();
        for x in [&mut wide.k, &mut wide.v].into_iter().chain(wide.global.iter_mut().map(|[_, k]| k)) {
            *x = repeated(x, times);
        }
        if let Some(g) = &mut wide.extras.log_decay {
            let axis = if case.has_decay_per_head() { 3 } else { 2 };
            let mut shape = g.shape;
            shape[axis] *= times;
            *g = Array::from_fn(shape, |mut at| {
                at[axis] /= times;
                g.row(at[0], at[1], at[2])[at[3]]
            });
        }
        let heads = case.heads[0];
        let mut results = run(&case.clone().heads(heads, heads, heads), &wide);
        // The states of equal heads are equal; the gradients add up.
        results.0.retain(|(name, _)| !name.starts_with("state."));
        for (name, x) in &mut results.0 {
            match *name {
                "d_k" | "d_v" | "d_k_global" => *x = summed(x, times),
                "d_log_decay" => {
                    let [_, batch, heads, keys] = x.shape;
                    let by_head = Array { data: x.data.clone(), shape: [batch, heads, 1, keys] };
                    *x = Array { shape: [1, batch, heads / times, keys], ..summed(&by_head, times) };
                }
                _ => {}
            }
        }
        let complaints = Judge::new(&case, &data, DType::F32).complaints(&results);
        assert!(complaints.is_empty(), "{case}, heads repeated: {complaints:?}");
    }
    operations.sort_unstable();
    operations.dedup();
    assert_eq!(operations.len(), 7, "{operations:?}");
}

#[test]
fn decay_of_zero() {
    let with = |causal, log_decay| {
        let linear = LinearOptions { causal, log_decay, ..Default::default() };
        let norm = NormOptions { causal, log_decay, ..Default::default() };
        [Operation::Linear(linear), Operation::Norm(norm)].map(|o| Case::new("decay of 0", o).lengths(150, 150))
    };
    for (plain, decayed) in with(true, None).into_iter().zip(with(true, Some(Extra::Zero))) {
        let data = Data::new(&decayed, DType::F32);
        let mut results = run(&decayed, &data);
        results.0.retain(|(name, _)| *name != "d_log_decay");
        let data = Data::new(&plain, DType::F32);
        let complaints = Judge::new(&plain, &data, DType::F32).complaints(&results);
        assert!(complaints.is_empty(), "{decayed}: {complaints:?}");
    }
}

#[test]
fn rows_without_a_key() {
    let mut count = 0;
    for case in cases().filter(|case| case.prefix == 0) {
        let blind = match case.operation.key_mask() {
            Some(Extra::NoKeys) => 1,
            _ if case.keys == 0 => case.batch,
            _ => continue,
        };
        count += 1;
        let results = run(&case, &Data::new(&case, DType::F32));
        for (name, x) in results.0.iter().filter(|(name, _)| *name == "out" || *name == "d_q") {
            let mut rows = rows(x).filter(|&[b, ..]| b < blind);
            assert!(rows.all(|[b, h, i]| x.row(b, h, i).iter().all(|&x| x == 0.0)), "{case}: {name}");
        }
        // A sink is seen by every query.
        let has_sinks = case.operation.sinks().is_some();
        if let Some(lse) = results.get("log_sum_exp").filter(|_| !has_sinks) {
            let mut rows = rows(lse).filter(|&[b, ..]| b < blind);
            assert!(rows.all(|[b, h, i]| lse.row(b, h, i) == [f64::NEG_INFINITY]), "{case}");
        }
    }
    assert!(count >= 14, "{count}");
}

#[test]
fn number_of_threads() {
    let causal = SoftmaxOptions { mask: Mask::Causal, bias: Some(Extra::Shared), ..Default::default() };
    let case = Case::new("one head on any number of threads", Operation::Softmax(causal))
        .heads(1, 1, 1)
        .lengths(900, 900)
        .widths(6, 8);
    let data = Data::new(&case, DType::F32);
    let judge = Judge::new(&case, &data, DType::F32);
    for threads in [1, 2, 3, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let results = pool.install(|| run(&case, &data));
        let repeat = pool.install(|| run(&case, &data));
        assert_same_bits(&results, &repeat, &format!("{case}, {threads} threads, twice"));
        let complaints = judge.complaints(&results);
        assert!(complaints.is_empty(), "{case} on {threads} threads: {complaints:?}");
    }
}

/// Calls find what the thread has left of the one before.
#[test]
fn what_was_computed_before() {
    let alone = || rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let pool = alone();
    for case in cases() {
        let data = Data::new(&case, DType::F32);
        let mut poison = data.clone();
        let global = poison.global.iter_mut().flatten();
        let rows = [&mut poison.q, &mut poison.k, &mut poison.v, &mut poison.d_out];
        rows.into_iter().chain(global).for_each(|x| x.data.fill(f64::NAN));
        let fresh = alone().install(|| run(&case, &data));
        let behind = pool.install(|| {
            run(&case, &poison);
            run(&case, &data)
        });
        assert_same_bits(&fresh, &behind, &format!("{case}, behind numbers that are none"));
    }
}

/// The linear family cuts a sequence by its length alone.
#[test]
fn threads_and_batch_entries_of_the_linear_family() {
    let linear = LinearOptions { causal: true, log_decay: Some(Extra::PerToken), ..Default::default() };
    let performer = PerformerOptions { causal: true, ..Default::default() };
    let norm = NormOptions { norm: NormScope::AllHeads, causal: true, ..Default::default() };
    let chunks = MixedChunkOptions { causal: true, chunk_size: 48, ..Default::default() };
    for operation in [
        Operation::Linear(linear),
        Operation::Linear(LinearOptions::default()),
        Operation::Performer(performer, 20),
        Operation::Performer(PerformerOptions::default(), 20),
        Operation::Norm(norm),
        Operation::MixedChunk(chunks),
    ] {
        let case =
            Case::new("one head on any number of threads", operation).heads(1, 1, 1).lengths(900, 900).widths(6, 8);
        let data = Data::new(&case, DType::F32);
        let judge = Judge::new(&case, &data, DType::F32);
        let on = |threads, case: &Case, data: &Data| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(case, data))
        };
        // The local branch of mixed chunks is the quadratic engine's.
        let is_mixed = matches!(case.operation, Operation::MixedChunk(_));
        let on = |threads, case: &Case, data: &Data| {
            let mut results = on(threads, case, data);
            results.0.retain(|(name, _)| !is_mixed || matches!(*name, "out" | "d_q_global" | "d_k_global"));
            results
        };
        let alone = on(1, &case, &data);
        let complaints = if is_mixed { Vec::new() } else { judge.complaints(&alone) };
        assert!(complaints.is_empty(), "{case}: {complaints:?}");
        let (many, five) = (case.clone().batch(5), repeated_batch(&data, 5));
        let first = Results(alone.0.iter().map(|(name, x)| (*name, batch_of(name, x, 5))).collect());
        for threads in [1, 2, 3, 7] {
            let what = format!("{case}, {threads} threads");
            assert_same_bits(&alone, &on(threads, &case, &data), &what);
            assert_same_bits(&first, &on(threads, &many, &five), &format!("{what}, five batch entries"));
        }
    }
}

/// The dimension of batch entries of a result or an optional operand.
fn batch_dimension(name: &str) -> usize {
    match name {
        "state.stabilizer" | "key_mask" => 2,
        "d_log_decay" => 1,
        _ => 0,
    }
}

/// One batch entry `times` times.
fn batch_of(name: &str, x: &Array, times: usize) -> Array {
    let dimension = batch_dimension(name);
    let mut shape = x.shape;
    assert!(shape[dimension] == 1, "{name}");
    shape[dimension] = times;
    Array::from_fn(shape, |mut at| {
        at[dimension] = 0;
        x.row(at[0], at[1], at[2])[at[3]]
    })
}

fn repeated_batch(data: &Data, times: usize) -> Data {
    let mut many = data.clone();
    let global = many.global.iter_mut().flatten();
    let rows = [&mut many.q, &mut many.k, &mut many.v, &mut many.d_out];
    rows.into_iter().chain(global).chain(&mut many.d_lse).for_each(|x| *x = batch_of("rows", x, times));
    many.extras.log_decay.iter_mut().for_each(|g| *g = batch_of("d_log_decay", g, times));
    many
}

/// `x` with rows behind its last, which hold `fill`.
fn padded(x: &Array, rows: usize, fill: f64) -> Array {
    let [batch, heads, count, width] = x.shape;
    Array::from_fn([batch, heads, count + rows, width], |[b, h, i, d]| if i < count { x.row(b, h, i)[d] } else { fill })
}

/// The first `rows` rows.
fn first_rows(x: &Array, rows: usize) -> Array {
    let [batch, heads, _, width] = x.shape;
    Array::from_fn([batch, heads, rows, width], |[b, h, i, d]| x.row(b, h, i)[d])
}

/// Every operation, and each of its norms that could count keys.
fn counting_cases() -> Vec<Case> {
    let key_mask = Some(Extra::SomeKeys);
    let mut operations = Vec::new();
    for causal in [false, true] {
        let mask = if causal { Mask::Causal } else { Mask::Full };
        operations.push(Operation::Softmax(SoftmaxOptions { mask, key_mask, ..Default::default() }));
        let norms =
            [GauNorm::Length, GauNorm::LengthWidth, GauNorm::RowSum { epsilon: 1e-6 }, GauNorm::Fixed { length: 9.0 }];
        operations
            .extend(norms.map(|norm| Operation::Gau(GauOptions { mask, norm, key_mask, bias: None, sequences: None })));
        for weight in [DiagWeight::Softmax, DiagWeight::Relu { epsilon: 1e-6 }] {
            operations.push(Operation::Diag(DiagOptions { causal, weight, key_mask, ..Default::default() }));
        }
        operations.push(Operation::Linear(LinearOptions { causal, key_mask, ..Default::default() }));
        operations.push(Operation::Performer(PerformerOptions { causal, key_mask, ..Default::default() }, 20));
        operations.push(Operation::Norm(NormOptions { causal, key_mask, ..Default::default() }));
        for global_norm in [GlobalNorm::Mean, GlobalNorm::Chunk, GlobalNorm::Length] {
            let options = MixedChunkOptions { chunk_size: 4, causal, global_norm, key_mask, ..Default::default() };
            operations.push(Operation::MixedChunk(options));
        }
    }
    let case = |operation| Case::new("padded behind a key mask", operation).lengths(16, 16).widths(7, 5).batch(2);
    operations.into_iter().map(case).collect()
}

/// Results do not change when tokens are added that a key mask removes.
#[test]
fn padding_behind_a_key_mask() {
    const PADDING: usize = 4;
    for case in counting_cases() {
        let mut data = Data::new(&case, DType::F32);
        // The same number of keys in both entries, and one entry with fewer.
        let kept = |b: usize, j: usize| if j < 16 - 3 * b { 1.0 } else { 0.0 };
        data.extras.key_mask = Some(Array::from_fn([1, 1, 2, 16], |[.., b, j]| kept(b, j)));
        for x in [&mut data.k, &mut data.v].into_iter().chain(data.global.iter_mut().map(|[_, k]| k)) {
            *x = Random::new("no NaN").array(x.shape, 1.0);
        }
        let expected = run(&case, &data);
        let mut longer = data.clone();
        let fill = |x: &Array| padded(x, PADDING, 3.0);
        (longer.q, longer.k, longer.v, longer.d_out) =
            (fill(&data.q), fill(&data.k), fill(&data.v), padded(&data.d_out, PADDING, 0.0));
        longer.global = data.global.as_ref().map(|pair| pair.each_ref().map(fill));
        longer.extras.key_mask = Some(Array::from_fn([1, 1, 2, 16 + PADDING], |[.., b, j]| kept(b, j)));
        let mut results = run(&case.clone().lengths(16 + PADDING, 16 + PADDING), &longer);
        for (name, x) in &mut results.0 {
            if *name == "out" || name.starts_with("d_") || *name == "log_sum_exp" {
                *x = first_rows(x, 16);
            }
        }
        let complaints = Judge::new(&case, &data, DType::F32).complaints(&results);
        assert!(complaints.is_empty(), "{case}, padded: {complaints:?}");
        for (name, x) in &expected.0 {
            let scale = magnitude(x).rms;
            let difference = error(results.get(name).unwrap(), x).unwrap();
            assert!(difference.rms <= 1e-6 * scale, "{case}: {name} changes by {difference:?} of {scale:e}");
        }
    }
}

/// RMS norms of sums of any size, whose squares over- or underflow: gradients too.
#[test]
fn norms_of_sums_of_any_size() {
    let norm = |causal, norm| Operation::Norm(NormOptions { causal, norm, epsilon: 1e-30, ..Default::default() });
    let weight = DiagWeight::Relu { epsilon: 1e-30 };
    let diag = Operation::Diag(DiagOptions { block_size: 32, causal: true, weight, ..Default::default() });
    for operation in [norm(true, NormScope::Head), norm(false, NormScope::AllHeads), diag] {
        let case = Case::new("sums of any size", operation).lengths(70, 70);
        let data = Data::new(&case, DType::F32);
        for size in [1e-30, 1e-20, 1.0, 1e18, 1e30] {
            let mut data = data.clone();
            data.v.data.iter_mut().for_each(|x| *x = f64::from((*x * size) as f32));
            let expected = expected(&case, &data);
            let results = run(&case, &data);
            for (name, x) in expected.0.iter().filter(|(name, _)| *name == "out" || name.starts_with("d_")) {
                // Below the smallest normal number f32 has fewer digits.
                let (found, whole) = (error(results.get(name).unwrap(), x).unwrap(), magnitude(x));
                assert!(
                    found.worst <= 1e-4 * whole.worst + 1e-37,
                    "{case}, values of {size:e}: {name}: {found:?} of {whole:?}"
                );
            }
        }
    }
}

/// A row that sees a single key has that key's value whatever q and k are.
#[test]
fn a_single_key_has_no_gradient() {
    let key_mask = Some(Extra::SomeKeys);
    let options = |mask| SoftmaxOptions { mask, ..Default::default() };
    let alone = Mask::Window { left: Some(0), right: Some(0) };
    for (options, queries, keys) in [
        (options(Mask::Causal), 9, 1),
        (options(alone), 300, 300),
        (SoftmaxOptions { key_mask, ..options(Mask::Full) }, 300, 300),
    ] {
        let case = Case::new("a single key", Operation::Softmax(options)).lengths(queries, keys).widths(40, 72);
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let mut data = Data::new(&case, dtype);
            if let Some(mask) = &mut data.extras.key_mask {
                // One key behind the first tile.
                *mask = Array::from_fn(mask.shape, |[.., j]| if j == 200 { 1.0 } else { 0.0 });
                data.k = Random::new("k").array(data.k.shape, 1.0);
                data.v = Random::new("v").array(data.v.shape, 1.0);
            }
            let results = backends::default().run(&case, &data, dtype, Pass::Both).unwrap();
            for name in ["d_q", "d_k"] {
                let largest = results.get(name).unwrap().data.iter().fold(0f64, |largest, x| largest.max(x.abs()));
                assert_eq!(largest, 0.0, "{case}, {dtype}: {name}");
            }
        }
    }
}
