//! The gradients of the recurrent form, through the states at both ends.

use super::array::{add_scaled, assert_shape, dot};
use super::linear::LinearCall;
use super::pairs::{position, shared_head};
use super::{Array, Gradients, State};

/// The derivatives of a loss by a [`State`], with the stabiliser held fixed.
#[derive(Debug, Clone, PartialEq)]
pub struct StateGradient {
    /// By S, `[B, Hs, D', E]`.
    pub s: Array,
    /// By z, `[B, 1, Hs, D']`.
    pub z: Array,
}

/// What finished sums receive.
struct Returned {
    sums: Array,
    divisors: Array,
}

impl LinearCall<'_> {
    /// From the gradients of the output and of the last state (0 by default) those of the inputs and of the first state,
    /// R_0 and r_0: a, x as in the forward pass, for each key from the last to the first
    ///
    /// ```text
    /// dφ(k) = x (R v + r),   dv = x Rᵀφ(k),   dg = a (⟨R, S⟩ + ⟨r, z⟩),   R ← a R,   r ← a r
    /// ```
    ///
    /// with S and z before the key, and for each query that reads S and z, dt and dd by them,
    ///
    /// ```text
    /// dφ(q) = S dt + z dd,   R ← R + φ(q) dtᵀ,   r ← r + φ(q) dd
    /// ```
    pub fn recurrent_backward(
        &self,
        initial: Option<&State>,
        d_out: &Array,
        d_last: Option<&StateGradient>,
    ) -> (Gradients, StateGradient) {
        let first = self.begin(initial);
        let (sums, divisors) = self.run(&mut first.clone());
        assert_shape("d_out", d_out, sums.shape);
        let (d_sums, d_divisors) = self.finish.backward(&sums, &divisors, d_out);
        let returned = Returned { sums: d_sums, divisors: d_divisors };
        let zeros = || StateGradient { s: Array::zeros(first.s.shape), z: Array::zeros(first.z.shape) };
        let mut d_state = d_last.cloned().unwrap_or_else(zeros);
        assert_shape("d_state.s", &d_state.s, first.s.shape);
        assert_shape("d_state.z", &d_state.z, first.z.shape);
        let mut gradients = Gradients {
            q: Array::zeros(self.q.shape),
            k: Array::zeros(self.k.shape),
            v: Array::zeros(self.v.shape),
            bias: None,
            attention_bias: None,
            sinks: None,
            log_decay: self.log_decay.map(|log_decay| Array::zeros(log_decay.shape)),
        };
        for b in 0..self.q.shape[0] {
            for head in 0..self.state_heads() {
                self.scan_back([b, head], first.clone(), &returned, &mut d_state, &mut gradients);
            }
        }
        (gradients, d_state)
    }

    fn scan_back(
        &self,
        [b, head]: [usize; 2],
        mut state: State,
        returned: &Returned,
        d_state: &mut StateGradient,
        gradients: &mut Gradients,
    ) {
        let (queries, keys) = (self.q.shape[2], self.k.shape[2]);
        let read = |i| if self.causal { (position(i, queries, keys) + 1).clamp(0, keys as i128) } else { keys as i128 };
        let sums = |state: &State| {
            let rows = (0..self.feature_width()).map(|f| state.s.row(b, head, f).to_vec());
            (rows.collect::<Vec<_>>(), state.z.row(b, 0, head).to_vec())
        };
        let (mut phi, mut before, mut entries) = (vec![0.0; self.feature_width()], Vec::new(), Vec::new());
        for j in 0..keys {
            before.push(sums(&state));
            entries.push(self.absorb(b, head, j, &mut state, &mut phi).map(|factors| (phi.clone(), factors)));
        }
        before.push(sums(&state));
        for (absorbed, (s, z)) in before.iter().enumerate().rev() {
            // S and z after so many keys: first those that read them, then the key that comes next to last.
            for i in (0..queries).filter(|&i| read(i) == absorbed as i128) {
                self.read_back([b, head, i], (s, z), returned, d_state, gradients);
            }
            let Some(j) = absorbed.checked_sub(1) else { continue };
            if let Some((phi, factors)) = &entries[j] {
                let (s, z) = &before[j];
                self.absorb_back([b, head, j], (s, z), (phi, *factors), d_state, gradients);
            }
        }
    }

    fn read_back(
        &self,
        [b, head, i]: [usize; 3],
        (s, z): (&[Vec<f64>], &[f64]),
        returned: &Returned,
        d_state: &mut StateGradient,
        gradients: &mut Gradients,
    ) {
        let group = self.heads() / self.state_heads();
        let mut phi = vec![0.0; self.feature_width()];
        for h in head * group..(head + 1) * group {
            let query_head = shared_head(h, self.heads(), self.q.shape[1]);
            let q = self.q.row(b, query_head, i);
            self.features.apply(q, &mut phi);
            let (d_sum, d_divisor) = (returned.sums.row(b, h, i), returned.divisors.row(b, h, i)[0]);
            let d_phi: Vec<f64> = s.iter().zip(z).map(|(s, z)| dot(s, d_sum) + z * d_divisor).collect();
            self.features.backward(q, &phi, &d_phi, gradients.q.row_mut(b, query_head, i));
            for (f, phi) in phi.iter().enumerate() {
                add_scaled(d_state.s.row_mut(b, head, f), *phi, d_sum);
            }
            add_scaled(d_state.z.row_mut(b, 0, head), d_divisor, &phi);
        }
    }

    fn absorb_back(
        &self,
        [b, head, j]: [usize; 3],
        (s, z): (&[Vec<f64>], &[f64]),
        (phi, [carry, enter]): (&[f64], [f64; 2]),
        d_state: &mut StateGradient,
        gradients: &mut Gradients,
    ) {
        let of = |x: &Array| shared_head(head, self.state_heads(), x.shape[1]);
        let v = self.v.row(b, of(self.v), j);
        let mut through = dot(d_state.z.row(b, 0, head), z);
        let mut d_phi = d_state.z.row(b, 0, head).to_vec();
        for (f, s) in s.iter().enumerate() {
            let r = d_state.s.row_mut(b, head, f);
            d_phi[f] += dot(r, v);
            through += dot(r, s);
            add_scaled(gradients.v.row_mut(b, of(self.v), j), enter * phi[f], r);
            r.iter_mut().for_each(|r| *r *= carry);
        }
        d_state.z.row_mut(b, 0, head).iter_mut().for_each(|r| *r *= carry);
        d_phi.iter_mut().for_each(|d| *d *= enter);
        let key_head = of(self.k);
        self.features.backward(self.k.row(b, key_head, j), phi, &d_phi, gradients.k.row_mut(b, key_head, j));
        if let Some(d_log_decay) = &mut gradients.log_decay {
            let group = self.heads() / self.state_heads();
            let index = self.decay_index(d_log_decay, b, head * group, j);
            d_log_decay.data[index] += carry * through;
        }
    }
}
