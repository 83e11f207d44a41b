//! Diagonal and selective scans, step by step.

use super::Array;
use super::array::assert_shape;

/// Real and imaginary part.
type Complex = [f64; 2];

fn times(a: Complex, b: Complex) -> Complex {
    [a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]]
}

fn conjugate(a: Complex) -> Complex {
    [a[0], -a[1]]
}

/// The order in which steps are taken.
fn order(steps: usize, reversed: bool) -> Vec<usize> {
    if reversed { (0..steps).rev().collect() } else { (0..steps).collect() }
}

fn at(x: [&Array; 2], place: [usize; 3]) -> Complex {
    let [batch, step, channel] = place;
    x.map(|part| part.row(0, batch, step)[channel])
}

/// h_t = a_t ⊙ h_{t−1} + b_t of complex numbers, real and imaginary parts `[1, B, N, C]` each, after `state`, `[1, B, 1, C]` (0 by
/// default); `reversed` takes steps from the last to the first. Real numbers have imaginary parts of 0.
///
/// # Panics
/// If shapes do not fit together.
pub fn diagonal_scan(a: [&Array; 2], b: [&Array; 2], state: Option<[&Array; 2]>, reversed: bool) -> [Array; 2] {
    let shape = checked(a, b, state);
    let mut h = [Array::zeros(shape), Array::zeros(shape)];
    for batch in 0..shape[1] {
        for channel in 0..shape[3] {
            let mut last = state.map_or([0.0; 2], |state| at(state, [batch, 0, channel]));
            for step in order(shape[2], reversed) {
                let (moved, b) = (times(at(a, [batch, step, channel]), last), at(b, [batch, step, channel]));
                last = [moved[0] + b[0], moved[1] + b[1]];
                h.iter_mut().zip(last).for_each(|(h, x)| h.row_mut(0, batch, step)[channel] = x);
            }
        }
    }
    h
}

/// Gradients of the parts of a, b and the state, from those of the parts of h:
///
/// ```text
/// db_t = dh_t + a*_{t+1} db_{t+1},   da_t = h*_{t−1} db_t,   d_state = a*_1 db_1
/// ```
///
/// # Panics
/// As [`diagonal_scan`].
pub fn diagonal_scan_backward(
    a: [&Array; 2],
    b: [&Array; 2],
    state: Option<[&Array; 2]>,
    reversed: bool,
    d_h: [&Array; 2],
) -> [[Array; 2]; 3] {
    let shape = checked(a, b, state);
    let h = diagonal_scan(a, b, state, reversed);
    let mut gradients =
        [shape, shape, [1, shape[1], 1, shape[3]]].map(|shape| [Array::zeros(shape), Array::zeros(shape)]);
    let mut put = |which: usize, place: [usize; 3], x: Complex| {
        let [batch, step, channel] = place;
        gradients[which].iter_mut().zip(x).for_each(|(part, x)| part.row_mut(0, batch, step)[channel] = x);
    };
    for batch in 0..shape[1] {
        for channel in 0..shape[3] {
            let mut along = [0.0; 2];
            let steps = order(shape[2], reversed);
            for (n, &step) in steps.iter().enumerate().rev() {
                let place = [batch, step, channel];
                let own = at(d_h, place);
                along = [along[0] + own[0], along[1] + own[1]];
                let before = match n {
                    0 => state.map_or([0.0; 2], |state| at(state, [batch, 0, channel])),
                    n => at(h.each_ref(), [batch, steps[n - 1], channel]),
                };
                put(1, place, along);
                put(0, place, times(conjugate(before), along));
                along = times(conjugate(at(a, place)), along);
            }
            put(2, [batch, 0, channel], along);
        }
    }
    gradients
}

fn checked(a: [&Array; 2], b: [&Array; 2], state: Option<[&Array; 2]>) -> [usize; 4] {
    let shape = b[0].shape;
    for part in [a[0], a[1], b[1]] {
        assert_shape("a and b", part, shape);
    }
    for state in state.into_iter().flatten() {
        assert_shape("state", state, [1, shape[1], 1, shape[3]]);
    }
    shape
}

/// Operands of [`selective_scan`], and their gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct SelectiveScan {
    /// `[1, B, N, C]`
    pub u: Array,
    /// Δ, as u
    pub delta: Array,
    /// `[1, 1, C, S]`
    pub a: Array,
    /// `[1, B, N, S]`
    pub b: Array,
    /// As b
    pub c: Array,
    /// D, `[1, 1, 1, C]`
    pub skip: Array,
    /// `[1, B, C, S]`
    pub state: Array,
}

