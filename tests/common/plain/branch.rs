//! One engine's share of an operation, dense.

use attn_kernels::reference::{Array, State};
use attn_kernels::transnormer::NormScope;

use super::ends::{Ends, Sums as StateSums};
use super::features::Features;
use super::rows::{Round, Rows, add_scaled, dot};
use super::weights::{Place, Row, Weights, column_of, row_of};

/// What turns t = Σ w v and Σ w into an output row.
#[derive(Clone, Copy)]
pub enum Finish {
    /// Nothing; the weights are those of a softmax, whose backward takes the mean of the gradient off.
    Softmax,
    None,
    /// Divided by this and by the number of keys that the key mask leaves.
    PerKey(f32),
    /// Divided by Σ w + ε.
    Sum(f32),
    Rms(f32, NormScope),
}

pub struct Branch<'a> {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub key_mask: Option<&'a Array>,
    pub features: Features,
    pub weights: Weights,
    pub finish: Finish,
    pub round: Round,
    pub ends: Option<Ends>,
}

/// φ of all rows.
pub struct Mapped {
    pub q: Rows,
    pub k: Rows,
    pub exponents: Rows,
}

pub struct Gradients {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub bias: Option<Rows>,
    pub attention_bias: Option<Rows>,
    pub sinks: Option<Rows>,
    /// Per token, `[1, B, Hs, M]`.
    pub log_decay: Option<Rows>,
    /// Of the first state, where the last has one.
    pub state: Option<StateSums>,
}

/// The gradient by φ on the way.
pub struct Sweep {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    bias: Option<Rows>,
    attention_bias: Option<Rows>,
    sinks: Option<Rows>,
    /// `[1, B, Hs, M]`
    pub decay: Option<Rows>,
}

/// Sums of the rows: t, Σ w and, for softmax, the log-sum-exp.
struct Sums {
    t: Rows,
    weight: Rows,
    log_sum_exp: Rows,
}

