//! Random directions ω `[m, D]` for the FAVOR+ features of Performer attention (Choromanski et al. 2020,
//! "Rethinking Attention with Performers").
//!
//! With ω_i ~ N(0, I), E exp(ω·(x + y)) = exp(‖x + y‖²/2), so the positive features
//! φ(x) = m^{-1/2} exp(ω_i·x − ‖x‖²/2) estimate SM(x, y) = exp(x·y) without bias (x and y are query and key, each
//! divided by D^{1/4}):
//!
//! ```text
//! E ⟨φ(x), φ(y)⟩ = SM(x, y)
//! MSE_iid        = (1/m) e^{‖x+y‖²} SM² (1 − e^{−‖x+y‖²})
//! MSE_pairs      = (1 − e^{−‖x+y‖²}) MSE_iid               m rows, that is m/2 pairs
//! MSE_orthogonal ≤ MSE_iid
//! ```
//!
//! The numbers are a function of the arguments alone, on every platform and in every build: ChaCha8 keyed with the
//! seed (8 bytes little-endian, then zeros), 52-bit uniforms, normals by the polar method of Marsaglia with the
//! logarithm of the pure-Rust `libm`, and sums in a fixed order without fused multiply-adds. (Other roundings in a
//! future `libm` would change last bits; a test compares stored values.)

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::{Error, Result};

/// How the rows of ω depend on each other. Each row by itself is a standard normal vector in every kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "candle", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum FeatureKind {
    /// Independent rows.
    Iid,
    /// Orthogonal random features (Yu et al. 2016): within each block of D rows (the last may be shorter) the
    /// directions are the rows of a uniformly distributed orthogonal matrix, and the lengths are independent χ_D.
    ///
    /// Row i of a block is ω_i = ‖g_i‖ u_i, with g the `Iid` rows of the same seed and
    ///
    /// ```text
    /// r_i = g_i − Σ_{j<i} (g_i·u_j) u_j        u_i = r_i / ‖r_i‖
    /// ```
    ///
    /// This is the QR decomposition with a positive diagonal of R, the one whose Q is uniform. The signs that
    /// Householder QR leaves on that diagonal depend on g: Q is then not uniform, and the kernel estimate is biased
    /// (measured −8 % to +5 % at D = 8, by the vectors). ‖g_i‖ is independent of all directions and of itself χ_D,
    /// so the lengths need no further draw.
    Orthogonal,
    /// Antithetic rows [g; −g], with g the m/2 `Iid` rows of the same seed; m is even.
    ///
    /// Positive features of these rows are the hyperbolic features of g: `FavorMap::Positive` with m rows of this
    /// kind equals `FavorMap::Hyperbolic` with m/2 rows of `Iid`, entry by entry. For pairs of orthogonal
    /// directions, give `Orthogonal` rows to `FavorMap::Hyperbolic`.
    HyperbolicPairs,
}

/// The direction matrix ω, row-major `[directions, width]`, m = `directions` and D = `width`, the width of a head.
///
/// For `Iid` and `Orthogonal` the first rows do not depend on how many follow. Directions are meant to be drawn once
/// (or redrawn now and then with another seed) and shared by queries and keys.
///
/// # Errors
///
/// [`Error::Value`] when `directions` or `width` is 0, when `directions` is odd for pairs, and when the matrix
/// does not fit in memory.
pub fn random_features(kind: FeatureKind, directions: usize, width: usize, seed: u64) -> Result<Vec<f64>> {
    let refuse = |argument, got: String, needs: &str| {
        Err(Error::Value { function: "random_features", argument, got, needs: needs.into() })
    };
    if directions == 0 {
        return refuse("directions", "0".into(), "at least 1");
    }
    if width == 0 {
        return refuse("width", "0".into(), "at least 1");
    }
    if kind == FeatureKind::HyperbolicPairs && directions % 2 == 1 {
        return refuse("directions", directions.to_string(), "an even number for hyperbolic pairs");
    }
    let mut rows = Vec::new();
    let count = directions.checked_mul(width).filter(|&count| rows.try_reserve_exact(count).is_ok());
    let Some(count) = count else {
        return refuse("directions", format!("{directions} of width {width}"), "a matrix that fits in memory");
    };
    let normals = Normals::new(seed);
    match kind {
        FeatureKind::Iid => rows.extend(normals.take(count)),
        FeatureKind::Orthogonal => {
            rows.extend(normals.take(count));
            rows.chunks_mut(width.saturating_mul(width)).for_each(|block| orthogonalize(block, width));
        }
        FeatureKind::HyperbolicPairs => {
            rows.extend(normals.take(count / 2));
            rows.extend_from_within(..);
            rows[count / 2..].iter_mut().for_each(|entry| *entry = -*entry);
        }
    }
    Ok(rows)
}

/// An endless sequence of independent standard normals.
struct Normals {
    uniform: ChaCha8Rng,
    spare: Option<f64>,
}

impl Normals {
    fn new(seed: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Self { uniform: ChaCha8Rng::from_seed(key), spare: None }
    }

