//! The gradients that a state after the last key brings, and of the state before the first.

use super::branch::{Branch, Mapped, Sweep};
use super::rows::{Rows, add_scaled, dot};

/// S and z, of a state or of its gradient.
pub struct Sums {
    pub s: Rows,
    pub z: Rows,
}

/// A run whose last state has a gradient.
pub struct Ends {
    /// Keys behind the first state.
    pub before: usize,
    pub d_state: Sums,
}

/// A state head: log-decays of its tokens, and the largest exponent of its first keys, by how many they are.
struct Line {
    logs: Vec<f32>,
    stabilizers: Vec<f32>,
}

impl Branch<'_> {
    fn line(&self, mapped: &Mapped, [b, h]: [usize; 2], state_heads: usize) -> Line {
        let keys = self.k.shape[2];
        let head = h * self.k.shape[1] / state_heads;
        let exponents = (0..keys).map(|j| match self.keeps(b, j) {
            true => mapped.exponents.row([b, head, j])[0],
            false => f32::NEG_INFINITY,
        });
        let mut largest = f32::NEG_INFINITY;
        let running = exponents.map(|exponent| {
            largest = largest.max(exponent);
            largest
        });
        let stabilizers = std::iter::once(f32::NEG_INFINITY).chain(running).collect();
        Line { logs: (0..keys).map(|t| self.weights.log_decay(b, h, t)).collect(), stabilizers }
    }

    /// Adds to the gradients on the way what the last state brings, and returns that of the first.
    pub fn end_backward(&self, mapped: &Mapped, ends: &Ends, (d_t, d_sum): (&Rows, &Rows), d: &mut Sweep) -> Sums {
        let [batch, state_heads, ..] = ends.d_state.s.shape;
        let (mut s, mut z) = (Rows::zeros(ends.d_state.s.shape), Rows::zeros(ends.d_state.z.shape));
        for at in (0..batch).flat_map(|b| (0..state_heads).map(move |h| [b, h])) {
            let line = self.line(mapped, at, state_heads);
            self.keys_backward(mapped, ends, at, &line, d);
            if ends.before > 0 {
                self.first_backward(mapped, ends, at, &line, (d_t, d_sum), (&mut s, &mut z));
            }
        }
        Sums { s, z }
    }

    fn keys_backward(&self, mapped: &Mapped, ends: &Ends, [b, h]: [usize; 2], line: &Line, d: &mut Sweep) {
        let (d_s, d_z) = (&ends.d_state.s, ends.d_state.z.row([b, 0, h]));
        let (keys, state_heads) = (self.k.shape[2], d_s.shape[1]);
        let head = |x: &Rows| h * x.shape[1] / state_heads;
        let (mut later, mut products) = (0.0, vec![0.0; keys]);
        for j in (0..keys).rev() {
            if self.keeps(b, j) {
                let (key, value) = ([b, head(&self.k), j], [b, head(&self.v), j]);
                let shift = mapped.exponents.row(key)[0] - line.stabilizers[keys];
                let factor = (self.round)((self.round)(shift.exp()) * (self.round)(f32::exp(later)));
                for (f, phi) in mapped.k.row(key).iter().enumerate() {
                    let row = d_s.row([b, h, f]);
                    let d_phi = (self.round)(factor * (self.round)(dot(row, self.v.row(value)) + d_z[f]));
                    d.k.row_mut(key)[f] += d_phi;
                    products[j] += phi * d_phi;
                    add_scaled(d.v.row_mut(value), (self.round)(factor * phi), row);
                }
            }
            later += line.logs[j];
        }
        let Some(decay) = &mut d.decay else { return };
        let mut before = 0.0;
        for (t, product) in products.iter().enumerate() {
            if self.keeps(b, t) {
                decay.row_mut([0, b, h])[t] += before;
            }
            before += product;
        }
    }

    fn first_backward(
        &self,
        mapped: &Mapped,
        ends: &Ends,
        [b, h]: [usize; 2],
        line: &Line,
        (d_t, d_sum): (&Rows, &Rows),
        (s, z): (&mut Rows, &mut Rows),
    ) {
        let (keys, queries, state_heads) = (self.k.shape[2], self.q.shape[2], s.shape[1]);
        let group = self.heads() / state_heads;
        // What is left of the first state after so many keys.
        let left = |seen: usize| {
            let log: f32 = line.logs[ends.before..seen].iter().sum();
            let shift = line.stabilizers[ends.before] - line.stabilizers[seen];
            log.exp() * shift.exp()
        };
        let d_z = ends.d_state.z.row([b, 0, h]);
        let rest = left(keys);
        for (f, d_z) in d_z.iter().enumerate() {
            add_scaled(s.row_mut([b, h, f]), rest, ends.d_state.s.row([b, h, f]));
            z.row_mut([b, 0, h])[f] += rest * d_z;
        }
        for i in 0..queries {
            let seen = if self.weights.is_causal() { i + 1 + keys - queries } else { keys };
            for reader in h * group..(h + 1) * group {
                let query = [b, reader * self.q.shape[1] / self.heads(), i];
                for (f, phi) in mapped.q.row(query).iter().enumerate() {
                    let weight = left(seen) * phi;
                    add_scaled(s.row_mut([b, h, f]), weight, d_t.row([b, reader, i]));
                    z.row_mut([b, 0, h])[f] += weight * d_sum.row([b, reader, i])[0];
                }
            }
        }
    }
}
