//! Weights of the visible pairs and their derivatives, row by row in f32.

use attn_kernels::gau::{GlobalNorm, MixedChunkOptions};
use attn_kernels::problem::{Dropout, Mask};
use attn_kernels::reference::Array;

use super::super::cases::Extra;
use super::rows::{Round, Rows};

/// How a score becomes a weight.
#[derive(Clone, Copy, PartialEq)]
pub enum Rule {
    Softmax,
    Relu,
    ReluSquared,
}

/// The pairs of the linear family.
#[derive(Clone, Copy)]
pub enum Window {
    Full,
    Exclusive { chunk: usize },
}

/// What softmax has besides.
#[derive(Default)]
pub struct Beside {
    /// `[B, H, N, M]`, each of them or 1.
    pub attention_bias: Option<Rows>,
    /// `[1, 1, 1, H]`
    pub sinks: Option<Rows>,
    pub dropout: Option<Dropout>,
}

impl Beside {
    /// The attention bias of a pair.
    fn of(&self, at: Place, j: usize) -> f32 {
        self.attention_bias.as_ref().map_or(0.0, |term| term.row(row_of(term, [at.b, at.h, at.i]))[column_of(term, j)])
    }
}

/// The row and the column of an array that may have 1 for any size.
pub fn row_of(x: &Rows, at: [usize; 3]) -> [usize; 3] {
    std::array::from_fn(|axis| if x.shape[axis] == 1 { 0 } else { at[axis] })
}

pub fn column_of(x: &Rows, j: usize) -> usize {
    if x.shape[3] == 1 { 0 } else { j }
}

pub enum Weights {
    /// rule(cap(scale·x) + bias), x divided by the number of keys that the key mask leaves if `per_key`
    Scores { mask: Mask, scale: f32, per_key: bool, cap: Option<f32>, bias: Option<Rows>, beside: Beside, rule: Rule },
    /// x times the decay between key and query; `[1, B, Hs, M]`, 0 at masked keys.
    Decayed { causal: bool, log_decay: Option<Rows> },
    /// x·norm
    Chunks { window: Window, norm: GlobalNorm, chunk: usize },
}

/// Where a row of weights stands.
#[derive(Clone, Copy)]
pub struct Place {
    pub b: usize,
    pub h: usize,
    /// Heads of the output.
    pub heads: usize,
    pub i: usize,
    /// Position of the query among the keys.
    pub position: i64,
    pub keys: usize,
    /// Keys that the key mask leaves, at least 1.
    pub kept: usize,
}

/// The weights of one query: `weights[a]` is that of key `keys[a]`, `slopes[a]` its derivative by the score (for
/// softmax, where the mean of the gradient has been taken off already), `inner[a]` that of the score by x.
pub struct Row {
    pub keys: Vec<usize>,
    pub weights: Vec<f32>,
    /// The weights as the backward pass has them: softmax from the saved log-sum-exp.
    pub recomputed: Vec<f32>,
    pub slopes: Vec<f32>,
    pub inner: Vec<f32>,
    pub log_sum_exp: f32,
    /// The weight of the sink.
    pub sink: f32,
    /// What dropout multiplies weights by.
    pub factors: Vec<f32>,
}

impl Row {
    /// Weights that are the scores.
    fn new(keys: Vec<usize>, weights: Vec<f32>, slopes: Vec<f32>) -> Self {
        let (ones, recomputed) = (vec![1.0; keys.len()], weights.clone());
        Self { recomputed, inner: ones.clone(), keys, weights, slopes, log_sum_exp: 0.0, sink: 0.0, factors: ones }
    }
}