impl SelectiveScan {
    fn check(&self) -> [usize; 4] {
        let [_, batch, steps, channels] = self.u.shape;
        let states = self.a.shape[3];
        assert_shape("delta", &self.delta, self.u.shape);
        assert_shape("a", &self.a, [1, 1, channels, states]);
        assert_shape("b", &self.b, [1, batch, steps, states]);
        assert_shape("c", &self.c, self.b.shape);
        assert_shape("skip", &self.skip, [1, 1, 1, channels]);
        assert_shape("state", &self.state, [1, batch, channels, states]);
        [batch, steps, channels, states]
    }

    /// h before the first step and after each, of a channel.
    fn states(&self, batch: usize, channel: usize) -> Vec<Vec<f64>> {
        let mut all = vec![self.state.row(0, batch, channel).to_vec()];
        for step in 0..self.u.shape[2] {
            let (delta, u) = (self.delta.row(0, batch, step)[channel], self.u.row(0, batch, step)[channel]);
            let added = self.b.row(0, batch, step).iter().map(|b| delta * u * b);
            let kept = all[step].iter().zip(self.a.row(0, 0, channel)).map(|(h, a)| (delta * a).exp() * h);
            let next = kept.zip(added).map(|(kept, added)| kept + added).collect();
            all.push(next);
        }
        all
    }
}

/// y `[1, B, N, C]` and the last state of h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t u_t B_t, y_t = ⟨C_t, h_t⟩ + D u_t.
///
/// # Panics
/// If shapes do not fit together.
pub fn selective_scan(operands: &SelectiveScan) -> [Array; 2] {
    let [batch, steps, channels, _] = operands.check();
    let (mut y, mut last) = (Array::zeros(operands.u.shape), operands.state.clone());
    for batch in 0..batch {
        for channel in 0..channels {
            let states = operands.states(batch, channel);
            for step in 0..steps {
                let read: f64 = operands.c.row(0, batch, step).iter().zip(&states[step + 1]).map(|(c, h)| c * h).sum();
                let skipped = operands.skip.row(0, 0, 0)[channel] * operands.u.row(0, batch, step)[channel];
                y.row_mut(0, batch, step)[channel] = read + skipped;
            }
            last.row_mut(0, batch, channel).copy_from_slice(&states[steps]);
        }
    }
    [y, last]
}

/// Gradients of ⟨d_y, y⟩ + ⟨d_last, the last state⟩, from the last step to the first.
///
/// # Panics
/// As [`selective_scan`].
pub fn selective_scan_backward(operands: &SelectiveScan, d_y: &Array, d_last: &Array) -> SelectiveScan {
    let [batch, steps, channels, states] = operands.check();
    let zeros = |like: &Array| Array::zeros(like.shape);
    let SelectiveScan { u, delta, a, b, c, skip, state } = operands;
    let mut d = SelectiveScan {
        u: zeros(u),
        delta: zeros(delta),
        a: zeros(a),
        b: zeros(b),
        c: zeros(c),
        skip: zeros(skip),
        state: zeros(state),
    };
    for batch in 0..batch {
        for channel in 0..channels {
            let h = operands.states(batch, channel);
            let mut d_h = d_last.row(0, batch, channel).to_vec();
            for step in (0..steps).rev() {
                let (u, delta) = (u.row(0, batch, step)[channel], delta.row(0, batch, step)[channel]);
                let d_y = d_y.row(0, batch, step)[channel];
                d.skip.row_mut(0, 0, 0)[channel] += d_y * u;
                let (mut d_u, mut d_delta) = (skip.row(0, 0, 0)[channel] * d_y, 0.0);
                for n in 0..states {
                    let (a, b) = (a.row(0, 0, channel)[n], b.row(0, batch, step)[n]);
                    d.c.row_mut(0, batch, step)[n] += d_y * h[step + 1][n];
                    d_h[n] += d_y * c.row(0, batch, step)[n];
                    let decay = (delta * a).exp();
                    let d_exponent = d_h[n] * decay * h[step][n];
                    d.a.row_mut(0, 0, channel)[n] += d_exponent * delta;
                    d.b.row_mut(0, batch, step)[n] += d_h[n] * delta * u;
                    d_delta += d_exponent * a + d_h[n] * u * b;
                    d_u += d_h[n] * delta * b;
                    d_h[n] *= decay;
                }
                d.u.row_mut(0, batch, step)[channel] = d_u;
                d.delta.row_mut(0, batch, step)[channel] = d_delta;
            }
            d.state.row_mut(0, batch, channel).copy_from_slice(&d_h);
        }
    }
    d
}
