//! The numbers that a case is run on.

use std::ops::Range;

use attn_kernels::problem::{DType, Mask};
use attn_kernels::random_features::{FeatureKind, random_features};
use attn_kernels::reference::{Array, State, StateGradient};

use super::buffers::round;
use super::cases::{Case, Entry, Extra, Operation};
use super::options::Extras;
use super::random::Random;
use super::reference::{state_after, with_state};

/// Inputs in f64, representable in the dtype of the run; optional tensors in the shapes of the reference.
#[derive(Debug, Clone)]
pub struct Data {
    pub q: Array,
    pub k: Array,
    pub v: Array,
    /// q and k of the global branch of mixed chunks.
    pub global: Option<[Array; 2]>,
    pub extras: Extras<Array>,
    pub omega: Option<Array>,
    /// The tokens behind `state`.
    pub prefix: Option<Prefix>,
    pub state: Option<State>,
    /// Tokens that the state has seen.
    pub position: usize,
    pub d_out: Array,
    pub d_lse: Option<Array>,
    pub d_state: Option<StateGradient>,
}

/// Earlier tokens; never masked.
#[derive(Debug, Clone)]
pub struct Prefix {
    pub k: Array,
    pub v: Array,
    pub log_decay: Option<Array>,
}

impl Data {
    pub fn new(case: &Case, dtype: DType) -> Self {
        let random = &mut Random::new(case.why);
        let mut normal = |shape: [usize; 4], std: f64, dtype| {
            let mut array = random.array(shape, std);
            array.data.iter_mut().for_each(|x| *x = round(dtype, *x));
            array
        };
        let &Case { batch, heads: [hq, hk, hv], queries, keys, width, value_width, std, prefix, .. } = case;
        let accumulator = dtype.accumulator();
        let mut q = normal([batch, hq, queries, width], std, dtype);
        let mut k = normal([batch, hk, keys, width], std, dtype);
        let mut v = normal([batch, hv, keys, value_width], 1.0, dtype);
        let mut global = matches!(case.operation, Operation::MixedChunk(_)).then(|| {
            let width = case.global_width();
            [normal([batch, hq, queries, width], std, dtype), normal([batch, hk, keys, width], std, dtype)]
        });
        let bias = bias_shape(case).map(|shape| normal(shape, 0.5, dtype));
        let mut d_out = normal([batch, case.output_heads(), queries, value_width], 1.0, dtype);
        if case.is_positive {
            [&mut q, &mut k, &mut v, &mut d_out].into_iter().flat_map(|x| &mut x.data).for_each(|x| *x = x.abs());
        }
        let d_lse = case.lse_gradient.then(|| normal([batch, hq, queries, 1], 1.0, accumulator));
        let omega = make_omega(case, accumulator);
        let key_mask = case.operation.key_mask().map(|kind| make_key_mask(case, kind));
        if let Some(mask) = &key_mask {
            let global_keys = global.iter_mut().map(|[_, k]| k);
            [&mut k, &mut v].into_iter().chain(global_keys).for_each(|x| fill_masked(x, mask, f64::NAN));
        }
        let log_decay = case.operation.log_decay().map(|kind| make_log_decay(case, kind, keys, accumulator));
        let prefix = (prefix > 0).then(|| Prefix {
            k: normal([batch, hk, prefix, width], std, dtype),
            v: normal([batch, hv, prefix, value_width], 1.0, dtype),
            log_decay: case.operation.log_decay().map(|kind| make_log_decay(case, kind, prefix, accumulator)),
        });
        let attention_bias = case.operation.attention_bias().map(|kind| make_attention_bias(case, kind, dtype));
        let sinks = case.operation.sinks().map(|kind| {
            let mut sinks = Random::new("sinks").array([1, 1, 1, hq], 1.0);
            sinks.data.iter_mut().for_each(|x| *x = round(entry_dtype(kind, dtype), *x));
            sinks
        });
        let extras = Extras { key_mask, bias, log_decay, attention_bias, sinks };
        let position = case.prefix;
        let mut data =
            Self { q, k, v, global, extras, omega, prefix, state: None, position, d_out, d_lse, d_state: None };
        data.state = data.prefix.as_ref().map(|prefix| {
            let mut state = state_after(case, prefix, data.omega.as_ref());
            let arrays = [&mut state.s, &mut state.z].into_iter().chain(&mut state.stabilizer);
            arrays.for_each(|array| array.data.iter_mut().for_each(|x| *x = round(accumulator, *x)));
            state
        });
        if case.state_gradient {
            let State { s, z, .. } = with_state(case, &data, None).1;
            data.d_state =
                Some(StateGradient { s: normal(s.shape, 1.0, accumulator), z: normal(z.shape, 1.0, accumulator) });
        }
        data
    }
}

