//! What must not matter: threads, batch entries, where a sequence is cut, in which form the same decay is given.

use attn_kernels::DeltaOptions;
use attn_kernels::cpu::{self, delta, gated_linear, generalized_delta};
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::problem::{DType, RankOne, View};
use attn_kernels::reference::Array;

use super::case::{Case, Data, Decay, Form};
use super::run::run;
use crate::common::buffers::Layout;
use crate::common::compare::{error, magnitude};
use crate::common::reference::Results;

fn case(form: Form, decay: Decay) -> Case {
    let (heads, widths) = ([1, 1, 1], [24, 100]);
    let (strength, most) = (0.5, 1.5);
    Case {
        form,
        decay,
        strength,
        most,
        batch: 1,
        heads,
        tokens: 300,
        widths,
        normalize: Some(1e-6),
        masked: true,
        state: true,
    }
}

fn all() -> impl Iterator<Item = Case> {
    let of = |form| Decay::ALL.into_iter().map(move |decay| case(form, decay));
    Form::ALL.into_iter().flat_map(of).filter(|case| case.form != Form::Gated || case.decay == Decay::Channel)
}

fn on<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[track_caller]
fn assert_same_bits(first: &Results, second: &Results, what: &str) {
    assert_eq!(first.0.len(), second.0.len());
    for ((name, x), (_, y)) in first.0.iter().zip(&second.0) {
        assert_eq!(x.shape, y.shape, "{what}: {name}");
        let differs = x.data.iter().zip(&y.data).position(|(x, y)| x.to_bits() != y.to_bits());
        assert!(differs.is_none(), "{what}: {name} differs at element {differs:?}");
    }
}

/// f64 results that differ by roundings: by no more than 1e-13 of their size.
#[track_caller]
fn assert_near(name: &str, got: &Array, expected: &Array) {
    assert_eq!(got.shape, expected.shape, "{name}");
    let far = error(got, expected).unwrap_or_else(|at| panic!("{name} at {at}"));
    assert!(far.rms <= 1e-13 * magnitude(expected).rms, "{name}: {far:?} of {:?}", magnitude(expected));
}

/// Columns of a head are shared out among threads where there are fewer heads than those.
#[test]
fn any_number_of_threads() {
    for mut case in all() {
        for heads in [[1, 1, 1], [2, 1, 1], [2, 2, 4]] {
            case.heads = heads;
            let data = Data::new(&case, DType::F32);
            let alone = on(1, || run::<f32>(&case, &data, Layout::Contiguous));
            for threads in [2, 3, 9] {
                let results = on(threads, || run::<f32>(&case, &data, Layout::Contiguous));
                assert_same_bits(&alone, &results, &format!("{case:?}, {threads} threads"));
            }
        }
    }
}

/// Through more than a window of segments, with columns that are no whole block.
#[test]
fn any_number_of_threads_over_long_sequences() {
    for form in Form::ALL {
        let case = Case { tokens: 2100, widths: [6, 37], batch: 2, ..case(form, Decay::Channel) };
        let data = Data::new(&case, DType::F64);
        let alone = on(1, || run::<f64>(&case, &data, Layout::Contiguous));
        assert_same_bits(&alone, &on(5, || run::<f64>(&case, &data, Layout::Contiguous)), &format!("{case:?}"));
    }
}

/// A token is one step of the state as a whole, and a chunk of one token where the columns are cut.
#[test]
fn a_token_is_a_chunk() {
    for case in all() {
        let case = Case { tokens: 1, heads: [3; 3], widths: [256, 256], ..case };
        let data = Data::new(&case, DType::F32);
        let alone = on(1, || run::<f32>(&case, &data, Layout::Contiguous));
        assert_same_bits(&alone, &on(9, || run::<f32>(&case, &data, Layout::Contiguous)), &format!("{case:?}"));
    }
}

/// One batch entry of an array that has them in dimension `axis`.
fn entry(x: &Array, axis: usize, index: usize) -> Array {
    let mut shape = x.shape;
    shape[axis] = 1;
    Array::from_fn(shape, |mut at| {
        at[axis] = index;
        x.row(at[0], at[1], at[2])[at[3]]
    })
}

fn batch_axis(case: &Case, name: &str) -> usize {
    match name {
        "d_beta" => 1,
        "d_log_decay" if case.decay != Decay::Channel => 1,
        _ => 0,
    }
}

