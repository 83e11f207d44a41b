//! Decay per channel and the delta rules, token by token.

use super::Array;
use super::array::{add_scaled, assert_shape, dot};
use super::pairs::{is_kept, shared_head};
use crate::delta::DeltaOptions;
use crate::problem::RankOne;

/// What [`delta_attention_backward`] and its siblings return: derivatives of a loss, each in the shape of its input.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaGradients {
    /// By q.
    pub q: Array,
    /// By k.
    pub k: Array,
    /// By v.
    pub v: Array,
    /// By β, or a and b.
    pub rank_one: RankOne<Array>,
    /// By the log-decay, when one was given.
    pub log_decay: Option<Array>,
    /// By the bonus, when one was given.
    pub bonus: Option<Array>,
    /// By the state before the first token.
    pub state: Array,
}

/// The output `[B, H, N, E]` and the last state `[B, Hs, D, E]` of the recurrence, after `state` (0 by default):
///
/// ```text
/// none   S_t = Diag(α_t) S_{t−1} + k_t v_tᵀ
/// rule   S'_t = Diag(α_t) S_{t−1},   S_t = S'_t + β_t k_t (v_t − S'_tᵀ k_t)ᵀ
/// free   S_t = Diag(α_t) S_{t−1} + a_t b_tᵀ S_{t−1} + k_t v_tᵀ
/// then   o_t = τ S_tᵀ q_t
/// or     o_t = τ S_{t−1}ᵀ q_t + τ ⟨q_t, u ⊙ k_t⟩ v_t     with a bonus u
/// ```
///
/// with α = e^g, g of `[1, 1, 1, Hs]`, `[1, B, Hs, N]` or `[B, Hs, N, D]`, β `[1, B, Hs, N]`, a and b as k, u `[1, 1, Hs, D]`. With `normalize`
/// queries and keys are divided by √(Σ x² + ε). A masked token changes nothing.
///
/// # Panics
/// If shapes do not fit together.
pub fn delta_attention(
    operands: [&Array; 3],
    rank_one: RankOne<&Array>,
    options: &DeltaOptions<Array>,
    state: Option<&Array>,
) -> (Array, Array) {
    let call = Call::new(operands, rank_one, options);
    let mut out = Array::zeros(call.out_shape());
    let mut last = call.initial(state);
    call.each_state_head(|b, head| {
        let states = call.states(b, head, &last);
        for t in 0..states.len() - 1 {
            let s = call.read_state(&states, t);
            for h in call.readers(head) {
                let q = call.q_row(b, h, t);
                for (q, s) in q.iter().zip(s.chunks_exact(call.value_width())) {
                    add_scaled(out.row_mut(b, h, t), call.scale * q, s);
                }
                if let Some(key) = call.weighed_key(b, head, t) {
                    add_scaled(out.row_mut(b, h, t), call.scale * dot(&q, &key), call.row(call.v, b, head, t));
                }
            }
        }
        let width = call.width() * call.value_width();
        let start = (b * call.state_heads() + head) * width;
        last.data[start..start + width].copy_from_slice(&states[states.len() - 1]);
    });
    (out, last)
}

/// Gradients of ⟨d_out, o⟩ + ⟨d_state, S_N⟩ for [`delta_attention`], by the adjoint recurrence: with R_t the derivative by S_t,
///
/// ```text
/// R_t ← R_t + τ q_t do_tᵀ,   dq_t = τ S_t do_t
/// none   dk = R v, dv = Rᵀk, dα = Σ_e R ⊙ S_{t−1},   R_{t−1} = α ⊙ R
/// rule   w = v − S'ᵀk:  dv = β Rᵀk, dβ = kᵀR w, dk = β R w − S' dv,   R' = R − k dvᵀ, dα = Σ_e R' ⊙ S_{t−1}, R_{t−1} = α ⊙ R'
/// free   da = R u, du = Rᵀa, db = S_{t−1} du, dk, dv and dα as without,   R_{t−1} = α ⊙ R + b duᵀ      (u = S_{t−1}ᵀ b)
/// ```
///
/// With a bonus τ q_t do_tᵀ is added to R_{t−1} instead, dq_t reads S_{t−1}, and with w = τ ⟨do_t, v_t⟩
///
/// ```text
/// dq += w u ⊙ k,   dk += w u ⊙ q,   du += w q ⊙ k,   dv += τ ⟨q, u ⊙ k⟩ do
/// ```
///
/// # Panics
/// As [`delta_attention`].
pub fn delta_attention_backward(
    operands: [&Array; 3],
    rank_one: RankOne<&Array>,
    options: &DeltaOptions<Array>,
    state: Option<&Array>,
    d_out: &Array,
    d_state: Option<&Array>,
) -> DeltaGradients {
    let call = Call::new(operands, rank_one, options);
    assert_shape("d_out", d_out, call.out_shape());
    let initial = call.initial(state);
    let like = |x: &Array| Array::zeros(x.shape);
    let mut gradients = DeltaGradients {
        q: like(call.q),
        k: like(call.k),
        v: like(call.v),
        rank_one: rank_one.map(like),
        log_decay: options.log_decay.as_ref().map(like),
        bonus: options.bonus.as_ref().map(like),
        state: call.initial(d_state),
    };
    call.each_state_head(|b, head| call.backward(b, head, &initial, d_out, &mut gradients));
    gradients
}

