//! The delta engine on every CPU path against the recurrence.

use attn_kernels::DeltaOptions;
use attn_kernels::cpu::{
    DeltaAttention, DeltaAttentionGradients, Element, Isa, delta, gated_linear, generalized_delta,
};
use attn_kernels::problem::{RankOne, Slice, View};
use attn_kernels::reference::{self, Array, DeltaGradients};

use crate::common::random::Random;

/// Uniform in ±1.
fn random(shape: [usize; 4], seed: u64) -> Array {
    let mut random = Random::new(&seed.to_string());
    Array::from_fn(shape, |_| 2.0 * random.uniform() - 1.0)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Gated,
    Rule,
    Free,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Decay {
    None,
    Head,
    Token,
    Channel,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    form: Form,
    decay: Decay,
    /// Of the log-decays.
    strength: f64,
    heads: [usize; 3],
    tokens: usize,
    widths: [usize; 2],
    normalize: Option<f64>,
    masked: bool,
    state: bool,
}

/// Inputs of a case, rounded to f32.
struct Data {
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    a: Array,
    b: Array,
    log_decay: Option<Array>,
    key_mask: Option<Array>,
    state: Option<Array>,
    d_out: Array,
    d_state: Option<Array>,
}

const BATCH: usize = 2;

fn rounded(mut x: Array) -> Array {
    x.data.iter_mut().for_each(|x| *x = f64::from(*x as f32));
    x
}

impl Data {
    fn new(case: &Case) -> Self {
        let Case { heads: [hq, hk, hv], tokens: n, widths: [d, e], .. } = *case;
        let hs = hk.max(hv);
        let h = hq.max(hs);
        let scale = 1.0 / (d as f64).sqrt();
        let scaled = |mut x: Array, by: f64| {
            x.data.iter_mut().for_each(|x| *x *= by);
            rounded(x)
        };
        let decay = |shape| {
            let mut x = random(shape, 7);
            x.data.iter_mut().for_each(|x| *x = -x.abs() * case.strength);
            // A cut.
            if let Some(x) = x.data.get_mut(5).filter(|_| case.decay != Decay::Head) {
                *x = f64::NEG_INFINITY;
            }
            rounded(x)
        };
        let state = [BATCH, hs, d, e];
        Self {
            q: rounded(random([BATCH, hq, n, d], 1)),
            k: scaled(random([BATCH, hk, n, d], 2), 1.5 * scale),
            v: rounded(random([BATCH, hv, n, e], 3)),
            beta: {
                let mut x = random([1, BATCH, hs, n], 4);
                x.data.iter_mut().for_each(|x| *x = 0.5 + 0.5 * *x);
                rounded(x)
            },
            a: scaled(random([BATCH, hk, n, d], 5), scale),
            b: scaled(random([BATCH, hk, n, d], 6), scale),
            log_decay: match case.decay {
                Decay::None => None,
                Decay::Head => Some(decay([1, 1, 1, hs])),
                Decay::Token => Some(decay([1, BATCH, hs, n])),
                Decay::Channel => Some(decay([BATCH, hs, n, d])),
            },
            key_mask: case.masked.then(|| {
                Array::from_fn([1, 1, BATCH, n], |[_, _, b, t]| f64::from(u8::from((t + b) % 5 != 1 && t + 2 < n)))
            }),
            state: case.state.then(|| rounded(random(state, 8))),
            d_out: rounded(random([BATCH, h, n, e], 9)),
            d_state: case.state.then(|| rounded(random(state, 10))),
        }
    }

    fn rank_one(&self, case: &Case) -> RankOne<&Array> {
        match case.form {
            Form::Gated => RankOne::None,
            Form::Rule => RankOne::Rule { beta: &self.beta },
            Form::Free => RankOne::Free { a: &self.a, b: &self.b },
        }
    }
}

fn options<T>(case: &Case, log_decay: Option<T>, key_mask: Option<T>) -> DeltaOptions<T> {
    DeltaOptions { log_decay, key_mask, normalize: case.normalize, ..Default::default() }
}

fn expected(case: &Case, data: &Data) -> (Array, Array, DeltaGradients) {
    let options = options(case, data.log_decay.clone(), data.key_mask.clone());
    let (operands, rank_one) = ([&data.q, &data.k, &data.v], data.rank_one(case));
    let state = data.state.as_ref();
    let (out, last) = reference::delta_attention(operands, rank_one, &options, state);
    let d_state = data.d_state.as_ref();
    let gradients = reference::delta_attention_backward(operands, rank_one, &options, state, &data.d_out, d_state);
    (out, last, gradients)
}

trait Float: Element<Sum = Self> {
    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
}

impl Float for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Float for f64 {
    fn of(x: f64) -> Self {
        x
    }
    fn wide(self) -> f64 {
        self
    }
}

fn numbers<T: Float>(x: &Array) -> Vec<T> {
    x.data.iter().map(|&x| T::of(x)).collect()
}

type Run<T> = (Vec<T>, Vec<T>, DeltaAttentionGradients<T>);

/// Outputs, last state and gradients of the CPU.
fn run<T: Float>(case: &Case, data: &Data) -> Run<T>
where
    for<'a> Slice<'a>: From<&'a [T]>,
{
    let [q, k, v, beta, a, b, d_out] =
        [&data.q, &data.k, &data.v, &data.beta, &data.a, &data.b, &data.d_out].map(numbers::<T>);
    let [state, d_state] = [&data.state, &data.d_state].map(|x| x.as_ref().map(numbers::<T>));
    let log_decay = data.log_decay.as_ref().map(numbers::<T>);
    let key_mask: Option<Vec<u8>> = data.key_mask.as_ref().map(|x| x.data.iter().map(|&x| x as u8).collect());
    let view = |x, dims: &[usize]| View::contiguous(x, dims).unwrap();
    let [q, k, v] = [(&q, &data.q), (&k, &data.k), (&v, &data.v)].map(|(x, array)| view(&x[..], &array.shape));
    let skip = match case.decay {
        Decay::Channel => 0,
        Decay::Token => 1,
        _ => 3,
    };
    let log_decay = log_decay.as_ref().map(|x| view(&x[..], &data.log_decay.as_ref().unwrap().shape[skip..]));
    let mask_dims = [BATCH, case.tokens];
    let key_mask = key_mask.as_ref().map(|mask| View::contiguous(&mask[..], &mask_dims).unwrap());
    let options = options(case, log_decay, key_mask);
    let state = state.as_deref();
    let attention: DeltaAttention<'_, T> = match case.form {
        Form::Gated => gated_linear(q, k, v, &options, state),
        Form::Rule => delta(q, k, v, view(&beta[..], &data.beta.shape[1..]), &options, state),
        Form::Free => {
            let pair = [view(&a[..], &data.a.shape), view(&b[..], &data.b.shape)];
            generalized_delta(q, k, v, pair, &options, state)
        }
    }
    .unwrap();
    let gradients = attention.backward(&d_out, d_state.as_deref()).unwrap();
    (attention.out, attention.state, gradients)
}

