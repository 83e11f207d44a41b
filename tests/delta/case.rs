//! What is computed.

use attn_kernels::DeltaOptions;
use attn_kernels::problem::{DType, RankOne};
use attn_kernels::reference::{self, Array};

use crate::common::buffers::round;
use crate::common::extent;
use crate::common::random::Random;
use crate::common::reference::Results;

/// The rank-one part, or its absence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Gated,
    Bonus,
    Rule,
    Free,
}

impl Form {
    pub const ALL: [Self; 4] = [Self::Gated, Self::Bonus, Self::Rule, Self::Free];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    None,
    Head,
    Token,
    Channel,
}

impl Decay {
    pub const ALL: [Self; 4] = [Self::None, Self::Head, Self::Token, Self::Channel];

    pub fn has_gradient(self) -> bool {
        matches!(self, Self::Token | Self::Channel)
    }

    /// Dimensions of the log-decay, which are the last of its array.
    pub fn rank(self) -> usize {
        match self {
            Self::Channel => 4,
            Self::Token => 3,
            _ => 1,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    pub form: Form,
    pub decay: Decay,
    /// The largest of the negative log-decays; with one of −∞ among them where it is above 1.
    pub strength: f64,
    /// The largest β.
    pub most: f64,
    pub batch: usize,
    /// Of q, k and v.
    pub heads: [usize; 3],
    pub tokens: usize,
    /// Of keys and values.
    pub widths: [usize; 2],
    pub normalize: Option<f64>,
    pub masked: bool,
    pub state: bool,
}

impl Case {
    pub fn state_heads(&self) -> usize {
        self.heads[1].max(self.heads[2])
    }

    pub fn output_heads(&self) -> usize {
        self.heads[0].max(self.state_heads())
    }

    pub fn options<T>(&self, log_decay: Option<T>, bonus: Option<T>, key_mask: Option<T>) -> DeltaOptions<T> {
        DeltaOptions { log_decay, bonus, key_mask, normalize: self.normalize, ..Default::default() }
    }
}

/// Inputs of a case, rounded to their dtypes.
#[derive(Clone)]
pub struct Data {
    pub q: Array,
    pub k: Array,
    pub v: Array,
    pub rank_one: RankOne<Array>,
    pub log_decay: Option<Array>,
    pub bonus: Option<Array>,
    pub key_mask: Option<Array>,
    pub state: Option<Array>,
    pub d_out: Array,
    pub d_state: Option<Array>,
}

/// Uniform in ±`size`, rounded.
fn random(shape: [usize; 4], name: &str, size: f64, dtype: DType) -> Array {
    let mut random = Random::new(name);
    Array::from_fn(shape, |_| round(dtype, size * (2.0 * random.uniform() - 1.0)))
}

impl Data {
    pub fn new(case: &Case, dtype: DType) -> Self {
        let Case { batch, heads: [hq, hk, hv], tokens: n, widths: [d, e], .. } = *case;
        let (hs, h) = (case.state_heads(), case.output_heads());
        let sums = if dtype == DType::F64 { DType::F32 } else { dtype.accumulator() };
        let dtype = if dtype == DType::F64 { DType::F32 } else { dtype };
        // Norms of about 1 for rows of the transitions.
        let unit = (3.0 / d as f64).sqrt();
        let rows = |heads, size, name| random([batch, heads, n, d], name, size, dtype);
        let decay = |shape| {
            let mut x = random(shape, "log-decay", case.strength, sums);
            x.data.iter_mut().for_each(|x| *x = -x.abs());
            let cut = case.strength > 1.0 && case.decay != Decay::Head;
            x.data.get_mut(5 * d + 1).filter(|_| cut).into_iter().for_each(|x| *x = f64::NEG_INFINITY);
            x
        };
        let mask = |[_, _, b, t]: [usize; 4]| f64::from(u8::from((t + b) % 5 != 1 && t + 2 < n));
        let state = [batch, hs, d, e];
        Self {
            q: rows(hq, 1.0, "q"),
            k: rows(hk, unit, "k"),
            v: random([batch, hv, n, e], "v", 1.0, dtype),
            rank_one: match case.form {
                Form::Gated | Form::Bonus => RankOne::None,
                Form::Rule => {
                    let mut beta = random([1, batch, hs, n], "beta", case.most, sums);
                    beta.data.iter_mut().for_each(|x| *x = x.abs());
                    RankOne::Rule { beta }
                }
                Form::Free => {
                    // Transitions shrink what b reads, and turn it a little.
                    let (mut a, b) = (rows(hk, 0.2 * unit, "a"), rows(hk, unit, "b"));
                    a.data.iter_mut().zip(&b.data).for_each(|(a, b)| *a = round(dtype, *a - 0.5 * b));
                    RankOne::Free { a, b }
                }
            },
            log_decay: match case.decay {
                Decay::None => None,
                Decay::Head => Some(decay([1, 1, 1, hs])),
                Decay::Token => Some(decay([1, batch, hs, n])),
                Decay::Channel => Some(decay([batch, hs, n, d])),
            },
            bonus: (case.form == Form::Bonus).then(|| random([1, 1, hs, d], "bonus", 1.0, sums)),
            key_mask: case.masked.then(|| Array::from_fn([1, 1, batch, n], mask)),
            state: case.state.then(|| random(state, "state", 1.0, sums)),
            d_out: random([batch, h, n, e], "d_out", 1.0, dtype),
            d_state: case.state.then(|| random(state, "d_state", 1.0, sums)),
        }
    }
}

/// What the reference says.
pub fn expected(case: &Case, data: &Data) -> Results {
    let options = case.options(data.log_decay.clone(), data.bonus.clone(), data.key_mask.clone());
    let (operands, rank_one) = ([&data.q, &data.k, &data.v], data.rank_one.as_ref());
    let (state, d_state) = (data.state.as_ref(), data.d_state.as_ref());
    let (out, last) = reference::delta_attention(operands, rank_one, &options, state);
    let gradients = reference::delta_attention_backward(operands, rank_one, &options, state, &data.d_out, d_state);
    let mut results = Results::default();
    results.push("out", out);
    results.push("state", last);
    results.push("d_q", gradients.q);
    results.push("d_k", gradients.k);
    results.push("d_v", gradients.v);
    push_rank_one(&mut results, gradients.rank_one);
    results.push("d_log_decay", gradients.log_decay.filter(|_| case.decay.has_gradient()));
    results.push("d_bonus", gradients.bonus);
    results.push("d_state", Some(gradients.state).filter(|_| case.state));
    results
}

pub fn push_rank_one(results: &mut Results, gradients: RankOne<Array>) {
    match gradients {
        RankOne::None => {}
        RankOne::Rule { beta } => results.push("d_beta", beta),
        RankOne::Free { a, b } => {
            results.push("d_a", a);
            results.push("d_b", b);
        }
    }
}

const LENGTHS: [usize; 10] = [0, 1, 15, 16, 17, 63, 64, 65, 200, 1000];

/// Widths of keys and values for a length: wide ones where it is short.
fn widths(tokens: usize, turn: usize) -> [usize; 2] {
    let wide = [[16, 256], [256, 16], [128, 128], [33, 5], [64, 64]];
    let middle = [[64, 64], [33, 70], [7, 9], [16, 40]];
    let narrow = [[16, 16], [16, 33], [5, 16], [24, 8]];
    match tokens {
        0..=17 => wide[turn % wide.len()],
        18..=99 => middle[turn % middle.len()],
        _ => narrow[turn % narrow.len()],
    }
}

/// Forty and more of each form: every length with every decay (or, with one per channel alone, four strengths of it), weak to
/// cutting, β up to 1 and 2.
pub fn cases() -> Vec<Case> {
    let heads = [[1, 1, 1], [2, 2, 4], [4, 2, 2], [1, 2, 2], [2, 2, 2]];
    let mut cases = Vec::new();
    for form in Form::ALL {
        for turn in 0..4 {
            let decay = if form == Form::Gated { Decay::Channel } else { Decay::ALL[turn] };
            for (index, tokens) in LENGTHS.into_iter().enumerate() {
                let place = cases.len();
                cases.push(Case {
                    form,
                    decay,
                    strength: [0.05, 30.0, 1.0, 0.0, 1e9][(place + turn) % 5],
                    most: [1.0, 2.0][place % 2],
                    batch: if tokens > 100 { 1 } else { 2 },
                    heads: heads[(index + turn) % heads.len()],
                    tokens,
                    widths: widths(tokens, index + turn),
                    normalize: (place % 2 == 1).then_some(1e-6),
                    masked: place % 3 == 1,
                    state: place % 4 != 1,
                });
            }
        }
    }
    cases
}

/// Those of the cases that are tested: a seventh, or all.
pub fn chosen() -> Vec<Case> {
    let is_chosen = |place: usize| extent::is_all() || place % 7 == 3;
    cases().into_iter().enumerate().filter(|(place, _)| is_chosen(*place)).map(|(_, case)| case).collect()
}