struct Call<'a> {
    q: &'a Array,
    k: &'a Array,
    v: &'a Array,
    rank_one: RankOne<&'a Array>,
    options: &'a DeltaOptions<Array>,
    scale: f64,
}

impl<'a> Call<'a> {
    fn new([q, k, v]: [&'a Array; 3], rank_one: RankOne<&'a Array>, options: &'a DeltaOptions<Array>) -> Self {
        assert!(options.sequences.is_none(), "packed sequences are defined by the calls of each");
        let scale = options.scale.unwrap_or(1.0 / (q.shape[3] as f64).sqrt());
        let call = Self { q, k, v, rank_one, options, scale };
        let [batch, _, tokens, width] = q.shape;
        assert_shape("k", k, [batch, k.shape[1], tokens, width]);
        assert_shape("v", v, [batch, v.shape[1], tokens, v.shape[3]]);
        let heads = call.state_heads();
        match rank_one {
            RankOne::None => {}
            RankOne::Rule { beta } => assert_shape("beta", beta, [1, batch, heads, tokens]),
            RankOne::Free { a, b } => {
                assert_shape("a", a, k.shape);
                assert_shape("b", b, k.shape);
            }
        }
        if let Some(bonus) = &options.bonus {
            assert_shape("bonus", bonus, [1, 1, heads, width]);
            assert!(matches!(rank_one, RankOne::None), "a bonus beside a rank-one part");
        }
        if let Some(log_decay) = &options.log_decay {
            let forms = [[1, 1, 1, heads], [1, batch, heads, tokens], [batch, heads, tokens, width]];
            assert!(forms.contains(&log_decay.shape), "shape of log_decay: {:?}", log_decay.shape);
        }
        call
    }

    fn width(&self) -> usize {
        self.q.shape[3]
    }

    fn value_width(&self) -> usize {
        self.v.shape[3]
    }

    fn state_heads(&self) -> usize {
        self.k.shape[1].max(self.v.shape[1])
    }

    fn heads(&self) -> usize {
        self.q.shape[1].max(self.state_heads())
    }

    fn out_shape(&self) -> [usize; 4] {
        [self.q.shape[0], self.heads(), self.q.shape[2], self.value_width()]
    }

    fn readers(&self, head: usize) -> std::ops::Range<usize> {
        let group = self.heads() / self.state_heads();
        head * group..(head + 1) * group
    }

    fn initial(&self, state: Option<&Array>) -> Array {
        let shape = [self.q.shape[0], self.state_heads(), self.width(), self.value_width()];
        state.map_or_else(
            || Array::zeros(shape),
            |state| {
                assert_shape("state", state, shape);
                state.clone()
            },
        )
    }

    fn each_state_head(&self, mut f: impl FnMut(usize, usize)) {
        (0..self.q.shape[0]).for_each(|b| (0..self.state_heads()).for_each(|head| f(b, head)));
    }

    /// The row of a state head in an operand that may have fewer heads.
    fn row<'x>(&self, x: &'x Array, b: usize, head: usize, t: usize) -> &'x [f64] {
        x.row(b, shared_head(head, self.state_heads(), x.shape[1]), t)
    }

    /// √(Σ x² + ε), or 1.
    fn norm(&self, row: &[f64]) -> f64 {
        self.options.normalize.map_or(1.0, |epsilon| (dot(row, row) + epsilon).sqrt())
    }

    fn normalized(&self, row: &[f64]) -> Vec<f64> {
        let norm = self.norm(row);
        row.iter().map(|x| x / norm).collect()
    }

    fn q_row(&self, b: usize, h: usize, t: usize) -> Vec<f64> {
        self.normalized(self.q.row(b, shared_head(h, self.heads(), self.q.shape[1]), t))
    }

    fn k_row(&self, b: usize, head: usize, t: usize) -> Vec<f64> {
        self.normalized(self.row(self.k, b, head, t))
    }

    /// Where the log-decay of a channel lies.
    fn decay_index(&self, log_decay: &Array, b: usize, head: usize, t: usize, channel: usize) -> usize {
        let ([batch, _, tokens, width], heads) = (self.q.shape, self.state_heads());
        match log_decay.shape {
            [_, 1, 1, last] if last == heads => head,
            shape if shape == [1, batch, heads, tokens] => (b * heads + head) * tokens + t,
            _ => ((b * heads + head) * tokens + t) * width + channel,
        }
    }

    /// α of every channel.
    fn decay(&self, b: usize, head: usize, t: usize) -> Vec<f64> {
        let of = |channel| {
            let log_decay = self.options.log_decay.as_ref()?;
            Some(log_decay.data[self.decay_index(log_decay, b, head, t, channel)].exp())
        };
        (0..self.width()).map(|channel| of(channel).unwrap_or(1.0)).collect()
    }

    /// Sᵀ x
    fn read(&self, s: &[f64], x: &[f64]) -> Vec<f64> {
        let mut sums = vec![0.0; self.value_width()];
        x.iter().zip(s.chunks_exact(self.value_width())).for_each(|(&x, s)| add_scaled(&mut sums, x, s));
        sums
    }

    /// S y
    fn along(&self, s: &[f64], y: &[f64]) -> Vec<f64> {
        s.chunks_exact(self.value_width()).map(|s| dot(s, y)).collect()
    }

    /// S + x yᵀ
    fn add_outer(&self, s: &mut [f64], x: &[f64], y: &[f64]) {
        x.iter().zip(s.chunks_exact_mut(self.value_width())).for_each(|(&x, s)| add_scaled(s, x, y));
    }

    /// Diag(α) S
    fn faded(&self, s: &[f64], decay: &[f64]) -> Vec<f64> {
        let rows = s.chunks_exact(self.value_width()).zip(decay);
        rows.flat_map(|(s, decay)| s.iter().map(move |s| decay * s)).collect()
    }

    /// The state that a token reads, of those before the first token and after each.
    fn read_state<'s>(&self, states: &'s [Vec<f64>], t: usize) -> &'s [f64] {
        &states[if self.options.bonus.is_some() { t } else { t + 1 }]
    }

    /// u ⊙ k of a token, if there is a bonus and the token is not masked.
    fn weighed_key(&self, b: usize, head: usize, t: usize) -> Option<Vec<f64>> {
        let bonus = self.options.bonus.as_ref().filter(|_| is_kept(self.options.key_mask.as_ref(), b, t))?;
        Some(bonus.row(0, 0, head).iter().zip(self.k_row(b, head, t)).map(|(u, k)| u * k).collect())
    }

    fn beta(&self, beta: &Array, b: usize, head: usize, t: usize) -> f64 {
        beta.row(0, b, head)[t]
    }

    /// The state before the first token and after each.
    fn states(&self, b: usize, head: usize, initial: &Array) -> Vec<Vec<f64>> {
        let len = self.width() * self.value_width();
        let start = (b * self.state_heads() + head) * len;
        let mut states = vec![initial.data[start..start + len].to_vec()];
        for t in 0..self.q.shape[2] {
            let before = &states[t];
            if !is_kept(self.options.key_mask.as_ref(), b, t) {
                states.push(before.clone());
                continue;
            }
            let (k, v) = (self.k_row(b, head, t), self.row(self.v, b, head, t));
            let mut s = self.faded(before, &self.decay(b, head, t));
            match self.rank_one {
                RankOne::None => self.add_outer(&mut s, &k, v),
                RankOne::Rule { beta } => {
                    let beta = self.beta(beta, b, head, t);
                    let change: Vec<f64> = v.iter().zip(self.read(&s, &k)).map(|(v, held)| beta * (v - held)).collect();
                    self.add_outer(&mut s, &k, &change);
                }
                RankOne::Free { a, b: reading } => {
                    let held = self.read(before, self.row(reading, b, head, t));
                    self.add_outer(&mut s, self.row(a, b, head, t), &held);
                    self.add_outer(&mut s, &k, v);
                }
            }
            states.push(s);
        }
        states
    }

    fn backward(&self, b: usize, head: usize, initial: &Array, d_out: &Array, gradients: &mut DeltaGradients) {
        let states = self.states(b, head, initial);
        let len = self.width() * self.value_width();
        let start = (b * self.state_heads() + head) * len;
        let mut r = gradients.state.data[start..start + len].to_vec();
        let shared = |x: &Array| shared_head(head, self.state_heads(), x.shape[1]);
        for t in (0..self.q.shape[2]).rev() {
            let mut from_reads = vec![0.0; len];
            let (mut own_d_k, mut own_d_v) = (vec![0.0; self.width()], vec![0.0; self.value_width()]);
            for h in self.readers(head) {
                let d_out = d_out.row(b, h, t);
                let q = self.q_row(b, h, t);
                let scaled: Vec<f64> = q.iter().map(|q| self.scale * q).collect();
                self.add_outer(&mut from_reads, &scaled, d_out);
                let read = self.along(self.read_state(&states, t), d_out);
                let mut d_q: Vec<f64> = read.iter().map(|x| self.scale * x).collect();
                if let (Some(key), Some(d_bonus)) = (self.weighed_key(b, head, t), &mut gradients.bonus) {
                    let bonus = self.options.bonus.as_ref().expect("one with a gradient").row(0, 0, head);
                    let weight = dot(d_out, self.row(self.v, b, head, t));
                    add_scaled(&mut d_q, self.scale * weight, &key);
                    add_scaled(&mut own_d_v, dot(&scaled, &key), d_out);
                    let k = self.k_row(b, head, t);
                    for (channel, (q, (u, k))) in scaled.iter().zip(bonus.iter().zip(k)).enumerate() {
                        own_d_k[channel] += weight * u * q;
                        d_bonus.row_mut(0, 0, head)[channel] += weight * q * k;
                    }
                }
                let own = shared_head(h, self.heads(), self.q.shape[1]);
                let d_q = self.unnormalized(self.q.row(b, own, t), &d_q);
                add_scaled(gradients.q.row_mut(b, own, t), 1.0, &d_q);
            }
            let reads_first = self.options.bonus.is_some();
            if !reads_first {
                add_scaled(&mut r, 1.0, &from_reads);
            }
            if !is_kept(self.options.key_mask.as_ref(), b, t) {
                if reads_first {
                    add_scaled(&mut r, 1.0, &from_reads);
                }
                continue;
            }
            let (k, v, decay) = (self.k_row(b, head, t), self.row(self.v, b, head, t), self.decay(b, head, t));
            let before = &states[t];
            let (mut d_k, mut d_v) = (self.along(&r, v), self.read(&r, &k));
            let mut from_reading = None;
            match (self.rank_one, &mut gradients.rank_one) {
                (RankOne::Rule { beta }, RankOne::Rule { beta: d_beta }) => {
                    let beta = self.beta(beta, b, head, t);
                    let faded = self.faded(before, &decay);
                    let change: Vec<f64> = v.iter().zip(self.read(&faded, &k)).map(|(v, held)| v - held).collect();
                    let along = self.along(&r, &change);
                    d_beta.row_mut(0, b, head)[t] = dot(&k, &along);
                    d_v.iter_mut().for_each(|d_v| *d_v *= beta);
                    let back = self.along(&faded, &d_v);
                    d_k = along.iter().zip(back).map(|(along, back)| beta * along - back).collect();
                    let minus: Vec<f64> = k.iter().map(|k| -k).collect();
                    self.add_outer(&mut r, &minus, &d_v);
                }
                (RankOne::Free { a, b: reading }, RankOne::Free { a: d_a, b: d_b }) => {
                    let reading = self.row(reading, b, head, t);
                    let held = self.read(before, reading);
                    add_scaled(d_a.row_mut(b, shared(a), t), 1.0, &self.along(&r, &held));
                    let d_held = self.read(&r, self.row(a, b, head, t));
                    add_scaled(d_b.row_mut(b, shared(a), t), 1.0, &self.along(before, &d_held));
                    from_reading = Some((reading, d_held));
                }
                _ => {}
            }
            if let (Some(log_decay), Some(d_log_decay)) = (&self.options.log_decay, &mut gradients.log_decay) {
                let rows = before.chunks_exact(self.value_width()).zip(r.chunks_exact(self.value_width()));
                for (channel, (s, r)) in rows.enumerate() {
                    let index = self.decay_index(log_decay, b, head, t, channel);
                    d_log_decay.data[index] += decay[channel] * dot(s, r);
                }
            }
            add_scaled(&mut d_k, 1.0, &own_d_k);
            add_scaled(&mut d_v, 1.0, &own_d_v);
            let d_k = self.unnormalized(self.row(self.k, b, head, t), &d_k);
            add_scaled(gradients.k.row_mut(b, shared(self.k), t), 1.0, &d_k);
            add_scaled(gradients.v.row_mut(b, shared(self.v), t), 1.0, &d_v);
            r = self.faded(&r, &decay);
            if let Some((reading, d_held)) = from_reading {
                self.add_outer(&mut r, reading, &d_held);
            }
            if reads_first {
                add_scaled(&mut r, 1.0, &from_reads);
            }
        }
        gradients.state.data[start..start + len].copy_from_slice(&r);
    }

    /// The gradient of a row from that of the row divided by its norm.
    fn unnormalized(&self, row: &[f64], d_row: &[f64]) -> Vec<f64> {
        let norm = self.norm(row);
        let along = if self.options.normalize.is_some() { dot(row, d_row) / norm.powi(3) } else { 0.0 };
        row.iter().zip(d_row).map(|(x, d_x)| d_x / norm - along * x).collect()
    }
}