    /// Uniform over the odd multiples of 2^−52 in (−1, 1): symmetric, never 0.
    fn signed_uniform(&mut self) -> f64 {
        ((self.uniform.next_u64() as i64 >> 12) as f64 + 0.5) / (1_u64 << 51) as f64
    }
}

impl Iterator for Normals {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        if let Some(normal) = self.spare.take() {
            return Some(normal);
        }
        loop {
            let (x, y) = (self.signed_uniform(), self.signed_uniform());
            let square = x * x + y * y;
            if square < 1.0 {
                let scale = (-2.0 * libm::log(square) / square).sqrt();
                self.spare = Some(scale * y);
                return Some(scale * x);
            }
        }
    }
}

/// Makes the rows of a block (at most `width` of them) orthogonal and keeps their lengths. Gram-Schmidt, twice:
/// the second pass removes what the rounding of the first left, up to one rounding.
fn orthogonalize(block: &mut [f64], width: usize) {
    let lengths: Vec<f64> = block.chunks_exact(width).map(|row| dot(row, row).sqrt()).collect();
    for index in 0..lengths.len() {
        let (units, rest) = block.split_at_mut(index * width);
        let row = &mut rest[..width];
        for unit in units.chunks_exact(width).chain(units.chunks_exact(width)) {
            let along = dot(row, unit);
            row.iter_mut().zip(unit).for_each(|(entry, unit)| *entry -= along * unit);
        }
        let residual = dot(row, row).sqrt();
        row.iter_mut().for_each(|entry| *entry /= residual);
    }
    for (row, length) in block.chunks_exact_mut(width).zip(lengths) {
        row.iter_mut().for_each(|entry| *entry *= length);
    }
}

/// ⟨a, b⟩ by eight partial sums, an order that the compiler can vectorise and may not change.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest = a_rest.iter().zip(b_rest).fold(0.0, |total, (a, b)| total + a * b);
    sums.iter().fold(rest, |total, sum| total + sum)
}

#[cfg(test)]
mod tests {
    use super::FeatureKind::{HyperbolicPairs, Iid, Orthogonal};
    use super::*;
    use approx::{assert_abs_diff_eq, assert_relative_eq};

    /// A mean and its standard error, from independent samples.
    struct Mean {
        value: f64,
        error: f64,
    }

    impl Mean {
        fn of(samples: &[f64]) -> Self {
            let count = samples.len() as f64;
            let value = samples.iter().sum::<f64>() / count;
            let variance = samples.iter().map(|sample| (sample - value).powi(2)).sum::<f64>() / (count - 1.0);
            Self { value, error: (variance / count).sqrt() }
        }

        /// Fails more than 4 standard errors from `expected`, or when the samples could not tell `resolution` from it.
        fn check(&self, expected: f64, resolution: f64, what: &str) {
            let deviations = (self.value - expected) / self.error;
            assert!(deviations.abs() < 4.0, "{what}: {} is {deviations:+.1} errors from {expected}", self.value);
            assert!(4.0 * self.error < resolution * expected, "{what}: error {} of {expected}", self.error);
        }
    }

    /// A change here changes ω of every seed that users have noted down. The values are those of a separate program
    /// written from the module's description, with the operations in the same order.
    #[test]
    fn golden_values() {
        let golden = [
            (Iid, [0.20522208661210123, -0.41446825828609835, 0.15182579514367747, 0.3349510751585815]),
            (Orthogonal, [0.20522208661210123, -0.41446825828609835, 0.5429981322691888, -0.014205564493108802]),
            (HyperbolicPairs, [0.20522208661210123, -0.41446825828609835, 0.6242434966815236, 0.3051491304483484]),
        ];
        for (kind, expected) in golden {
            let omega = random_features(kind, 26, 11, 0xfeed_0123_4567_89ab).unwrap();
            assert_eq!(omega.len(), 26 * 11);
            // The first entries, the end of the second block and the end of the third, which is short.
            let values = [0, 1, 22 * 11 - 1, 26 * 11 - 1].map(|index| omega[index].to_bits());
            assert_eq!(values, expected.map(f64::to_bits), "{kind:?}");
        }
    }