/// The dtype of what an attention bias or sinks hold, in a run on q of `dtype`.
pub fn entry_dtype(kind: Extra, dtype: DType) -> DType {
    match kind {
        Extra::Pairs(_, Entry::Wide) => DType::F32,
        Extra::Pairs(_, Entry::Keep) => DType::U8,
        _ => dtype,
    }
}

/// 1 where a bias of 0 and −∞ keeps a pair.
pub fn kept_pairs(bias: &Array) -> Array {
    let data = bias.data.iter().map(|&x| if x == 0.0 { 1.0 } else { 0.0 }).collect();
    Array { data, shape: bias.shape }
}

fn make_attention_bias(case: &Case, kind: Extra, dtype: DType) -> Array {
    let Extra::Pairs(has, entry) = kind else { unreachable!("not an attention bias") };
    let full = [case.batch, case.heads[0], case.queries, case.keys];
    let mut random = Random::new("attention bias");
    let dtype = if entry == Entry::Wide { DType::F32 } else { dtype };
    Array::from_fn(std::array::from_fn(|axis| if has[axis] { full[axis] } else { 1 }), |[_, _, i, _]| {
        let number = round(dtype, random.normal());
        let is_hole = random.uniform() < 0.2 || i == 1;
        match entry {
            Entry::Holes | Entry::Keep if is_hole => f64::NEG_INFINITY,
            Entry::Keep => 0.0,
            _ => number,
        }
    })
}

fn bias_shape(case: &Case) -> Option<[usize; 4]> {
    let heads = if case.operation.bias()? == Extra::PerHead { case.heads[0] } else { 1 };
    let mask = match &case.operation {
        Operation::Softmax(options) => options.mask,
        Operation::Gau(options) => options.mask,
        Operation::MixedChunk(options) => Mask::Blocks { size: options.chunk_size, causal: options.causal },
        _ => unreachable!("an operation without bias"),
    };
    // The smallest radius that is accepted, and one that has entries to spare.
    let reach = mask.reach(case.queries, case.keys);
    let radius = if heads == 1 { case.queries.max(case.keys) + 2 } else { reach };
    Some([1, 1, heads, 2 * radius + 1])
}

fn make_omega(case: &Case, accumulator: DType) -> Option<Array> {
    let Operation::Performer(_, directions) = case.operation else { return None };
    let rows = random_features(FeatureKind::Orthogonal, directions, case.width, 1).unwrap();
    let data = rows.into_iter().map(|x| round(accumulator, x)).collect();
    Some(Array { data, shape: [1, 1, directions, case.width] })
}

/// `[1, 1, B, M]`
fn make_key_mask(case: &Case, kind: Extra) -> Array {
    let mut random = Random::new("key mask");
    Array::from_fn([1, 1, case.batch, case.keys], |[_, _, b, j]| {
        let removed = j == 0 || random.uniform() < 0.25 || (kind == Extra::NoKeys && b == 0);
        if removed { 0.0 } else { 1.0 }
    })
}

/// Fills the rows that the mask removes.
pub fn fill_masked(x: &mut Array, key_mask: &Array, value: f64) {
    for [b, h, j] in rows(x).filter(|&[b, _, j]| key_mask.row(0, 0, b)[j] == 0.0) {
        x.row_mut(b, h, j).fill(value);
    }
}

const RESETS: [f64; 7] = [f64::NEG_INFINITY, f32::MIN as f64, -1e3, -1e12, -120.0, -1e9, -1e6];

fn make_log_decay(case: &Case, kind: Extra, keys: usize, accumulator: DType) -> Array {
    let heads = case.state_heads();
    let mut random = Random::new(if keys == case.prefix { "earlier log-decay" } else { "log-decay" });
    let shape = if kind == Extra::PerHead { [1, 1, 1, heads] } else { [1, case.batch, heads, keys] };
    Array::from_fn(shape, |[_, _, head, last]| {
        let g = match kind {
            // RetNet's 1 − 2^{−5−h}
            Extra::PerHead => (1.0 - 2f64.powi(-5 - last as i32)).ln(),
            Extra::PerToken => -0.1 * random.normal().abs(),
            Extra::Strong if random.uniform() < 0.2 => -30.0 * random.uniform(),
            Extra::Strong | Extra::Zero => 0.0,
            Extra::Resets if last % 9 == 0 => RESETS[(last / 9 + head) % RESETS.len()],
            Extra::Resets => -0.1 * random.normal().abs(),
            Extra::Constant(count) => -f64::from(count) / 1e4,
            _ => unreachable!("not a log-decay"),
        };
        round(accumulator, g)
    })
}