#[test]
fn batch_entries_are_alone() {
    for case in all() {
        let many = Case { batch: 3, ..case.clone() };
        let data = Data::new(&many, DType::F32);
        let together = on(4, || run::<f32>(&many, &data, Layout::Contiguous));
        for index in 0..3 {
            let rows = |x: &Array| entry(x, 0, index);
            let of_decay = |x: &Array| if x.shape[0] == 3 { entry(x, 0, index) } else { entry(x, 1, index) };
            let own = Data {
                q: rows(&data.q),
                k: rows(&data.k),
                v: rows(&data.v),
                rank_one: match &data.rank_one {
                    RankOne::None => RankOne::None,
                    RankOne::Rule { beta } => RankOne::Rule { beta: entry(beta, 1, index) },
                    RankOne::Free { a, b } => RankOne::Free { a: rows(a), b: rows(b) },
                },
                log_decay: data
                    .log_decay
                    .as_ref()
                    .map(|x| if case.decay == Decay::Head { x.clone() } else { of_decay(x) }),
                bonus: data.bonus.clone(),
                key_mask: data.key_mask.as_ref().map(|mask| entry(mask, 2, index)),
                state: data.state.as_ref().map(rows),
                d_out: rows(&data.d_out),
                d_state: data.d_state.as_ref().map(rows),
            };
            let mut alone = on(2, || run::<f32>(&case, &own, Layout::Contiguous));
            // That of the bonus is a sum over batch entries.
            alone.0.retain(|(name, _)| *name != "d_bonus");
            let of_entry = together.0.iter().filter(|(name, _)| *name != "d_bonus");
            let of_entry = of_entry.map(|(name, x)| (*name, entry(x, batch_axis(&case, name), index))).collect();
            assert_same_bits(&alone, &Results(of_entry), &format!("{case:?}, entry {index}"));
        }
    }
}

const WIDTHS: [usize; 2] = [12, 40];
const HEADS: usize = 2;
const TOKENS: usize = 90;

/// Numbers of two heads: rows, β, a log-decay per token and the same per channel.
struct Numbers {
    data: Data,
    beta: Vec<f64>,
    token: Vec<f64>,
    channel: Vec<f64>,
}

impl Numbers {
    fn new() -> Self {
        let case = Case { heads: [HEADS; 3], tokens: TOKENS, widths: WIDTHS, ..case(Form::Free, Decay::Token) };
        let data = Data::new(&case, DType::F64);
        let token = data.log_decay.as_ref().unwrap().data.clone();
        let channel = token.iter().flat_map(|&g| [g; WIDTHS[0]]).collect();
        let beta = token.iter().map(|g| -3.0 * g).collect();
        Self { data, beta, token, channel }
    }

    fn rows<'a>(&self, x: &'a Array) -> View<'a> {
        View::contiguous(&x.data[..], &x.shape).unwrap()
    }

    fn operands(&self) -> [View<'_>; 3] {
        [&self.data.q, &self.data.k, &self.data.v].map(|x| self.rows(x))
    }

    /// A log-decay per token or per channel.
    fn options(&self, per_channel: bool) -> DeltaOptions<View<'_>> {
        let dims = [1, HEADS, TOKENS, WIDTHS[0]];
        let decay = if per_channel {
            View::contiguous(&self.channel[..], &dims)
        } else {
            View::contiguous(&self.token[..], &dims[..3])
        };
        DeltaOptions { log_decay: Some(decay.unwrap()), ..Default::default() }
    }
}

fn array(data: &[f64], shape: [usize; 4]) -> Array {
    Array { data: data.to_vec(), shape }
}

const OUT: [usize; 4] = [1, HEADS, TOKENS, WIDTHS[1]];
const STATE: [usize; 4] = [1, HEADS, WIDTHS[0], WIDTHS[1]];

/// Kimi Delta Attention with the decay of a token for every channel is Gated DeltaNet, forward and backward, and so for free
/// transitions.
#[test]
fn constant_channels_are_a_scalar() {
    let numbers = Numbers::new();
    let ([q, k, v], d_out) = (numbers.operands(), &numbers.data.d_out);
    let RankOne::Free { a, b } = &numbers.data.rank_one else { panic!("a and b") };
    let pair = [numbers.rows(a), numbers.rows(b)];
    let beta = View::contiguous(&numbers.beta[..], &[1, HEADS, TOKENS]).unwrap();
    let rule = |per_channel| delta::<f64>(q, k, v, beta, &numbers.options(per_channel), None).unwrap();
    let free = |per_channel| generalized_delta::<f64>(q, k, v, pair, &numbers.options(per_channel), None).unwrap();
    for [scalar, channels] in [[rule(false), rule(true)], [free(false), free(true)]] {
        assert_near("out", &array(&channels.out, OUT), &array(&scalar.out, OUT));
        assert_near("state", &array(&channels.state, STATE), &array(&scalar.state, STATE));
        let [of_scalar, of_channels] = [&scalar, &channels].map(|run| run.backward(&d_out.data, None).unwrap());
        let rows = numbers.data.q.shape;
        assert_near("d_q", &array(&of_channels.q, rows), &array(&of_scalar.q, rows));
        assert_near("d_k", &array(&of_channels.k, rows), &array(&of_scalar.k, rows));
        assert_near("d_v", &array(&of_channels.v, OUT), &array(&of_scalar.v, OUT));
        let summed: Vec<f64> =
            of_channels.log_decay.unwrap().chunks(WIDTHS[0]).map(|channels| channels.iter().sum()).collect();
        let tokens = [1, 1, HEADS, TOKENS];
        assert_near("d_log_decay", &array(&summed, tokens), &array(&of_scalar.log_decay.unwrap(), tokens));
    }
}