impl Weights {
    pub fn linear(causal: bool, log_decay: Option<&Array>, key_mask: Option<&Array>) -> Self {
        let log_decay = log_decay.map(|log_decay| {
            let mut rows = Rows::new(log_decay);
            for [_, b, h] in rows.indices() {
                if let Some(mask) = key_mask {
                    let removed = |(g, kept): (&mut f32, &f64)| *g = if *kept == 0.0 { 0.0 } else { *g };
                    rows.row_mut([0, b, h]).iter_mut().zip(mask.row(0, 0, b)).for_each(removed);
                }
            }
            rows
        });
        Self::Decayed { causal, log_decay }
    }

    /// The local and the global branch.
    pub fn mixed_chunk(options: &MixedChunkOptions<Extra>, bias: Option<&Array>) -> [Self; 2] {
        let chunk = options.chunk_size;
        let scale = options.scale.map_or(1.0 / chunk as f32, |scale| scale as f32);
        let mask = Mask::Blocks { size: chunk, causal: options.causal };
        let window = if options.causal { Window::Exclusive { chunk } } else { Window::Full };
        [
            Self::Scores {
                mask,
                scale,
                per_key: false,
                cap: None,
                bias: bias.map(Rows::new),
                beside: Beside::default(),
                rule: Rule::ReluSquared,
            },
            Self::Chunks { window, norm: options.global_norm, chunk },
        ]
    }

    /// Whether a query of the linear family reads what came up to it.
    pub fn is_causal(&self) -> bool {
        matches!(self, Self::Decayed { causal: true, .. })
    }

    /// g of a state head at key `t`, or 0.
    pub fn log_decay(&self, b: usize, state_head: usize, t: usize) -> f32 {
        match self {
            Self::Decayed { log_decay: Some(log_decay), .. } => log_decay.row([0, b, state_head])[t],
            _ => 0.0,
        }
    }

    /// Keys that the query sees, key mask aside.
    pub fn visible(&self, at: Place) -> impl Iterator<Item = usize> {
        let (range, mask) = match self {
            Self::Scores { mask, .. } => (0..at.keys, *mask),
            _ => (self.range(at), Mask::Full),
        };
        range.filter(move |&j| mask.sees(at.position, j))
    }

    fn range(&self, at: Place) -> std::ops::Range<usize> {
        match self {
            Self::Decayed { causal: true, .. } => Mask::Causal.visible(at.position, at.keys),
            Self::Chunks { window: Window::Exclusive { chunk }, .. } => 0..at.i / chunk * chunk,
            _ => 0..at.keys,
        }
    }

    /// Turns x = ⟨φ(q), φ(k_j)⟩ for `keys` into weights. `exponents` of the keys, less the largest, are those of
    /// FAVOR+ features.
    pub fn row(&self, at: Place, keys: Vec<usize>, x: &[f32], exponents: &[f32], round: Round) -> Row {
        match self {
            Self::Scores { scale, per_key, cap, bias, beside, rule, .. } => {
                let scale = if *per_key { *scale / at.kept as f32 } else { *scale };
                let bias = bias.as_ref().map(|bias| {
                    let row = bias.row([0, 0, if bias.shape[2] == 1 { 0 } else { at.h }]);
                    (row, row.len() as i64 / 2 - at.position)
                });
                let terms: Vec<f32> = keys.iter().map(|&j| beside.of(at, j)).collect();
                let sink = beside.sinks.as_ref().map_or(f32::NEG_INFINITY, |sinks| sinks.row([0; 3])[at.h]);
                let factor = |dropout: Dropout, j| dropout.factor([at.b, at.h, at.i, j]) as f32;
                let factors = keys.iter().map(|&j| beside.dropout.map_or(1.0, |dropout| factor(dropout, j))).collect();
                Row { factors, ..score_row(keys, x, scale, *cap, bias, (&terms, sink), *rule, round) }
            }
            Self::Decayed { log_decay, .. } => {
                let max = exponents.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut factors: Vec<f32> = exponents.iter().map(|e| round((e - max).exp())).collect();
                if let Some(log_decay) = log_decay {
                    let sums = decay_sums(log_decay, at);
                    keys.iter()
                        .zip(&mut factors)
                        .for_each(|(&j, factor)| *factor = round(*factor * round(sums[j].exp())));
                }
                let weights: Vec<f32> = x.iter().zip(&factors).map(|(x, factor)| round(x * factor)).collect();
                Row::new(keys, weights, factors)
            }
            Self::Chunks { window, norm, chunk } => {
                let count = match (norm, window) {
                    (GlobalNorm::Mean, Window::Exclusive { chunk }) => at.i / chunk * chunk,
                    (GlobalNorm::Chunk, _) => *chunk,
                    _ => at.kept,
                };
                let norm = 1.0 / count.max(1) as f32;
                let slopes = vec![norm; keys.len()];
                Row::new(keys, x.iter().map(|x| round(x * norm)).collect(), slopes)
            }
        }
    }
}