impl Branch<'_> {
    pub fn heads(&self) -> usize {
        self.q.shape[1].max(self.v.shape[1])
    }

    pub fn keeps(&self, b: usize, j: usize) -> bool {
        self.key_mask.is_none_or(|mask| mask.row(0, 0, b)[j] != 0.0)
    }

    /// Keys that the key mask leaves in a batch entry, at least 1.
    fn kept(&self, b: usize) -> usize {
        (0..self.k.shape[2]).filter(|&j| self.keeps(b, j)).count().max(1)
    }

    /// Row `j` of the head of `x` that output head `h` reads.
    fn at(&self, x: &Rows, b: usize, h: usize, j: usize) -> [usize; 3] {
        [b, h * x.shape[1] / self.heads(), j]
    }

    /// Output, log-sum-exp and gradients.
    pub fn run(&self, d_out: &Rows, d_lse: Option<&Rows>) -> (Rows, Rows, Gradients) {
        let mapped = self.map();
        let sums = self.sums(&mapped);
        let divisors = self.divisors(&sums);
        let mut out = sums.t;
        for at in out.indices() {
            let divisor = divisors.row(at)[0];
            let inverse = |x: f32| if divisor == 0.0 { 0.0 } else { x / divisor };
            out.row_mut(at).iter_mut().for_each(|x| *x = (self.round)(inverse(*x)));
        }
        let gradients = self.backward(&mapped, &out, &divisors, d_out, d_lse);
        (out, sums.log_sum_exp, gradients)
    }

    fn map(&self) -> Mapped {
        let mut mapped = Mapped { q: self.phi(&self.q), k: self.phi(&self.k), exponents: Rows::zeros([0; 4]) };
        let [batch, heads, keys, _] = self.k.shape;
        mapped.exponents = Rows::zeros([batch, heads, keys, 1]);
        for at in self.q.indices() {
            mapped.q.row_mut(at).copy_from_slice(&self.features.apply(self.q.row(at), self.round).0);
        }
        for at in self.k.indices().filter(|&[b, _, j]| self.keeps(b, j)) {
            let (phi, exponent) = self.features.apply(self.k.row(at), self.round);
            mapped.k.row_mut(at).copy_from_slice(&phi);
            mapped.exponents.row_mut(at)[0] = exponent;
        }
        mapped
    }

    fn phi(&self, x: &Rows) -> Rows {
        let [batch, heads, rows, width] = x.shape;
        let width = self.features.apply(&vec![0.0; width], self.round).0.len();
        Rows::zeros([batch, heads, rows, width])
    }

    fn row(&self, mapped: &Mapped, [b, h, i]: [usize; 3]) -> (Place, Row) {
        let keys = self.k.shape[2];
        let position = i as i64 + keys as i64 - self.q.shape[2] as i64;
        let place = Place { b, h, heads: self.heads(), i, position, keys, kept: self.kept(b) };
        let visible: Vec<usize> = self.weights.visible(place).filter(|&j| self.keeps(b, j)).collect();
        let q = mapped.q.row(self.at(&mapped.q, b, h, i));
        let product = |&j: &usize| (self.round)(dot(q, mapped.k.row(self.at(&mapped.k, b, h, j))));
        let x: Vec<f32> = visible.iter().map(product).collect();
        let exponents: Vec<f32> =
            visible.iter().map(|&j| mapped.exponents.row(self.at(&mapped.exponents, b, h, j))[0]).collect();
        (place, self.weights.row(place, visible, &x, &exponents, self.round))
    }

    fn sums(&self, mapped: &Mapped) -> Sums {
        let [batch, _, queries, _] = self.q.shape;
        let scalars = || Rows::zeros([batch, self.heads(), queries, 1]);
        let t = Rows::zeros([batch, self.heads(), queries, self.v.shape[3]]);
        let mut sums = Sums { t, weight: scalars(), log_sum_exp: scalars() };
        for [b, h, i] in sums.t.indices() {
            let (_, row) = self.row(mapped, [b, h, i]);
            let t = sums.t.row_mut([b, h, i]);
            for ((&j, &weight), &factor) in row.keys.iter().zip(&row.weights).zip(&row.factors) {
                add_scaled(t, weight * factor, self.v.row(self.at(&self.v, b, h, j)));
            }
            t.iter_mut().for_each(|t| *t = (self.round)(*t));
            sums.weight.row_mut([b, h, i])[0] = (self.round)(row.weights.iter().sum());
            sums.log_sum_exp.row_mut([b, h, i])[0] = (self.round)(row.log_sum_exp);
        }
        sums
    }

    fn divisors(&self, sums: &Sums) -> Rows {
        let mut divisors = Rows::zeros(sums.weight.shape);
        let heads = self.heads();
        for [b, h, i] in divisors.indices() {
            divisors.row_mut([b, h, i])[0] = (self.round)(match self.finish {
                Finish::Softmax | Finish::None => 1.0,
                Finish::PerKey(divisor) => divisor * self.kept(b) as f32,
                Finish::Sum(epsilon) => sums.weight.row([b, h, i])[0] + epsilon,
                Finish::Rms(epsilon, scope) => {
                    let members = if scope == NormScope::Head { h..h + 1 } else { 0..heads };
                    let count = (members.len() * sums.t.shape[3]) as f32;
                    // Of numbers by the largest: squares of others may leave the range of f32.
                    let row = |h: usize| sums.t.row([b, h, i]).iter();
                    let largest = members.clone().flat_map(row).fold(0f32, |largest, t| largest.max(t.abs()));
                    let unit = if largest > 0.0 { largest } else { 1.0 };
                    let square = |h: usize| row(h).map(|t| (t / unit).powi(2)).sum::<f32>();
                    let mean = members.map(square).sum::<f32>() / count;
                    (f64::from(mean) * f64::from(unit).powi(2) + f64::from(epsilon)).sqrt() as f32
                }
            });
        }
        divisors
    }

    /// Whether rows of weights are divided by their sum before they meet the values, so that a mean of their gradient is
    /// taken off it.
    fn takes_mean(&self) -> bool {
        let are_scores = matches!(self.weights, Weights::Scores { .. });
        are_scores && matches!(self.finish, Finish::Softmax | Finish::Sum(_))
    }

    /// dt, and what is added to every dw of the row, but for that mean.
    fn unfinish(&self, out: &Rows, divisors: &Rows, d_out: &Rows, d_lse: Option<&Rows>) -> (Rows, Rows) {
        let (mut d_t, mut d_sum) = (d_out.clone(), Rows::zeros(divisors.shape));
        let product = |at: [usize; 3]| dot(d_out.row(at), out.row(at));
        for [b, h, i] in d_out.indices() {
            let at = [b, h, i];
            let divisor = divisors.row(at)[0];
            let inverse = if divisor == 0.0 { 0.0 } else { 1.0 / divisor };
            let row = d_t.row_mut(at);
            match self.finish {
                Finish::Softmax => {
                    d_sum.row_mut(at)[0] = d_lse.map_or(0.0, |d| d.row(at)[0]);
                    continue;
                }
                Finish::None => continue,
                Finish::Sum(_) if self.takes_mean() => {}
                Finish::Sum(_) => d_sum.row_mut(at)[0] = (self.round)(-product(at) * inverse),
                Finish::PerKey(_) => {}
                Finish::Rms(_, scope) => {
                    let members = if scope == NormScope::Head { h..h + 1 } else { 0..self.heads() };
                    let count = (members.len() * out.shape[3]) as f32;
                    let mean = members.map(|h| product([b, h, i])).sum::<f32>() / count;
                    row.iter_mut().zip(out.row(at)).for_each(|(d, o)| *d -= o * mean);
                }
            }
            row.iter_mut().for_each(|d| *d = (self.round)(*d * inverse));
        }
        (d_t, d_sum)
    }

    fn backward(&self, mapped: &Mapped, out: &Rows, divisors: &Rows, d_out: &Rows, d_lse: Option<&Rows>) -> Gradients {
        let (d_t, d_sum) = self.unfinish(out, divisors, d_out, d_lse);
        let zeros = |x: &Rows| Rows::zeros(x.shape);
        let (bias, decay) = match &self.weights {
            Weights::Scores { bias, .. } => (bias.as_ref().map(zeros), None),
            Weights::Decayed { log_decay, .. } => (None, log_decay.as_ref().map(zeros)),
            _ => (None, None),
        };
        let [attention_bias, sinks] = match &self.weights {
            Weights::Scores { beside, .. } => [&beside.attention_bias, &beside.sinks].map(|x| x.as_ref().map(zeros)),
            _ => [None, None],
        };
        let (q, k, v) = (zeros(&mapped.q), zeros(&mapped.k), zeros(&self.v));
        let mut d = Sweep { q, k, v, bias, attention_bias, sinks, decay };
        for at in d_out.indices() {
            let divisor = divisors.row(at)[0];
            self.row_backward(mapped, at, (d_t.row(at), d_sum.row(at)[0], divisor), &mut d);
        }
        let state = self.ends.as_ref().map(|ends| self.end_backward(mapped, ends, (&d_t, &d_sum), &mut d));
        let keeps = |b, j| self.keeps(b, j);
        Gradients {
            q: self.map_backward(&self.q, &mapped.q, d.q, |_, _| true),
            k: self.map_backward(&self.k, &mapped.k, d.k, keeps),
            v: d.v.round(self.round),
            bias: d.bias.map(|bias| bias.round(self.round)),
            attention_bias: d.attention_bias.map(|term| term.round(self.round)),
            sinks: d.sinks.map(|sinks| sinks.round(self.round)),
            log_decay: d.decay,
            state,
        }
    }

    fn row_backward(
        &self,
        mapped: &Mapped,
        [b, h, i]: [usize; 3],
        (d_t, d_sum, divisor): (&[f32], f32, f32),
        d: &mut Sweep,
    ) {
        let (place, row) = self.row(mapped, [b, h, i]);
        let inside = if self.takes_mean() { 0.0 } else { d_sum };
        let d_weight = |&j: &usize| (self.round)(dot(d_t, self.v.row(self.at(&self.v, b, h, j))) + inside);
        let mut d_weights: Vec<f32> = row.keys.iter().map(d_weight).collect();
        d_weights.iter_mut().zip(&row.factors).for_each(|(d, factor)| *d *= factor);
        if self.takes_mean() && divisor != 0.0 {
            let mean: f32 = row.recomputed.iter().zip(&d_weights).map(|(weight, d)| weight / divisor * d).sum();
            d_weights.iter_mut().for_each(|d| *d += d_sum - mean);
            d.sinks.iter_mut().for_each(|sinks| sinks.row_mut([0; 3])[h] += row.sink * (d_sum - mean));
        }
        let d_scores: Vec<f32> = row.slopes.iter().zip(&d_weights).map(|(s, d)| (self.round)(s * d)).collect();
        for (a, &j) in row.keys.iter().enumerate() {
            let d_x = (self.round)(row.inner[a] * d_scores[a]);
            let (query, key) = (self.at(&mapped.q, b, h, i), self.at(&mapped.k, b, h, j));
            add_scaled(d.v.row_mut(self.at(&self.v, b, h, j)), row.recomputed[a] * row.factors[a], d_t);
            add_scaled(d.q.row_mut(query), d_x, mapped.k.row(key));
            add_scaled(d.k.row_mut(key), d_x, mapped.q.row(query));
        }
        if let Some(d_bias) = &mut d.bias {
            let d_bias = d_bias.row_mut([0, 0, if d_bias.shape[2] == 1 { 0 } else { h }]);
            let first = d_bias.len() as i64 / 2 - place.position;
            row.keys.iter().zip(&d_scores).for_each(|(&j, d)| d_bias[(first + j as i64) as usize] += d);
        }
        if let Some(term) = &mut d.attention_bias {
            for (&j, d) in row.keys.iter().zip(&d_scores) {
                let column = column_of(term, j);
                term.row_mut(row_of(term, [b, h, i]))[column] += d;
            }
        }
        if let Some(decay) = &mut d.decay {
            let products = row.weights.iter().zip(&d_weights).map(|(weight, d)| (self.round)(weight * d));
            self.decay_gradient(place, &row.keys, products, decay);
        }
    }

    /// dg_t += Σ_{j < t} dW_ij W_ij for the t up to the query, masked ones left out.
    fn decay_gradient(&self, at: Place, keys: &[usize], products: impl Iterator<Item = f32>, decay: &mut Rows) {
        let mut by_key = vec![0.0; at.keys];
        keys.iter().zip(products).for_each(|(&j, product)| by_key[j] = product);
        let state_heads = decay.shape[2];
        let row = decay.row_mut([0, at.b, at.h * state_heads / self.heads()]);
        let mut before = 0.0;
        for t in (1..at.keys).filter(|&t| t as i64 <= at.position) {
            before += by_key[t - 1];
            if self.keeps(at.b, t) {
                row[t] += before;
            }
        }
    }

    fn map_backward(&self, x: &Rows, phi: &Rows, d_phi: Rows, keeps: impl Fn(usize, usize) -> bool) -> Rows {
        let d_phi = d_phi.round(self.round);
        let mut d_x = Rows::zeros(x.shape);
        for at in x.indices().filter(|&[b, _, j]| keeps(b, j)) {
            let d = self.features.backward(x.row(at), phi.row(at), d_phi.row(at), self.round);
            d_x.row_mut(at).copy_from_slice(&d);
        }
        d_x
    }

    /// The state after all keys, token by token.
    pub fn state(&self) -> State {
        let mapped = self.map();
        let [batch, _, keys, features] = mapped.k.shape;
        let heads = self.k.shape[1].max(self.v.shape[1]);
        let mut s = Rows::zeros([batch, heads, features, self.v.shape[3]]);
        let mut z = Rows::zeros([batch, 1, heads, features]);
        let mut stabilizer = Rows::zeros([1, 1, batch, heads]);
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let head = |x: &Rows| h * x.shape[1] / heads;
            let mut max = f32::NEG_INFINITY;
            for j in (0..keys).filter(|&j| self.keeps(b, j)) {
                let exponent = mapped.exponents.row([b, head(&self.k), j])[0];
                let grown = max.max(exponent);
                let carry = self.weights.log_decay(b, h, j).exp() * (max - grown).exp();
                let enter = (exponent - grown).exp();
                max = grown;
                let value = self.v.row([b, head(&self.v), j]);
                for (f, phi) in mapped.k.row([b, head(&self.k), j]).iter().enumerate() {
                    let z = &mut z.row_mut([b, 0, h])[f];
                    *z = (self.round)(*z * carry + phi * enter);
                    let s = s.row_mut([b, h, f]);
                    s.iter_mut().for_each(|s| *s = (self.round)(*s * carry));
                    add_scaled(s, (self.round)(phi * enter), value);
                }
            }
            stabilizer.row_mut([0, 0, b])[h] = max;
        }
        let stabilizer = self.features.is_stabilized().then(|| stabilizer.array());
        State { s: s.array(), z: z.array(), stabilizer }
    }
}
