//! φ of any number of elements, for what is computed between passes of the engine.

use rayon::prelude::*;

use super::simd::{Isa, Real};
use super::tile::Verbs;
use crate::linear::FeatureMap;

/// Elements that a thread takes at once; whole vectors.
const PIECE: usize = 1 << 14;

/// Elements of the longest vector.
const LANES: usize = 64;

/// f32 or f64.
pub(crate) trait Element: Real {
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
        let mut tail = [T::ZERO; LANES];
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
        let mut tail = [T::ZERO; LANES];
        let [d, x_tail, phi_tail] = [d_phi, x, phi].map(|values| filled(&values[whole..]));
        verbs.map_gradient(&mut tail, &d, &x_tail, &phi_tail, map);
        d_x[whole..].copy_from_slice(&tail[..x.len() - whole]);
    });
    d_x
}

/// How many of `len` elements are in whole vectors.
fn whole_vectors<T: Real>(verbs: &Verbs<T>, len: usize) -> usize {
    if verbs.padded(len) == len { len } else { verbs.padded(len) - verbs.padded(1) }
}

/// The last elements, filled up with zeros.
fn filled<T: Real>(values: &[T]) -> [T; LANES] {
    let mut all = [T::ZERO; LANES];
    all[..values.len()].copy_from_slice(values);
    all
}
