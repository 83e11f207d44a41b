//! The recurrence in f32, token by token, and its adjoint: the implementation whose error sets the bound.

use attn_kernels::problem::RankOne;
use attn_kernels::reference::Array;

use super::case::{Case, Data, push_rank_one};
use crate::common::plain::rounding;
use crate::common::plain::rows::{Round, Rows, add_scaled, dot};
use crate::common::reference::Results;

/// All results, by the roundings of a sample.
pub fn run(case: &Case, data: &Data, sample: usize) -> Results {
    Plain::new(case, data, rounding::<0>(sample)).run()
}

struct Plain<'a> {
    case: &'a Case,
    data: &'a Data,
    round: Round,
    scale: f32,
    q: Rows,
    k: Rows,
    v: Rows,
    rank_one: RankOne<Rows>,
    bonus: Option<Rows>,
}

/// Of one token of a state head.
struct Token<'a> {
    k: Vec<f32>,
    v: &'a [f32],
    decay: Vec<f32>,
    kept: bool,
}

struct Gradients {
    q: Rows,
    k: Rows,
    v: Rows,
    rank_one: RankOne<Rows>,
    log_decay: Option<Rows>,
    bonus: Option<Rows>,
}

impl<'a> Plain<'a> {
    fn new(case: &'a Case, data: &'a Data, round: Round) -> Self {
        Self {
            case,
            data,
            round,
            scale: round(1.0 / (case.widths[0] as f32).sqrt()),
            q: Rows::new(&data.q),
            k: Rows::new(&data.k),
            v: Rows::new(&data.v),
            rank_one: data.rank_one.as_ref().map(Rows::new),
            bonus: data.bonus.as_ref().map(Rows::new),
        }
    }

    fn run(&self) -> Results {
        let (case, data) = (self.case, self.data);
        let ([d, e], heads) = (case.widths, case.state_heads());
        let zeros = |x: &Array| Rows::zeros(x.shape);
        let mut gradients = Gradients {
            q: zeros(&data.q),
            k: zeros(&data.k),
            v: zeros(&data.v),
            rank_one: data.rank_one.as_ref().map(zeros),
            log_decay: data.log_decay.as_ref().map(zeros),
            bonus: data.bonus.as_ref().map(zeros),
        };
        let mut out = zeros(&data.d_out);
        let [mut last, mut d_state] = [&data.state, &data.d_state]
            .map(|x| x.as_ref().map_or(Array::zeros([case.batch, heads, d, e]), Clone::clone));
        for index in 0..case.batch * heads {
            let (b, head) = (index / heads, index % heads);
            let at = index * d * e..(index + 1) * d * e;
            let narrow = |x: &Array| x.data[at.clone()].iter().map(|&x| x as f32).collect::<Vec<f32>>();
            let states = self.forward(b, head, narrow(&last), &mut out);
            let d_first = self.backward(b, head, &states, narrow(&d_state), &mut gradients);
            let put = |into: &mut Array, from: &[f32]| {
                into.data[at.clone()].iter_mut().zip(from).for_each(|(to, &x)| *to = x.into());
            };
            put(&mut last, &states[case.tokens]);
            put(&mut d_state, &d_first);
        }
        let mut results = Results::default();
        results.push("out", out.array());
        results.push("state", last);
        results.push("d_q", gradients.q.array());
        results.push("d_k", gradients.k.array());
        results.push("d_v", gradients.v.array());
        push_rank_one(&mut results, gradients.rank_one.map(|rows| rows.array()));
        results.push("d_log_decay", gradients.log_decay.filter(|_| case.decay.has_gradient()).map(|x| x.array()));
        results.push("d_bonus", gradients.bonus.map(|x| x.array()));
        results.push("d_state", Some(d_state).filter(|_| case.state));
        results
    }

    fn rounded(&self, mut x: Vec<f32>) -> Vec<f32> {
        x.iter_mut().for_each(|x| *x = (self.round)(*x));
        x
    }

