//! Performer attention as an estimate of softmax attention: at entries of standard deviation 0.25 its error falls as
//! 1/√m (MATH §3; the estimator's laws are tested with the generator).

use attn_kernels::performer::{FavorMap, PerformerOptions};
use attn_kernels::problem::{DType, Mask};
use attn_kernels::random_features::{FeatureKind, random_features};
use attn_kernels::reference::{self, Array};
use attn_kernels::softmax::SoftmaxOptions;

use crate::common::backends::{self, Backend, Pass};
use crate::common::cases::{Case, Operation};
use crate::common::data::Data;

const SEEDS: u64 = 6;

/// Root mean square of the difference from softmax over that of softmax, over draws of ω.
fn relative_error(map: FavorMap, kind: FeatureKind, directions: usize, causal: bool, std: f64) -> f64 {
    let options = PerformerOptions { map, causal, ..Default::default() };
    let case = Case::new("an estimate of softmax", Operation::Performer(options, directions))
        .lengths(96, 96)
        .widths(64, 64)
        .std(std);
    let mut data = Data::new(&case, DType::F32);
    let mask = if causal { Mask::Causal } else { Mask::Full };
    let softmax_options = SoftmaxOptions { mask, ..Default::default() };
    let expected = reference::softmax_attention(&data.q, &data.k, &data.v, &softmax_options).out;
    let mut square = 0.0;
    for seed in 0..SEEDS {
        let rows = random_features(kind, directions, 64, seed).unwrap();
        data.omega = Some(Array { data: rows, shape: [1, 1, directions, 64] });
        let results = backends::default().run(&case, &data, DType::F32, Pass::Forward).unwrap();
        square += results.out().data.iter().zip(&expected.data).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
    }
    (square / SEEDS as f64 / expected.data.iter().map(|x| x * x).sum::<f64>()).sqrt()
}

#[test]
fn converges_to_softmax() {
    for (map, kind) in [
        (FavorMap::Positive, FeatureKind::Orthogonal),
        (FavorMap::Positive, FeatureKind::Iid),
        (FavorMap::Hyperbolic, FeatureKind::Orthogonal),
    ] {
        for causal in [false, true] {
            let errors = [64, 256, 1024].map(|directions| relative_error(map, kind, directions, causal, 0.25));
            let what = format!("{map:?} {kind:?}, causal {causal}: {errors:?}");
            assert!((0.015..0.09).contains(&errors[1]), "{what}");
            for pair in errors.windows(2) {
                assert!((0.38..0.65).contains(&(pair[1] / pair[0])), "{what}: not half per factor of 4");
            }
        }
    }
}

/// What the documentation warns of.
#[test]
fn does_not_approximate_softmax_at_unit_variance() {
    let error = relative_error(FavorMap::Positive, FeatureKind::Orthogonal, 1024, false, 1.0);
    assert!(error > 1.0, "{error}");
}

/// Exponents ωx̃ − ‖x̃‖²/2 of rows so long that their squares have no digits left for ωx̃, or overflow.
#[test]
fn long_queries_keep_their_projections() {
    for map in [FavorMap::Positive, FavorMap::Hyperbolic] {
        for (causal, length) in [(true, 3e5), (false, 1e12), (true, 1e25)] {
            let options = PerformerOptions { map, causal, ..Default::default() };
            let case = Case::new("long queries", Operation::Performer(options.clone(), 12)).lengths(70, 70);
            let mut data = Data::new(&case, DType::F32);
            data.q.data.iter_mut().for_each(|x| *x = f64::from((*x * length) as f32));
            let omega = data.omega.as_ref().unwrap();
            let options = PerformerOptions { map, causal, epsilon: options.epsilon, key_mask: None, sequences: None };
            let expected = reference::performer_attention(&data.q, &data.k, &data.v, omega, &options);
            for backend in backends::all().iter().filter(|backend| backend.is_available()) {
                let results = backend.run(&case, &data, DType::F32, Pass::Forward).unwrap();
                let fits = |(x, y): (&f64, &f64)| (x - y).abs() <= 1e-4 * (1.0 + y.abs());
                let name = backend.name();
                let pairs = results.out().data.iter().zip(&expected.data);
                assert!(pairs.into_iter().all(fits), "{name}, {map:?}, entries near {length:e}");
            }
        }
    }
}
