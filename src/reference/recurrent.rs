//! The linear family token by token, in O(N).

use super::Array;
use super::array::{add_scaled, assert_shape, dot};
use super::linear::LinearCall;
use super::pairs::{is_kept, position, shared_head};

/// What the linear family carries from one call to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// S = Σ φ(k) vᵀ with decay, `[B, Hs, D', E]`.
    pub s: Array,
    /// z = Σ φ(k) with decay, `[B, 1, Hs, D']`.
    pub z: Array,
    /// c `[1, 1, B, Hs]` for exponential FAVOR+ features: S and z hold features times e^{−c}, c the largest exponent
    /// among the keys so far (−∞ when there were none).
    pub stabilizer: Option<Array>,
}

impl LinearCall<'_> {
    /// The output after `initial` (the empty state by default), and the state that follows.
    pub fn recurrent(&self, initial: Option<&State>) -> (Array, State) {
        let mut state = self.begin(initial);
        let (sums, divisors) = self.run(&mut state);
        (self.finish.apply(&sums, &divisors), state)
    }

    /// The state to begin with.
    pub(super) fn begin(&self, initial: Option<&State>) -> State {
        let mut state = self.empty_state();
        if let Some(initial) = initial {
            assert_shape("state.s", &initial.s, state.s.shape);
            assert_shape("state.z", &initial.z, state.z.shape);
            assert_eq!(initial.stabilizer.is_some(), state.stabilizer.is_some(), "presence of state.stabilizer");
            if let (Some(given), Some(empty)) = (&initial.stabilizer, &state.stabilizer) {
                assert_shape("state.stabilizer", given, empty.shape);
            }
            state = initial.clone();
        }
        state
    }

    /// What queries read, and its divisors; moves `state` behind the last key.
    pub(super) fn run(&self, state: &mut State) -> (Array, Array) {
        let (batch, heads, queries) = (self.q.shape[0], self.heads(), self.q.shape[2]);
        let mut sums = Array::zeros([batch, heads, queries, self.v.shape[3]]);
        let mut divisors = Array::zeros([batch, heads, queries, 1]);
        for b in 0..batch {
            for state_head in 0..self.state_heads() {
                self.scan(b, state_head, state, &mut sums, &mut divisors);
            }
        }
        (sums, divisors)
    }

    fn empty_state(&self) -> State {
        let (batch, heads, features) = (self.q.shape[0], self.state_heads(), self.feature_width());
        let stabilizer = || Array::filled([1, 1, batch, heads], f64::NEG_INFINITY);
        State {
            s: Array::zeros([batch, heads, features, self.v.shape[3]]),
            z: Array::zeros([batch, 1, heads, features]),
            stabilizer: self.features.is_stabilized().then(stabilizer),
        }
    }

    fn scan(&self, b: usize, state_head: usize, state: &mut State, sums: &mut Array, divisors: &mut Array) {
        let (queries, keys) = (self.q.shape[2], self.k.shape[2]);
        let group = self.heads() / self.state_heads();
        let mut phi = vec![0.0; self.feature_width()];
        let mut absorbed = 0;
        for i in 0..queries {
            while absorbed < keys && (!self.causal || absorbed as i128 <= position(i, queries, keys)) {
                self.absorb(b, state_head, absorbed, state, &mut phi);
                absorbed += 1;
            }
            for h in state_head * group..(state_head + 1) * group {
                self.features.apply(self.q.row(b, shared_head(h, self.heads(), self.q.shape[1]), i), &mut phi);
                for (f, &phi) in phi.iter().enumerate() {
                    add_scaled(sums.row_mut(b, h, i), phi, state.s.row(b, state_head, f));
                }
                divisors.row_mut(b, h, i)[0] = dot(&phi, state.z.row(b, 0, state_head));
            }
        }
        for j in absorbed..keys {
            self.absorb(b, state_head, j, state, &mut phi);
        }
    }

    /// S ← a S + x φ(k_j) v_jᵀ and z ← a z + x φ(k_j), with a the decay and, for a stabiliser that grows from c to
    /// c', a further factor e^{c − c'}; x brings φ(k_j) to c'. A masked key does nothing. Returns a and x.
    pub(super) fn absorb(
        &self,
        b: usize,
        state_head: usize,
        j: usize,
        state: &mut State,
        phi: &mut [f64],
    ) -> Option<[f64; 2]> {
        if !is_kept(self.key_mask, b, j) {
            return None;
        }
        let head = |x: &Array| shared_head(state_head, self.state_heads(), x.shape[1]);
        let group = self.heads() / self.state_heads();
        let exponent = self.features.apply(self.k.row(b, head(self.k), j), phi);
        let mut carry = self.log_decay_at(b, state_head * group, j).exp();
        let mut enter = 1.0;
        if let Some(stabilizer) = &mut state.stabilizer {
            let stabilizer = &mut stabilizer.row_mut(0, 0, b)[state_head];
            let grown = stabilizer.max(exponent);
            if *stabilizer < grown {
                carry *= (*stabilizer - grown).exp();
                *stabilizer = grown;
            }
            enter = (exponent - grown).exp();
        }
        let z = state.z.row_mut(b, 0, state_head);
        z.iter_mut().for_each(|z| *z *= carry);
        add_scaled(z, enter, phi);
        for (f, feature) in phi.iter().enumerate() {
            let s = state.s.row_mut(b, state_head, f);
            s.iter_mut().for_each(|s| *s *= carry);
            add_scaled(s, enter * feature, self.v.row(b, head(self.v), j));
        }
        Some([carry, enter])
    }
}
