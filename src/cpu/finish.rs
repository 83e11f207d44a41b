//! What happens to a row once its sum over the keys is known, and its way back.

use super::simd::Real;
use crate::problem::QuadraticFinish;
use crate::problem::Weight;

/// Turns Σ w v into the output row, given Σ w and the largest score times log₂ e; returns the row's statistic: the log-sum-exp
/// for softmax, else the divisor.
pub fn finish<T: Real>(weight: Weight, finish: QuadraticFinish, row: &mut [T], sum: T, maximum: T) -> T {
    let (factor, statistic) = match (weight, finish) {
        (Weight::Softmax, _) => {
            let log_sum_exp = maximum * T::from_f64(std::f64::consts::LN_2) + sum.ln();
            (inverse(sum), if sum == T::ZERO { T::NEG_INFINITY } else { log_sum_exp })
        }
        (_, QuadraticFinish::None) => return T::ONE,
        (_, QuadraticFinish::Scale(scale)) => (T::from_f64(scale), T::ONE),
        (_, QuadraticFinish::RowSum { epsilon }) => {
            let divisor = sum + T::from_f64(epsilon);
            (inverse(divisor), divisor)
        }
        (_, QuadraticFinish::RmsNorm { epsilon }) => {
            let divisor = root_mean_square(row, epsilon);
            (inverse(divisor), divisor)
        }
    };
    for x in row {
        *x = *x * factor;
    }
    statistic
}

/// Adds a sink of this score to a row of sums, whose Σ w and largest score times log₂ e are given and returned.
pub fn add_sink<T: Real>(row: &mut [T], sum: T, maximum: T, sink: T) -> (T, T) {
    if sink == T::NEG_INFINITY {
        return (sum, maximum);
    }
    let sink = sink * T::from_f64(std::f64::consts::LOG2_E);
    let largest = maximum.larger(sink);
    let factor = if maximum == T::NEG_INFINITY { T::ZERO } else { (maximum - largest).exp2() };
    if factor != T::ONE {
        row.iter_mut().for_each(|x| *x = *x * factor);
    }
    (sum * factor + (sink - largest).exp2(), largest)
}

/// √(mean x² + ε), for rows of any size.
pub fn root_mean_square<T: Real>(row: &[T], epsilon: f64) -> T {
    let square = dot(row, row) / T::from_f64(row.len() as f64) + T::from_f64(epsilon);
    // Far from both ends of the range: no square has overflowed, and none that matters has been lost.
    if square > T::from_f64(1e-28) && square < T::from_f64(1e37) {
        return square.sqrt();
    }
    let root = epsilon.sqrt();
    let largest = row.iter().map(|x| x.to_f64().abs()).fold(root, f64::max);
    if largest.is_infinite() {
        return square;
    }
    let squares = row.iter().map(|x| (x.to_f64() / largest).powi(2)).sum::<f64>();
    T::from_f64(largest * (squares / row.len() as f64 + (root / largest).powi(2)).sqrt())
}

/// Turns the gradient of an output row into that of Σ w v, in place, and returns δ, so that the gradient of a score
/// is weight′ ⊙ (⟨d_row, v⟩ − δ). `d_statistic` is the gradient of the log-sum-exp. Where weights are divided by their sum,
/// δ has a part ⟨d_row, out⟩, which is left out without `out`.
pub fn unfinish<T: Real>(
    weight: Weight,
    finish: QuadraticFinish,
    d_row: &mut [T],
    out: Option<&[T]>,
    statistic: T,
    d_statistic: T,
) -> T {
    match (weight, finish) {
        (Weight::Softmax, _) => out.map_or(T::ZERO, |out| dot(d_row, out)) - d_statistic,
        (_, QuadraticFinish::None) => T::ZERO,
        (_, QuadraticFinish::Scale(scale)) => {
            d_row.iter_mut().for_each(|d| *d = *d * T::from_f64(scale));
            T::ZERO
        }
        (_, QuadraticFinish::RowSum { .. }) => {
            let factor = inverse(statistic);
            d_row.iter_mut().for_each(|d| *d = *d * factor);
            out.map_or(T::ZERO, |out| dot(d_row, out))
        }
        (_, QuadraticFinish::RmsNorm { .. }) => {
            if let Some(out) = out {
                unnormalize(d_row, out, dot(d_row, out) / T::from_f64(out.len() as f64), statistic);
            }
            T::ZERO
        }
    }
}

/// dT = (dO − O·mean(O ⊙ dO))/r
pub fn unnormalize<T: Real>(d_row: &mut [T], out: &[T], mean: T, divisor: T) {
    for (d, &o) in d_row.iter_mut().zip(out) {
        *d = if divisor == T::ZERO { T::ZERO } else { (*d - o * mean) / divisor };
    }
}

/// 1/x, or 0 for 0.
pub fn inverse<T: Real>(x: T) -> T {
    if x == T::ZERO { T::ZERO } else { T::ONE / x }
}

/// ⟨a, b⟩, in 16 partial sums that the compiler can keep in vectors.
pub fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::ZERO; 16];
    let (a, b) = (a.chunks(16), b.chunks(16));
    for (a, b) in a.zip(b) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.into_iter().sum()
}