/// Σ_{j < t ≤ position} g_t for every key j.
fn decay_sums(log_decay: &Rows, at: Place) -> Vec<f32> {
    let decay = log_decay.row([0, at.b, at.h * log_decay.shape[2] / at.heads]);
    let mut sums = vec![0.0; at.keys];
    let seen = (at.position + 1).clamp(0, at.keys as i64) as usize;
    for j in (0..seen.saturating_sub(1)).rev() {
        sums[j] = sums[j + 1] + decay[j + 1];
    }
    sums
}

#[allow(clippy::too_many_arguments)]
fn score_row(
    keys: Vec<usize>,
    x: &[f32],
    scale: f32,
    cap: Option<f32>,
    bias: Option<(&[f32], i64)>,
    (terms, sink): (&[f32], f32),
    rule: Rule,
    round: Round,
) -> Row {
    let mut inner = vec![scale; keys.len()];
    let mut scores: Vec<f32> = x.iter().map(|x| round(scale * x)).collect();
    if let Some(cap) = cap {
        for (score, inner) in scores.iter_mut().zip(&mut inner) {
            let tanh = (*score / cap).tanh();
            *inner *= 1.0 - tanh * tanh;
            *score = round(cap * tanh);
        }
    }
    if let Some((bias, shift)) = bias {
        keys.iter().zip(&mut scores).for_each(|(&j, s)| *s = round(*s + bias[(j as i64 + shift) as usize]));
    }
    scores.iter_mut().zip(terms).filter(|(_, term)| **term != 0.0).for_each(|(s, term)| *s = round(*s + term));
    let mut log_sum_exp = f32::NEG_INFINITY;
    // Where nothing is seen, powers of −∞ are 0.
    let less = |x: f32, y: f32| if y == f32::NEG_INFINITY { x } else { x - y };
    let weights: Vec<f32> = match rule {
        Rule::Softmax => {
            let max = scores.iter().copied().fold(sink, f32::max);
            let powers: Vec<f32> = scores.iter().map(|s| less(*s, max).exp()).collect();
            let sum = powers.iter().sum::<f32>() + less(sink, max).exp();
            log_sum_exp = max + sum.ln();
            powers.iter().map(|power| if sum == 0.0 { 0.0 } else { round(power / sum) }).collect()
        }
        Rule::Relu => scores.iter().map(|s| s.max(0.0)).collect(),
        Rule::ReluSquared => scores.iter().map(|s| round(s.max(0.0) * s.max(0.0))).collect(),
    };
    let recomputed = match rule {
        Rule::Softmax => scores.iter().map(|s| round(less(*s, log_sum_exp).exp())).collect(),
        _ => weights.clone(),
    };
    let slopes = match rule {
        Rule::Softmax => recomputed.clone(),
        Rule::Relu => scores.iter().map(|&s| f32::from(s > 0.0)).collect(),
        Rule::ReluSquared => scores.iter().map(|s| 2.0 * s.max(0.0)).collect(),
    };
    let sink = round(less(sink, log_sum_exp).exp());
    Row { keys, weights, recomputed, slopes, inner, log_sum_exp, sink, factors: Vec::new() }
}
