//! The gradient of the log-decay: dg_t = Σ_{s ≥ t} (⟨q_s, dq_s⟩ − ⟨k_s, dk_s⟩).
//!
//! Pairs inside a tile are left out of both products and added up by themselves: taken away again they would drown the
//! others where decay is strong. So are those of keys of the last tile with the last state, if it has a gradient.

use std::ops::Range;

use super::super::rows::Number;
use super::Context;
use super::state::{State, panel_index};
use super::sweeps::Sweep;

/// Adds ±⟨φ, dφ⟩ of a tile's rows, as far as it comes from or goes to other tiles, to the differences of their keys.
pub fn add_rows<T: Number>(
    sweep: &Sweep<'_, T>,
    tile: &Range<usize>,
    [phi, d_phi]: [&[T]; 2],
    sign: f64,
    d_log: &mut [f64],
) {
    let width = sweep.context.features.padded;
    for (r, d_log) in rows_with_key(sweep, tile, d_log) {
        *d_log += sign * product([phi, d_phi], r, width);
    }
}

/// ⟨φ, dφ⟩ of a row. It enters the sums of all earlier rows, and would leave its rounding in each.
fn product<T: Number>(rows: [&[T]; 2], r: usize, width: usize) -> f64 {
    let [(phi, phi_rest), (d_phi, d_phi_rest)] = rows.map(|rows| rows[r * width..(r + 1) * width].as_chunks::<8>());
    let mut sums = [0.0; 8];
    let mut add = |i: usize, x: T, d: T| sums[i] += x.to_f64() * d.to_f64();
    for (x, d) in phi.iter().zip(d_phi) {
        (0..8).for_each(|i| add(i, x[i], d[i]));
    }
    for (i, (&x, &d)) in phi_rest.iter().zip(d_phi_rest).enumerate() {
        add(i, x, d);
    }
    sums.iter().sum()
}

/// Adds to each row t of the last tile what the rows j < t give to the state after it, which has a gradient: ⟨φ(k_j), dφ(k_j)⟩.
pub fn add_last<T: Number>(context: &Context<'_, T>, rows: usize, [phi, d_phi]: [&[T]; 2], last: &mut [f64]) {
    let mut before = 0.0;
    for (r, last) in last[..rows].iter_mut().enumerate() {
        *last += before;
        before += product([phi, d_phi], r, context.features.padded);
    }
}

/// Adds to each row t what the pairs i ≥ t > j of a tile give to dg_t, without taking any of it away again.
pub fn add_pairs<T: Number>(rows: usize, width: usize, scores: &[T], d_weights: &[T], crossing: &mut [f64]) {
    for i in 1..rows {
        let row = i * width..i * width + i;
        let mut before = 0.0;
        for (j, (&score, &d_weight)) in scores[row.clone()].iter().zip(&d_weights[row]).enumerate() {
            before += score.to_f64() * d_weight.to_f64();
            crossing[j + 1] += before;
        }
    }
}

/// The rows of a tile whose position has a key, with its entry among those of the sweep.
fn rows_with_key<'d, T: Number>(
    sweep: &Sweep<'_, T>,
    tile: &Range<usize>,
    d_log: &'d mut [f64],
) -> impl Iterator<Item = (usize, &'d mut f64)> {
    let context = sweep.context;
    let (keys, span) = (context.keys(tile), context.keys(&sweep.span));
    let first = (keys.start + context.first_key()).saturating_sub(tile.start).min(tile.len());
    (first..).zip(&mut d_log[keys.start - span.start..keys.end - span.start])
}

/// ⟨S, R⟩ + ⟨z, r⟩ at the end of a segment, S transposed: what passes from its keys and earlier ones to queries behind it.
pub fn across<T: Number>(context: &Context<'_, T>, later: Option<&State<T>>, end: Option<&State<T>>) -> f64 {
    let (Some(end), Some(later)) = (end, later) else { return 0.0 };
    let (count, value_width) = (context.features.count, context.shapes().value_width);
    let mut sum: f64 = end.z.iter().zip(later.z.iter()).map(|(z, r)| z.to_f64() * r.to_f64()).sum();
    for f in 0..count {
        for c in 0..value_width {
            let s = end.s[panel_index(context, value_width, (c, f))];
            sum += s.to_f64() * later.s[panel_index(context, count, (f, c))].to_f64();
        }
    }
    sum
}

/// Turns the differences of a tile's keys into their sums from each to the last, of which `sum` is that of later tiles, and
/// adds what crosses each inside the tile: exactly 0 where nothing passes, and for a key that is not there.
pub fn sum<T: Number>(sweep: &Sweep<'_, T>, tile: &Range<usize>, crossing: &[f64], sum: &mut f64, d_log: &mut [f64]) {
    let (context, at) = (sweep.context, sweep.at);
    let keys = context.keys(tile);
    let rows: Vec<_> = rows_with_key(sweep, tile, d_log).collect();
    for ((r, d_log), key) in rows.into_iter().zip(keys).rev() {
        let passes = T::from_f64(context.log_decay(at.batch, at.head, key).exp()) != T::ZERO;
        *sum = if passes { *sum + *d_log } else { 0.0 };
        *d_log = if passes && context.keeps(at.batch, key) { *sum + crossing[r] } else { 0.0 };
    }
}
