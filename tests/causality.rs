//! The future does not change the past: no bit of an earlier output depends on later tokens.

use attn_kernels::gau::{GauNorm, GlobalNorm};
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::{DType, Mask};
use attn_kernels::reference::Array;

use crate::common::backends::{self, Backend, Pass};
use crate::common::cases::{self, Case, Operation};
use crate::common::data::{Data, fill_masked, rows};

fn is_causal(case: &Case) -> bool {
    match &case.operation {
        Operation::Softmax(o) => is_causal_mask(o.mask),
        Operation::Gau(o) => is_causal_mask(o.mask),
        Operation::Diag(o) => o.causal,
        Operation::Linear(o) => o.causal,
        Operation::Performer(o, _) => o.causal,
        Operation::Norm(o) => o.causal,
        Operation::MixedChunk(o) => o.causal,
    }
}

fn is_causal_mask(mask: Mask) -> bool {
    match mask {
        Mask::Full => false,
        Mask::Causal => true,
        Mask::Prefix { .. } => false,
        Mask::Streaming { .. } | Mask::Strided { .. } | Mask::Fixed { .. } => true,
        Mask::Dilated { right, .. } => right == 0,
        Mask::Window { right, .. } => right == Some(0),
        Mask::Blocks { causal, .. } => causal,
    }
}

fn counts_keys(case: &Case) -> bool {
    match &case.operation {
        Operation::Gau(o) => matches!(o.norm, GauNorm::Length | GauNorm::LengthWidth),
        Operation::MixedChunk(o) => matches!(o.global_norm, GlobalNorm::Mean | GlobalNorm::Length),
        _ => false,
    }
}

/// Changes every row from `first` on.
fn change(x: &mut Array, first: usize, factor: f64) {
    for [b, h, i] in rows(x).filter(|&[_, _, i]| i >= first) {
        x.row_mut(b, h, i).iter_mut().for_each(|x| *x = factor * *x + 0.5);
    }
}

/// Numbers in place of the NaN of masked keys.
fn without_nan(mut data: Data) -> Data {
    if let Some(mask) = &data.extras.key_mask {
        let global = data.global.iter_mut().map(|[_, k]| k);
        [&mut data.k, &mut data.v].into_iter().chain(global).for_each(|x| fill_masked(x, mask, 0.5));
    }
    data
}

/// `data` with other tokens from key `position` on; its queries are those from `query` on.
/// Where a norm counts the visible keys, there are as many as before.
fn with_other_future(data: &Data, query: usize, position: usize, counts_keys: bool) -> Data {
    let mut changed = data.clone();
    change(&mut changed.q, query, -2.0);
    change(&mut changed.k, position, 30.0);
    change(&mut changed.v, position, 30.0);
    if let Some([q, k]) = &mut changed.global {
        change(q, query, -2.0);
        change(k, position, 30.0);
    }
    if let Some(mask) = &mut changed.extras.key_mask {
        let keys = mask.shape[3];
        let future = mask.data.chunks_mut(keys).map(|row| &mut row[position.min(keys)..]);
        if counts_keys {
            future.for_each(|row| row.reverse());
        } else {
            future.flatten().for_each(|keep| *keep = 1.0 - *keep);
        }
    }
    if let Some(g) = changed.extras.log_decay.as_mut().filter(|g| g.shape[3] == data.k.shape[2] && g.shape[1] != 1) {
        let keys = g.shape[3];
        g.data.iter_mut().enumerate().filter(|(at, _)| at % keys >= position).for_each(|(_, g)| *g = *g * 3.0 - 1.0);
    }
    changed
}

/// Whether the rows before `query` are the same bits.
fn assert_same_past(case: &Case, first: &Array, second: &Array, query: usize) {
    for [b, h, i] in rows(first).filter(|&[_, _, i]| i < query) {
        let (x, y) = (first.row(b, h, i), second.row(b, h, i));
        let same = x.iter().zip(y).all(|(x, y)| x.to_bits() == y.to_bits());
        assert!(same, "{case}: row [{b}, {h}, {i}] changed with the tokens from {query} on: {x:?} {y:?}");
    }
}

#[test]
fn later_tokens_change_no_earlier_output() {
    let mut checked = [0; 7];
    for case in cases::all().iter().filter(|case| is_causal(case) && (1..100).contains(&case.batch)) {
        let data = without_nan(Data::new(case, DType::F32));
        let run = |data: &Data| backends::default().run(case, data, DType::F32, Pass::Forward).unwrap();
        let all = run(&data);
        for query in [1, case.queries / 3, case.queries / 2 + 3, case.queries.saturating_sub(1)] {
            // The first query that is changed stands at this key.
            let position = (query + case.keys) as i64 - case.queries as i64;
            if query >= case.queries || position < 0 {
                continue;
            }
            let counts = counts_keys(case);
            let changed = run(&with_other_future(&data, query, position as usize, counts));
            assert_same_past(case, all.out(), changed.out(), query);
            if !counts || all.out().data.iter().any(|&x| x != 0.0) {
                assert_ne!(all.out().data, changed.out().data, "{case}: the change had no effect at all");
            }
            let operations = cases::lists()
                .iter()
                .map(|list| list[0].operation.name())
                .position(|name| name == case.operation.name());
            checked[operations.unwrap()] += 1;
        }
    }
    assert!(checked.iter().all(|&count| count >= 20), "{checked:?}");
}

/// Later keys of thirty times the size move a stabiliser that is not strictly causal by hundreds.
#[test]
fn large_later_keys_change_no_earlier_output_of_favor() {
    use attn_kernels::performer::FavorMap;
    for map in [FavorMap::Positive, FavorMap::Hyperbolic, FavorMap::Relu] {
        for (scale, queries) in [(30.0, 130), (-30.0, 200), (0.01, 65), (30.0, 64)] {
            let options = PerformerOptions { map, causal: true, ..Default::default() };
            let case = Case::new("later keys times 30", Operation::Performer(options, 32)).lengths(queries, queries);
            let data = Data::new(&case, DType::F32);
            for first in [1, 40, 63] {
                let mut later = data.clone();
                change(&mut later.k, first, scale);
                for backend in backends::all().iter().filter(|backend| backend.is_available()) {
                    let run = |data| backend.run(&case, data, DType::F32, Pass::Forward).unwrap();
                    assert_same_past(&case, run(&data).out(), run(&later).out(), first);
                }
            }
        }
    }
}