fn check<T: Float>(name: &str, got: &[T], expected: &Array, tolerance: f64) {
    assert_eq!(got.len(), expected.data.len(), "{name}");
    let largest = expected.data.iter().fold(1e-3f64, |most, x| most.max(x.abs()));
    for (index, (got, expected)) in got.iter().zip(&expected.data).enumerate() {
        let error = (got.wide() - expected).abs() / largest;
        assert!(error <= tolerance, "{name}[{index}]: {} for {expected}, off by {error:.2e}", got.wide());
    }
}

fn compare<T: Float>(case: &Case, data: &Data, tolerance: f64)
where
    for<'a> Slice<'a>: From<&'a [T]>,
{
    let (out, last, expected) = expected(case, data);
    let (got_out, got_last, got) = run::<T>(case, data);
    check("out", &got_out, &out, tolerance);
    check("state", &got_last, &last, tolerance);
    check("d_q", &got.q, &expected.q, tolerance);
    check("d_k", &got.k, &expected.k, tolerance);
    check("d_v", &got.v, &expected.v, tolerance);
    match &expected.rank_one {
        RankOne::None => {}
        RankOne::Rule { beta } => check("d_beta", &got.beta.unwrap(), beta, tolerance),
        RankOne::Free { a, b } => {
            let [d_a, d_b] = got.a_and_b.unwrap();
            check("d_a", &d_a, a, tolerance);
            check("d_b", &d_b, b, tolerance);
        }
    }
    if matches!(case.decay, Decay::Token | Decay::Channel) {
        check("d_log_decay", &got.log_decay.unwrap(), &expected.log_decay.unwrap(), tolerance);
    }
    if case.state {
        check("d_state", &got.state.unwrap(), &expected.state, tolerance);
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes =
        [(1, [4, 4]), (15, [16, 16]), (16, [8, 24]), (17, [33, 5]), (40, [16, 32]), (131, [7, 9]), (290, [32, 16])];
    for form in [Form::Gated, Form::Rule, Form::Free] {
        let decays = [Decay::None, Decay::Head, Decay::Token, Decay::Channel];
        // Without a rank-one part scalar decays are those of the linear engine.
        for decay in decays.into_iter().filter(|decay| form != Form::Gated || *decay == Decay::Channel) {
            for (index, (tokens, widths)) in sizes.into_iter().enumerate() {
                let heads = [[1, 1, 1], [2, 2, 4], [4, 2, 2], [1, 2, 2], [2, 2, 2]][index % 5];
                let strength = [0.1, 30.0, 1.0][index % 3];
                let normalize = (index % 2 == 1).then_some(1e-6);
                let (masked, state) = (index % 3 == 1, index % 4 != 1);
                cases.push(Case { form, decay, strength, heads, tokens, widths, normalize, masked, state });
            }
        }
    }
    cases
}

#[test]
fn as_the_reference() {
    for case in cases() {
        let data = Data::new(&case);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let outcome = std::panic::catch_unwind(|| {
                isa.force(|| {
                    compare::<f64>(&case, &data, 1e-13);
                    compare::<f32>(&case, &data, 3e-6);
                })
            });
            assert!(outcome.is_ok(), "{isa:?} {case:?}");
        }
    }
}
