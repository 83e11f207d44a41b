//! Functions of any number of elements, for what stands around the engines: φ, activations, the loss.

use rayon::prelude::*;

use super::rows::Number;
use super::simd::{Isa, MOST_LANES, Real};
use super::tile::Verbs;
use crate::activation::Activation;
use crate::linear::FeatureMap;

/// Elements that a thread takes at once; whole vectors.
const PIECE: usize = 1 << 14;

/// f32 or f64.
pub(crate) trait Element: Number {
    fn verbs() -> &'static Verbs<Self>;
}

impl Element for f32 {
    fn verbs() -> &'static Verbs<f32> {
        Verbs::<f32>::get(Isa::current())
    }
}

impl Element for f64 {
    fn verbs() -> &'static Verbs<f64> {
        Verbs::<f64>::get(Isa::current())
    }
}

/// φ(x) for a map of elements on their own.
pub(crate) fn map<T: Element>(x: &[T], map: FeatureMap) -> Vec<T> {
    let (verbs, mut phi) = (T::verbs(), vec![T::ZERO; x.len()]);
    phi.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(phi, x)| {
        verbs.map(phi, x, map);
        let whole = whole_vectors(verbs, x.len());
        let mut tail = [T::ZERO; MOST_LANES];
        verbs.map(&mut tail, &filled(&x[whole..]), map);
        phi[whole..].copy_from_slice(&tail[..x.len() - whole]);
    });
    phi
}

/// dφ ⊙ φ′(x)
pub(crate) fn map_gradient<T: Element>(d_phi: &[T], x: &[T], phi: &[T], map: FeatureMap) -> Vec<T> {
    let (verbs, mut d_x) = (T::verbs(), vec![T::ZERO; x.len()]);
    let inputs = d_phi.par_chunks(PIECE).zip(x.par_chunks(PIECE)).zip(phi.par_chunks(PIECE));
    d_x.par_chunks_mut(PIECE).zip(inputs).for_each(|(d_x, ((d_phi, x), phi))| {
        verbs.map_gradient(d_x, d_phi, x, phi, map);
        let whole = whole_vectors(verbs, x.len());
        let mut tail = [T::ZERO; MOST_LANES];
        let [d, x_tail, phi_tail] = [d_phi, x, phi].map(|values| filled(&values[whole..]));
        verbs.map_gradient(&mut tail, &d, &x_tail, &phi_tail, map);
        d_x[whole..].copy_from_slice(&tail[..x.len() - whole]);
    });
    d_x
}

/// a(x), or a(x) ⊙ gated.
pub(crate) fn activate<T: Element>(x: &[T], gated: Option<&[T]>, activation: Activation) -> Vec<T> {
    let (verbs, mut y) = (T::verbs(), vec![T::ZERO; x.len()]);
    y.par_chunks_mut(PIECE).enumerate().for_each(|(piece, y)| {
        let at = piece * PIECE..piece * PIECE + y.len();
        verbs.activate(y, &x[at.clone()], gated.map(|gated| &gated[at]), activation);
    });
    y
}

/// dx = dy ⊙ a′(x).
pub(crate) fn activate_gradient<T: Element>(d_y: &[T], x: &[T], activation: Activation) -> Vec<T> {
    let (verbs, mut d_x) = (T::verbs(), vec![T::ZERO; x.len()]);
    d_x.par_chunks_mut(PIECE).zip(d_y.par_chunks(PIECE)).zip(x.par_chunks(PIECE)).for_each(|((d_x, d_y), x)| {
        verbs.activate_gradient(d_x, d_y, x, None, activation);
    });
    d_x
}

/// dx = dy ⊙ gated ⊙ a′(x), then d_gated = dy ⊙ a(x).
pub(crate) fn gate_gradient<T: Element>(d_y: &[T], x: &[T], gated: &[T], activation: Activation) -> Vec<T> {
    let (verbs, mut both) = (T::verbs(), vec![T::ZERO; 2 * x.len()]);
    let (d_x, d_gated) = both.split_at_mut(x.len());
    let inputs = d_y.par_chunks(PIECE).zip(x.par_chunks(PIECE)).zip(gated.par_chunks(PIECE));
    let outputs = d_x.par_chunks_mut(PIECE).zip(d_gated.par_chunks_mut(PIECE));
    outputs.zip(inputs).for_each(|((d_x, d_gated), ((d_y, x), gated))| {
        verbs.activate_gradient(d_x, d_y, x, Some((gated, d_gated)), activation);
    });
    both
}

/// ln Σ exp(x) of rows of `width`.
pub(crate) fn log_sum_exp<T: Element>(rows: &[T], width: usize) -> Vec<T> {
    let verbs = T::verbs();
    rows.par_chunks(width.max(1)).with_min_len(PIECE.div_ceil(width.max(1))).map(|row| verbs.log_sum_exp(row)).collect()
}

/// factor·(exp(x − shift) − [column = target]) of rows of `width`, with a shift each; 0 for rows without a target.
pub(crate) fn loss_gradient<T: Element>(
    rows: &[T],
    width: usize,
    shifts: &[T],
    targets: &[Option<usize>],
    factor: T,
) -> Vec<T> {
    let (verbs, mut gradient) = (T::verbs(), vec![T::ZERO; rows.len()]);
    let inputs = rows.par_chunks(width.max(1)).zip(shifts).zip(targets);
    let outputs = gradient.par_chunks_mut(width.max(1)).with_min_len(PIECE.div_ceil(width.max(1)));
    outputs.zip(inputs).for_each(|(into, ((row, &shift), target))| {
        if let Some(target) = *target {
            verbs.scaled_exp(into, row, shift, factor);
            into[target] = into[target] - factor;
        }
    });
    gradient
}

/// How many of `len` elements are in whole vectors.
fn whole_vectors<T: Real>(verbs: &Verbs<T>, len: usize) -> usize {
    if verbs.padded(len) == len { len } else { verbs.padded(len) - verbs.padded(1) }
}

/// The last elements, filled up with zeros.
fn filled<T: Real>(values: &[T]) -> [T; MOST_LANES] {
    let mut all = [T::ZERO; MOST_LANES];
    all[..values.len()].copy_from_slice(values);
    all
}