    #[test]
    fn entries_are_standard_normal() {
        let normals = random_features(Iid, 1000, 300, 7).unwrap();
        let count = normals.len() as f64;
        // (power, its mean, its variance) under N(0, 1)
        for (power, mean, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0_f64)] {
            let moment = normals.iter().map(|normal| normal.powi(power)).sum::<f64>() / count;
            assert_abs_diff_eq!(moment, mean, epsilon = 4.0 * (variance / count).sqrt());
        }
        let lagged = normals.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / count;
        assert_abs_diff_eq!(lagged, 0.0, epsilon = 4.0 / count.sqrt());
        assert_ne!(normals, random_features(Iid, 1000, 300, 8).unwrap());
    }

    #[test]
    fn orthogonal_blocks_keep_the_lengths() {
        for (directions, width) in [(1, 1), (5, 1), (7, 3), (150, 64), (300, 129)] {
            let orthogonal = random_features(Orthogonal, directions, width, 3).unwrap();
            let independent = random_features(Iid, directions, width, 3).unwrap();
            for (row, normal) in orthogonal.chunks(width).zip(independent.chunks(width)) {
                assert_relative_eq!(dot(row, row), dot(normal, normal), max_relative = 1e-13);
            }
            for block in orthogonal.chunks(width * width) {
                let rows: Vec<_> = block.chunks(width).map(|row| (row, dot(row, row).sqrt())).collect();
                for (index, (row, length)) in rows.iter().enumerate() {
                    for (other, other_length) in &rows[..index] {
                        assert_abs_diff_eq!(dot(row, other) / (length * other_length), 0.0, epsilon = 1e-14);
                    }
                }
            }
        }
        let squares: Vec<f64> =
            random_features(Orthogonal, 6400, 64, 5).unwrap().chunks(64).map(|row| dot(row, row)).collect();
        Mean::of(&squares).check(64.0, 0.01, "mean square of χ_64");
    }

    #[test]
    fn first_rows_do_not_depend_on_the_count() {
        for kind in [Iid, Orthogonal] {
            let long = random_features(kind, 20, 6, 11).unwrap();
            assert_eq!(random_features(kind, 9, 6, 11).unwrap(), long[..9 * 6], "{kind:?}");
        }
    }

    #[test]
    fn pairs_are_the_independent_rows_and_their_negatives() {
        let pairs = random_features(HyperbolicPairs, 10, 3, 2).unwrap();
        let (plus, minus) = pairs.split_at(5 * 3);
        assert_eq!(plus, random_features(Iid, 5, 3, 2).unwrap());
        assert!(plus.iter().zip(minus).all(|(plus, minus)| *plus == -minus));
    }

    /// The equations at the head of this file, at four fixed pairs of vectors; D is small, so that signs left on R
    /// would show (they shift the mean by −5 % at the first pair).
    #[test]
    fn estimator_follows_its_laws() {
        const WIDTH: usize = 8;
        const ROWS: usize = 16;
        const SEEDS: u64 = 40_000;
        // ⟨φ(x), φ(y)⟩ of the positive features.
        let estimate = |omega: &[f64], x: &[f64], y: &[f64]| {
            let feature = |direction, vector| (dot(direction, vector) - dot(vector, vector) / 2.0).exp();
            omega.chunks(WIDTH).map(|direction| feature(direction, x) * feature(direction, y)).sum::<f64>()
                / ROWS as f64
        };
        let mut vectors = random_features(Iid, 8, WIDTH, 1 << 40).unwrap();
        vectors.iter_mut().for_each(|entry| *entry *= 0.2);
        for kind in [Iid, Orthogonal, HyperbolicPairs] {
            let omegas: Vec<_> = (0..SEEDS).map(|seed| random_features(kind, ROWS, WIDTH, seed).unwrap()).collect();
            for pair in vectors.chunks(2 * WIDTH) {
                let (x, y) = pair.split_at(WIDTH);
                let kernel = dot(x, y).exp();
                let square = dot(x, x) + 2.0 * dot(x, y) + dot(y, y);
                let what = format!("{kind:?}, ‖x+y‖² = {square:.3}");
                let estimates: Vec<_> = omegas.iter().map(|omega| estimate(omega, x, y)).collect();
                Mean::of(&estimates).check(kernel, 0.015, &format!("{what}, mean"));
                let errors: Vec<_> = estimates.iter().map(|estimate| (estimate - kernel).powi(2)).collect();
                let error = Mean::of(&errors);
                let independent = square.exp() * kernel.powi(2) * (1.0 - (-square).exp()) / ROWS as f64;
                match kind {
                    Iid => error.check(independent, 0.15, &what),
                    HyperbolicPairs => error.check(independent * (1.0 - (-square).exp()), 0.15, &what),
                    Orthogonal => assert!(error.value + 4.0 * error.error < independent, "{what}: {}", error.value),
                }
            }
        }
    }

    #[test]
    fn refusals_name_the_argument() {
        let (huge, memory) = (usize::MAX / 2 + 1, "a matrix that fits in memory");
        let cases = [
            (Iid, 0, 4, "directions", "0".into(), "at least 1"),
            (Iid, 4, 0, "width", "0".into(), "at least 1"),
            (HyperbolicPairs, 3, 4, "directions", "3".into(), "an even number for hyperbolic pairs"),
            // m·D overflows; m·D fits but its bytes do not.
            (Orthogonal, huge, 2, "directions", format!("{huge} of width 2"), memory),
            (Orthogonal, 1, huge, "directions", format!("1 of width {huge}"), memory),
        ];
        for (kind, directions, width, argument, got, needs) in cases {
            let error = random_features(kind, directions, width, 0).unwrap_err();
            assert_eq!(error, Error::Value { function: "random_features", argument, got, needs: needs.into() });
        }
    }
}
