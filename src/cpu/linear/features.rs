//! φ on tiles of rows, and its derivative.

use super::super::buffer::Buffer;
use super::super::finish::{dot, inverse};
use super::super::rows::Rows;
use super::super::simd::Real;
use super::super::tile::{Band, Left, Online, Product, Verbs};
use super::TILE;
use crate::linear::FeatureMap;
use crate::performer::FavorMap;
use crate::problem::Map;

/// A feature map with its random directions.
pub struct Features<T: 'static> {
    map: Map,
    verbs: &'static Verbs<T>,
    /// D
    width: usize,
    /// D'
    pub count: usize,
    /// D' rounded up to whole vectors; tiles of features have rows of this length, filled up with zeros.
    pub padded: usize,
    /// ω·D^{-1/4}, rows padded to whole vectors.
    omega: Buffer<T>,
    /// The panels of its transpose.
    omega_panels: Buffer<T>,
}

impl<T: Real> Features<T> {
    /// `omega` is [m, D] for FAVOR+ maps and empty for others.
    pub fn new(map: Map, width: usize, omega: Vec<T>, verbs: &'static Verbs<T>) -> Self {
        let (padded, directions) = (verbs.padded(width), omega.len() / width);
        let factor = T::from_f64((width as f64).powf(-0.25));
        let mut rows = Buffer::zeros(directions * padded);
        for (to, from) in rows.chunks_exact_mut(padded).zip(omega.chunks_exact(width)) {
            for (to, &x) in to.iter_mut().zip(from) {
                *to = x * factor;
            }
        }
        let mut omega_panels = Buffer::zeros(verbs.panels_len(directions, width));
        verbs.transpose(&mut omega_panels, &rows, padded, directions, width);
        let count = map.feature_width(width);
        Self { map, verbs, width, count, padded: verbs.padded(count), omega: rows, omega_panels }
    }

    /// φ of the first `rows` rows of x. `shifts` receives, for exponential FAVOR+ maps, each row's largest exponent, and `stabilize`
    /// replaces these by the stabilisers to use.
    pub fn apply(&self, x: Rows<'_, T>, rows: usize, phi: &mut [T], stabilize: impl FnOnce(&mut [T])) {
        match self.map {
            Map::Plain(FeatureMap::Softmax) => self.softmax(x, rows, phi),
            Map::Plain(FeatureMap::Taylor) => self.each_row(x, phi, taylor),
            Map::Plain(FeatureMap::Cosine) => self.each_row(x, phi, cosine),
            Map::Plain(map) => {
                for (row, x) in x.pieces(rows, self.padded) {
                    self.verbs.map(&mut phi[row * self.padded..][..x.len()], x, map);
                }
                self.clear_padding(phi, T::ZERO);
            }
            Map::Favor { map: FavorMap::Relu, directions } => {
                self.project(x, phi, directions);
                let factor = T::from_f64((directions as f64).powf(-0.5));
                for p in phi.iter_mut() {
                    *p = p.larger(T::ZERO) * factor + T::from_f64(FavorMap::RELU_OFFSET);
                }
                self.clear_padding(phi, T::ZERO);
            }
            Map::Favor { directions, .. } => self.exponential(x, phi, directions, stabilize),
        }
    }

    fn each_row(&self, x: Rows<'_, T>, phi: &mut [T], f: impl Fn(&[T], &mut [T])) {
        for (r, phi) in phi.chunks_exact_mut(self.padded).enumerate() {
            f(x.row(r, self.width), &mut phi[..self.count]);
        }
        self.clear_padding(phi, T::ZERO);
    }

    fn clear_padding(&self, phi: &mut [T], value: T) {
        if self.count < self.padded {
            phi.chunks_exact_mut(self.padded).for_each(|row| row[self.count..].fill(value));
        }
    }

    fn softmax(&self, x: Rows<'_, T>, rows: usize, phi: &mut [T]) {
        for (r, phi) in phi.chunks_exact_mut(self.padded).enumerate() {
            phi.copy_from_slice(x.row(r, self.padded));
        }
        let (mut maximum, mut sum, mut rescale) = ([T::NEG_INFINITY; TILE], [T::ZERO; TILE], [T::ONE; TILE]);
        let mut online = Online { maximum: &mut maximum, sum: &mut sum, rescale: &mut rescale };
        self.verbs.softmax(phi, self.padded, &[(0, self.count); TILE][..rows], T::ONE, &mut online);
        for (row, &sum) in phi.chunks_exact_mut(self.padded).zip(&sum) {
            row.iter_mut().for_each(|p| *p = *p * inverse(sum));
        }
    }