    /// The row of one of `all` heads.
    fn row<'r>(&self, rows: &'r Rows, [b, head, all, t]: [usize; 4]) -> &'r [f32] {
        rows.row([b, head * rows.shape[1] / all, t])
    }

    /// √(Σ x² + ε), or 1.
    fn norm(&self, x: &[f32]) -> f32 {
        self.case.normalize.map_or(1.0, |epsilon| (self.round)((dot(x, x) + epsilon as f32).sqrt()))
    }

    fn unit(&self, x: &[f32]) -> Vec<f32> {
        let norm = self.norm(x);
        self.rounded(x.iter().map(|x| x / norm).collect())
    }

    /// The gradient of a row from that of the row divided by its norm.
    fn of_row(&self, x: &[f32], d_x: &[f32]) -> Vec<f32> {
        let norm = self.norm(x);
        let along = if self.case.normalize.is_some() { (self.round)(dot(x, d_x) / (norm * norm * norm)) } else { 0.0 };
        self.rounded(x.iter().zip(d_x).map(|(x, d_x)| d_x / norm - along * x).collect())
    }

    fn decay(&self, b: usize, head: usize, t: usize) -> Vec<f32> {
        let of = |channel: usize| {
            let g = self.data.log_decay.as_ref()?;
            Some((self.round)((g.data[self.decay_index(b, head, t, channel)] as f32).exp()))
        };
        (0..self.case.widths[0]).map(|channel| of(channel).unwrap_or(1.0)).collect()
    }

    fn decay_index(&self, b: usize, head: usize, t: usize, channel: usize) -> usize {
        let (heads, tokens) = (self.case.state_heads(), self.case.tokens);
        match self.case.decay.rank() {
            1 => head,
            3 => (b * heads + head) * tokens + t,
            _ => ((b * heads + head) * tokens + t) * self.case.widths[0] + channel,
        }
    }

    fn token(&self, b: usize, head: usize, t: usize) -> Token<'_> {
        let at = [b, head, self.case.state_heads(), t];
        Token {
            k: self.unit(self.row(&self.k, at)),
            v: self.row(&self.v, at),
            decay: self.decay(b, head, t),
            kept: self.data.key_mask.as_ref().is_none_or(|mask| mask.row(0, 0, b)[t] != 0.0),
        }
    }

    fn queries(&self, b: usize, head: usize, t: usize) -> impl Iterator<Item = (usize, Vec<f32>)> + '_ {
        let (all, group) = (self.case.output_heads(), self.case.output_heads() / self.case.state_heads());
        (head * group..(head + 1) * group).map(move |h| {
            let q = self.unit(self.row(&self.q, [b, h, all, t]));
            (h, self.rounded(q.iter().map(|q| self.scale * q).collect()))
        })
    }

    /// Sᵀ x
    fn read(&self, s: &[f32], x: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0; self.case.widths[1]];
        x.iter().zip(s.chunks_exact(self.case.widths[1])).for_each(|(&x, s)| add_scaled(&mut sums, x, s));
        self.rounded(sums)
    }

    /// S y
    fn along(&self, s: &[f32], y: &[f32]) -> Vec<f32> {
        self.rounded(s.chunks_exact(self.case.widths[1]).map(|s| dot(s, y)).collect())
    }

    fn faded(&self, s: &[f32], decay: &[f32]) -> Vec<f32> {
        let rows = s.chunks_exact(self.case.widths[1]).zip(decay);
        self.rounded(rows.flat_map(|(s, decay)| s.iter().map(move |s| decay * s)).collect())
    }

    /// S ← S + x yᵀ
    fn add_outer(&self, s: &mut [f32], x: &[f32], y: &[f32]) {
        for (&x, s) in x.iter().zip(s.chunks_exact_mut(self.case.widths[1])) {
            s.iter_mut().zip(y).for_each(|(s, y)| *s = (self.round)(*s + x * y));
        }
    }

    /// bonus ⊙ k of a kept token.
    fn weighed_key(&self, head: usize, token: &Token<'_>) -> Option<Vec<f32>> {
        let bonus = self.bonus.as_ref().filter(|_| token.kept)?.row([0, 0, head]);
        Some(self.rounded(bonus.iter().zip(&token.k).map(|(u, k)| u * k).collect()))
    }

    /// The state before the first token and after each.
    fn forward(&self, b: usize, head: usize, first: Vec<f32>, out: &mut Rows) -> Vec<Vec<f32>> {
        let mut states = vec![first];
        for t in 0..self.case.tokens {
            let (before, token) = (&states[t], self.token(b, head, t));
            let (k, v) = (&token.k, token.v);
            let at = [b, head, self.case.state_heads(), t];
            let mut s = if token.kept { self.faded(before, &token.decay) } else { before.clone() };
            match &self.rank_one {
                _ if !token.kept => {}
                RankOne::None => self.add_outer(&mut s, k, v),
                RankOne::Rule { beta } => {
                    let beta = beta.row([0, b, head])[t];
                    let held = self.read(&s, k);
                    let change = self.rounded(v.iter().zip(held).map(|(v, held)| beta * (v - held)).collect());
                    self.add_outer(&mut s, k, &change);
                }
                RankOne::Free { a, b: reading } => {
                    let held = self.read(before, self.row(reading, at));
                    self.add_outer(&mut s, self.row(a, at), &held);
                    self.add_outer(&mut s, k, v);
                }
            }
            for (h, q) in self.queries(b, head, t) {
                let mut read = self.read(if self.bonus.is_some() { before } else { &s }, &q);
                if let Some(key) = self.weighed_key(head, &token) {
                    add_scaled(&mut read, (self.round)(dot(&q, &key)), v);
                }
                out.row_mut([b, h, t]).copy_from_slice(&self.rounded(read));
            }
            states.push(s);
        }
        states
    }

    /// The gradient of the first state.
    fn backward(&self, b: usize, head: usize, states: &[Vec<f32>], mut r: Vec<f32>, to: &mut Gradients) -> Vec<f32> {
        let heads = self.case.state_heads();
        let d_out = Rows::new(&self.data.d_out);
        for t in (0..self.case.tokens).rev() {
            let (token, before) = (self.token(b, head, t), &states[t]);
            let (k, v, at) = (&token.k, token.v, [b, head, heads, t]);
            let read = if self.bonus.is_some() { before } else { &states[t + 1] };
            let [mut own_k, mut own_v] = self.case.widths.map(|width| vec![0.0; width]);
            let mut behind = if self.bonus.is_some() { vec![0.0; r.len()] } else { std::mem::take(&mut r) };
            for (h, q) in self.queries(b, head, t) {
                let d_out = d_out.row([b, h, t]);
                self.add_outer(&mut behind, &q, d_out);
                let mut d_q = self.along(read, d_out);
                if let (Some(key), Some(d_bonus), Some(bonus)) =
                    (self.weighed_key(head, &token), &mut to.bonus, &self.bonus)
                {
                    let weight = (self.round)(dot(d_out, v));
                    add_scaled(&mut d_q, weight, &key);
                    add_scaled(&mut own_v, (self.round)(dot(&q, &key)), d_out);
                    let of_q = self.rounded(q.iter().map(|q| weight * q).collect());
                    for (channel, of_q) in of_q.into_iter().enumerate() {
                        own_k[channel] += of_q * bonus.row([0, 0, head])[channel];
                        d_bonus.row_mut([0, 0, head])[channel] += of_q * k[channel];
                    }
                }
                let d_q = self.rounded(d_q.iter().map(|x| self.scale * x).collect());
                let own = h * self.q.shape[1] / self.case.output_heads();
                add_scaled(to.q.row_mut([b, own, t]), 1.0, &self.of_row(self.q.row([b, own, t]), &d_q));
            }
            let from_read = if self.bonus.is_some() {
                Some(behind)
            } else {
                r = behind;
                None
            };
            if token.kept {
                let (mut d_k, mut d_v) = (self.along(&r, v), self.read(&r, k));
                let mut from_reading = None;
                match (&self.rank_one, &mut to.rank_one) {
                    (RankOne::Rule { beta }, RankOne::Rule { beta: d_beta }) => {
                        let beta = beta.row([0, b, head])[t];
                        let faded = self.faded(before, &token.decay);
                        let held = self.read(&faded, k);
                        let change = self.rounded(v.iter().zip(held).map(|(v, held)| v - held).collect());
                        let along = self.along(&r, &change);
                        d_beta.row_mut([0, b, head])[t] = (self.round)(dot(k, &along));
                        d_v = self.rounded(d_v.iter().map(|x| beta * x).collect());
                        let back = self.along(&faded, &d_v);
                        d_k = self.rounded(along.iter().zip(back).map(|(along, back)| beta * along - back).collect());
                        let minus: Vec<f32> = k.iter().map(|k| -k).collect();
                        self.add_outer(&mut r, &minus, &d_v);
                    }
                    (RankOne::Free { a, b: reading }, RankOne::Free { a: d_a, b: d_b }) => {
                        let (a, reading) = (self.row(a, at), self.row(reading, at));
                        let own = [b, head * d_a.shape[1] / heads, t];
                        add_scaled(d_a.row_mut(own), 1.0, &self.along(&r, &self.read(before, reading)));
                        let d_held = self.read(&r, a);
                        add_scaled(d_b.row_mut(own), 1.0, &self.along(before, &d_held));
                        from_reading = Some((reading, d_held));
                    }
                    _ => {}
                }
                if let Some(d_log_decay) = &mut to.log_decay {
                    let e = self.case.widths[1];
                    for (channel, (s, r)) in before.chunks_exact(e).zip(r.chunks_exact(e)).enumerate() {
                        let change = (self.round)(token.decay[channel] * dot(s, r));
                        d_log_decay.add(self.decay_index(b, head, t, channel), change);
                    }
                }
                add_scaled(&mut d_k, 1.0, &own_k);
                add_scaled(&mut d_v, 1.0, &own_v);
                let [own_key, own_value] = [&self.k, &self.v].map(|rows| [b, head * rows.shape[1] / heads, t]);
                add_scaled(to.k.row_mut(own_key), 1.0, &self.of_row(self.k.row(own_key), &d_k));
                add_scaled(to.v.row_mut(own_value), 1.0, &d_v);
                r = self.faded(&r, &token.decay);
                if let Some((reading, d_held)) = from_reading {
                    self.add_outer(&mut r, reading, &d_held);
                }
            }
            if let Some(from_read) = from_read {
                r = self.rounded(r.iter().zip(from_read).map(|(r, x)| r + x).collect());
            }
        }
        r
    }
}