impl Data {
    /// The same run with the tokens behind the state as part of the keys, and with the log-decay per token; queries
    /// stay those of the new tokens.
    pub fn joined(&self, case: &Case) -> Self {
        let expand = |g: &Array, keys| if case.has_decay_per_head() { self.per_token(g, keys) } else { g.clone() };
        let keys = self.k.shape[2];
        let log_decay = self.extras.log_decay.as_ref().map(|g| expand(g, keys));
        let Some(prefix) = &self.prefix else {
            return Self { extras: Extras { log_decay, ..self.extras.clone() }, ..self.clone() };
        };
        assert!(self.q.shape[2] <= keys, "a query before the first key would see keys behind the state");
        let before = prefix.k.shape[2];
        let earlier = prefix.log_decay.as_ref().map(|g| expand(g, before));
        let key_mask = self.extras.key_mask.as_ref().map(|mask| {
            let kept = Array::filled([1, 1, mask.shape[2], before], 1.0);
            concatenate_columns(&kept, mask)
        });
        let log_decay = earlier.zip(log_decay).map(|(first, second)| concatenate_columns(&first, &second));
        Self {
            k: concatenate_rows(&prefix.k, &self.k),
            v: concatenate_rows(&prefix.v, &self.v),
            extras: Extras { key_mask, log_decay, ..Extras::default() },
            state: None,
            prefix: None,
            ..self.clone()
        }
    }

    /// Some of the queries and keys of a run, without a state.
    pub fn piece(&self, case: &Case, queries: Range<usize>, keys: Range<usize>) -> (Case, Self) {
        let small = case.clone().lengths(queries.len(), keys.len());
        let columns = |x: &Array| slice_columns(x, keys.clone());
        let log_decay = self.extras.log_decay.as_ref();
        let log_decay = log_decay.map(|g| if case.has_decay_per_head() { g.clone() } else { columns(g) });
        let key_mask = self.extras.key_mask.as_ref().map(columns);
        let [rows_of_queries, rows_of_keys] = [&queries, &keys].map(|range| |x: &Array| slice_rows(x, range.clone()));
        let part = Self {
            q: rows_of_queries(&self.q),
            k: rows_of_keys(&self.k),
            v: rows_of_keys(&self.v),
            global: self.global.as_ref().map(|[q, k]| [rows_of_queries(q), rows_of_keys(k)]),
            extras: Extras { key_mask, log_decay, ..self.extras.clone() },
            d_out: rows_of_queries(&self.d_out),
            d_lse: self.d_lse.as_ref().map(rows_of_queries),
            ..self.clone()
        };
        (small, part)
    }

    /// `[1, 1, 1, Hs]` as `[1, B, Hs, keys]`.
    fn per_token(&self, log_decay: &Array, keys: usize) -> Array {
        let shape = [1, self.k.shape[0], log_decay.shape[3], keys];
        Array::from_fn(shape, |[_, _, h, _]| log_decay.data[h])
    }
}

/// [.., N, D] and [.., M, D] as [.., N + M, D].
pub fn concatenate_rows(first: &Array, second: &Array) -> Array {
    let n = first.shape[2];
    let shape = [first.shape[0], first.shape[1], n + second.shape[2], first.shape[3]];
    Array::from_fn(shape, |[b, h, i, d]| if i < n { first.row(b, h, i)[d] } else { second.row(b, h, i - n)[d] })
}

/// [.., N] and [.., M] as [.., N + M].
pub fn concatenate_columns(first: &Array, second: &Array) -> Array {
    let n = first.shape[3];
    let shape = [first.shape[0], first.shape[1], first.shape[2], n + second.shape[3]];
    Array::from_fn(shape, |[a, b, h, j]| if j < n { first.row(a, b, h)[j] } else { second.row(a, b, h)[j - n] })
}

/// Every `[b, h, i]` of an array.
pub fn rows(x: &Array) -> impl Iterator<Item = [usize; 3]> + use<> {
    let [batch, heads, rows, _] = x.shape;
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..rows).map(move |i| [b, h, i])))
}

/// Rows `range` of an array.
pub fn slice_rows(x: &Array, range: Range<usize>) -> Array {
    let shape = [x.shape[0], x.shape[1], range.len(), x.shape[3]];
    Array::from_fn(shape, |[b, h, i, d]| x.row(b, h, range.start + i)[d])
}

/// Columns `range` of an array.
pub fn slice_columns(x: &Array, range: Range<usize>) -> Array {
    let shape = [x.shape[0], x.shape[1], x.shape[2], range.len()];
    Array::from_fn(shape, |[a, b, h, j]| x.row(a, b, h)[range.start + j])
}