    /// ωx̃ into the first m numbers of each row.
    fn project(&self, x: Rows<'_, T>, phi: &mut [T], directions: usize) {
        let rows = phi.len() / self.padded;
        let n = self.verbs.padded(directions);
        let size = Product { m: rows, n, k: self.width, accumulate: false, band: Band::Full };
        let left = Left::rows(x.data, x.row);
        self.verbs.multiply(phi, self.padded, left, self.verbs.panels(&self.omega_panels, self.width), size);
    }

    fn exponential(&self, x: Rows<'_, T>, phi: &mut [T], directions: usize, stabilize: impl FnOnce(&mut [T])) {
        self.project(x, phi, directions);
        if self.count > directions {
            for row in phi.chunks_exact_mut(self.padded) {
                let (positive, negative) = row.split_at_mut(directions);
                for (n, &p) in negative.iter_mut().zip(&*positive) {
                    *n = -p;
                }
            }
        }
        self.clear_padding(phi, T::NEG_INFINITY);
        let rows = phi.len() / self.padded;
        let (mut norms, mut shifts) = ([T::ZERO; TILE], [T::ZERO; TILE]);
        let (norms, shifts) = (&mut norms[..rows], &mut shifts[..rows]);
        self.verbs.row_maxima(phi, self.padded, shifts);
        let (mut maxima, mut own) = ([T::ZERO; TILE], [T::ZERO; TILE]);
        maxima[..rows].copy_from_slice(shifts);
        let half = T::from_f64(0.5 / (self.width as f64).sqrt());
        let x_padded = self.verbs.padded(self.width);
        for (r, (norm, shift)) in norms.iter_mut().zip(shifts.iter_mut()).enumerate() {
            let x = x.row(r, x_padded);
            self.verbs.row_products(x, x_padded, x, std::slice::from_mut(norm));
            *norm = *norm * half;
            *shift = *shift - *norm;
            if *shift == T::NEG_INFINITY {
                *shift = T::LOWEST;
            }
        }
        own[..rows].copy_from_slice(shifts);
        stabilize(shifts);
        for (r, (shift, &norm)) in shifts.iter_mut().zip(&*norms).enumerate() {
            // A large norm would take the maximum's digits along, one that overflows everything.
            *shift = if *shift == own[r] { maxima[r] } else { *shift + norm };
        }
        self.verbs.exp_rows(phi, self.padded, shifts, T::from_f64((self.count as f64).powf(-0.5)));
    }

    /// dx of rows, from x, φ(x) and dφ, which is used up. `d_x` is overwritten.
    pub fn gradient(&self, x: Rows<'_, T>, phi: &[T], d_phi: &mut [T], d_x: &mut [T]) {
        match self.map {
            Map::Plain(FeatureMap::Softmax) => self.each_gradient(x, phi, d_phi, d_x, softmax_gradient),
            Map::Plain(FeatureMap::Taylor) => self.each_gradient(x, phi, d_phi, d_x, taylor_gradient),
            Map::Plain(FeatureMap::Cosine) => self.each_gradient(x, phi, d_phi, d_x, cosine_gradient),
            Map::Plain(map) => {
                for (row, x) in x.pieces(phi.len() / self.padded, self.padded) {
                    let part = row * self.padded..row * self.padded + x.len();
                    self.verbs.map_gradient(&mut d_x[part.clone()], &d_phi[part.clone()], x, &phi[part], map);
                }
            }
            Map::Favor { map, directions } => self.favor_gradient(x, phi, d_phi, d_x, map, directions),
        }
    }

    fn each_gradient(
        &self,
        x: Rows<'_, T>,
        phi: &[T],
        d_phi: &[T],
        d_x: &mut [T],
        gradient: impl Fn(&[T], &[T], &[T], &mut [T]),
    ) {
        let padded = self.verbs.padded(self.width);
        let features = phi.chunks_exact(self.padded).zip(d_phi.chunks_exact(self.padded));
        for ((r, d_x), (phi, d_phi)) in d_x.chunks_exact_mut(padded).enumerate().zip(features) {
            gradient(x.row(r, self.width), &phi[..self.count], &d_phi[..self.count], &mut d_x[..self.width]);
        }
    }