/// With a = 0 the general form is gated linear attention, and with the decay of a token for every channel that is linear
/// attention of the linear engine.
#[test]
fn without_a_rank_one_part() {
    let numbers = Numbers::new();
    let ([q, k, v], d_out) = (numbers.operands(), &numbers.data.d_out);
    let gated = gated_linear::<f64>(q, k, v, &numbers.options(true), None).unwrap();
    let zeros = Array::zeros(numbers.data.k.shape);
    let pair = [numbers.rows(&zeros), numbers.rows(&numbers.data.k)];
    let general = generalized_delta::<f64>(q, k, v, pair, &numbers.options(true), None).unwrap();
    let options = LinearOptions {
        causal: true,
        map: FeatureMap::Identity,
        normalizer: None,
        log_decay: numbers.options(false).log_decay,
        ..Default::default()
    };
    let tau = 1.0 / (WIDTHS[0] as f64).sqrt();
    let scaled: Vec<f64> = numbers.data.q.data.iter().map(|q| tau * q).collect();
    let scaled = View::contiguous(&scaled[..], &numbers.data.q.shape).unwrap();
    let linear = cpu::linear::<f64>(scaled, k, v, &options).unwrap();
    for out in [&general.out, &linear.out] {
        assert_near("out", &array(out, OUT), &array(&gated.out, OUT));
    }
    let rows = numbers.data.q.shape;
    let [of_gated, of_general] = [&gated, &general].map(|run| run.backward(&d_out.data, None).unwrap());
    let of_linear = linear.backward(&d_out.data).unwrap();
    for (d_k, d_v) in [(&of_general.k, &of_general.v), (&of_linear.k, &of_linear.v)] {
        assert_near("d_k", &array(d_k, rows), &array(&of_gated.k, rows));
        assert_near("d_v", &array(d_v, OUT), &array(&of_gated.v, OUT));
    }
}

/// Tokens `range` of an array that has them in dimension `axis`.
fn piece(x: &Array, axis: usize, range: &std::ops::Range<usize>) -> Array {
    let mut shape = x.shape;
    shape[axis] = range.len();
    Array::from_fn(shape, |mut at| {
        at[axis] += range.start;
        x.row(at[0], at[1], at[2])[at[3]]
    })
}

/// Pieces, each from the state that the one before left, with the gradients of states handed back.
#[test]
fn cut_anywhere() {
    for case in all() {
        let case = Case { tokens: 70, heads: [2, 2, 4], ..case };
        let data = Data::new(&case, DType::F64);
        let whole = run::<f64>(&case, &data, Layout::Contiguous);
        for cut in [0, 1, 2, 16, 33, 69, 70] {
            let part = |range: std::ops::Range<usize>, state: &Option<Array>, d_state: &Option<Array>| {
                let rows = |x: &Array| piece(x, 2, &range);
                let tokens = |x: &Array| piece(x, 3, &range);
                let own = Data {
                    q: rows(&data.q),
                    k: rows(&data.k),
                    v: rows(&data.v),
                    rank_one: match &data.rank_one {
                        RankOne::None => RankOne::None,
                        RankOne::Rule { beta } => RankOne::Rule { beta: tokens(beta) },
                        RankOne::Free { a, b } => RankOne::Free { a: rows(a), b: rows(b) },
                    },
                    log_decay: data.log_decay.as_ref().map(|x| match case.decay {
                        Decay::Channel => rows(x),
                        Decay::Token => tokens(x),
                        _ => x.clone(),
                    }),
                    bonus: data.bonus.clone(),
                    key_mask: data.key_mask.as_ref().map(tokens),
                    state: state.clone(),
                    d_out: rows(&data.d_out),
                    d_state: d_state.clone(),
                };
                run::<f64>(&Case { tokens: range.len(), ..case.clone() }, &own, Layout::Contiguous)
            };
            let between = part(0..cut, &data.state, &None).get("state").cloned();
            let second = part(cut..70, &between, &data.d_state);
            let first = part(0..cut, &data.state, &second.get("d_state").cloned());
            for (name, expected) in &whole.0 {
                let (Some(x), Some(y)) = (first.get(name), second.get(name)) else { panic!("{name}") };
                let got = match *name {
                    "state" => y.clone(),
                    "d_state" => x.clone(),
                    "d_bonus" => Array { data: x.data.iter().zip(&y.data).map(|(x, y)| x + y).collect(), ..x.clone() },
                    "d_beta" => joined(x, y, 3),
                    "d_log_decay" if case.decay == Decay::Token => joined(x, y, 3),
                    _ => joined(x, y, 2),
                };
                assert_near(&format!("{case:?} cut at {cut}: {name}"), &got, expected);
            }
        }
    }
}

fn joined(x: &Array, y: &Array, axis: usize) -> Array {
    let mut shape = x.shape;
    let first = shape[axis];
    shape[axis] += y.shape[axis];
    Array::from_fn(shape, |mut at| {
        let from = if at[axis] < first { x } else { y };
        at[axis] -= if at[axis] < first { 0 } else { first };
        from.row(at[0], at[1], at[2])[at[3]]
    })
}