    fn favor_gradient(
        &self,
        x: Rows<'_, T>,
        phi: &[T],
        d_phi: &mut [T],
        d_x: &mut [T],
        map: FavorMap,
        directions: usize,
    ) {
        let padded = self.verbs.padded(self.width);
        let rows = phi.len() / self.padded;
        let mut sums = [T::ZERO; TILE];
        if map == FavorMap::Relu {
            let (offset, factor) = (T::from_f64(FavorMap::RELU_OFFSET), T::from_f64((directions as f64).powf(-0.5)));
            for (d, &p) in d_phi.iter_mut().zip(phi) {
                *d = if p > offset { *d * factor } else { T::ZERO };
            }
        } else {
            self.verbs.row_pair_products(d_phi, phi, self.padded, &mut sums);
            self.verbs.multiply_elements(d_phi, phi);
        }
        if map == FavorMap::Hyperbolic {
            for row in d_phi.chunks_exact_mut(self.padded) {
                let (positive, negative) = row.split_at_mut(directions);
                positive.iter_mut().zip(&*negative).for_each(|(p, &n)| *p = *p - n);
            }
        }
        let size = Product { m: rows, n: padded, k: directions, accumulate: false, band: Band::Full };
        let right = self.verbs.rows(&self.omega, padded);
        self.verbs.multiply(d_x, padded, Left::rows(d_phi, self.padded), right, size);
        let factor = T::from_f64(-1.0 / (self.width as f64).sqrt());
        sums.iter_mut().for_each(|sum| *sum = *sum * factor);
        for (row, x) in x.pieces(rows, padded) {
            let count = x.len() / padded;
            self.verbs.add_scaled(&mut d_x[row * padded..][..x.len()], x, padded, &sums[row..row + count]);
        }
    }
}

fn taylor<T: Real>(x: &[T], phi: &mut [T]) {
    let d = x.len();
    let factor = T::from_f64(std::f64::consts::FRAC_1_SQRT_2);
    phi[0] = T::ONE;
    phi[1..=d].copy_from_slice(x);
    for (products, &a) in phi[1 + d..].chunks_exact_mut(d).zip(x) {
        for (product, &b) in products.iter_mut().zip(x) {
            *product = a * factor * b;
        }
    }
}

fn taylor_gradient<T: Real>(x: &[T], _phi: &[T], d_phi: &[T], d_x: &mut [T]) {
    let d = x.len();
    let factor = T::from_f64(std::f64::consts::FRAC_1_SQRT_2);
    let squares = &d_phi[1 + d..];
    for i in 0..d {
        let pairs: T = (0..d).map(|j| (squares[i * d + j] + squares[j * d + i]) * x[j]).sum();
        d_x[i] = d_phi[1 + i] + factor * pairs;
    }
}

/// max |x| and ‖x‖ over it: neither overflows or vanishes where x does not. ‖0‖ counts as 1.
fn norms<T: Real>(x: &[T]) -> (T, T) {
    let largest = x.iter().fold(T::ZERO, |largest, &x| largest.larger(x).larger(-x));
    if largest == T::ZERO {
        return (T::ONE, T::ONE);
    }
    let square = |&x: &T| {
        let x = x / largest;
        x * x
    };
    (largest, x.iter().map(square).sum::<T>().sqrt())
}

fn cosine<T: Real>(x: &[T], phi: &mut [T]) {
    let (largest, norm) = norms(x);
    phi[0] = T::ONE;
    for (p, &x) in phi[1..].iter_mut().zip(x) {
        *p = x / largest / norm;
    }
}

fn cosine_gradient<T: Real>(x: &[T], phi: &[T], d_phi: &[T], d_x: &mut [T]) {
    let (unit, d_unit) = (&phi[1..], &d_phi[1..]);
    let ((largest, norm), along) = (norms(x), dot(unit, d_unit));
    let is_zero = unit.iter().all(|&u| u == T::ZERO);
    for ((d_x, &u), &d) in d_x.iter_mut().zip(unit).zip(d_unit) {
        *d_x = if is_zero { T::ZERO } else { (d - u * along) / norm / largest };
    }
}

fn softmax_gradient<T: Real>(_x: &[T], phi: &[T], d_phi: &[T], d_x: &mut [T]) {
    let mean = dot(phi, d_phi);
    for ((d_x, &p), &d) in d_x.iter_mut().zip(phi).zip(d_phi) {
        *d_x = p * (d - mean);
    }
}
