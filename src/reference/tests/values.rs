//! Outputs worked out by hand.

use std::f64::consts::{E, LN_2};

use approx::assert_relative_eq;

use crate::gau::{GauNorm, GauOptions, GlobalNorm, MixedChunkOptions};
use crate::linear::{FeatureMap, LinearOptions};
use crate::performer::{FavorMap, PerformerOptions};
use crate::problem::Mask;
use crate::reference::*;
use crate::softmax::SoftmaxOptions;
use crate::transnormer::{DiagOptions, DiagWeight, NormOptions, NormScope};

/// One batch entry and head.
fn rows<const N: usize, const D: usize>(rows: [[f64; D]; N]) -> Array {
    Array { data: rows.concat(), shape: [1, 1, N, D] }
}

#[test]
fn softmax() {
    let (q, k, v) = (rows([[1.0; 4]]), rows([[0.0; 4], [LN_2 / 2.0; 4]]), rows([[3.0], [9.0]]));
    let output = softmax_attention(&q, &k, &v, &SoftmaxOptions::default());
    assert_relative_eq!(output.out.data[0], (3.0 + 2.0 * 9.0) / 3.0, max_relative = 1e-14);
    assert_relative_eq!(output.log_sum_exp.data[0], 3f64.ln(), max_relative = 1e-14);
    let bias = Some(rows([[LN_2, 0.0, 0.0]]));
    let output = softmax_attention(&q, &k, &v, &SoftmaxOptions { bias, ..Default::default() });
    assert_relative_eq!(output.out.data[0], 6.0, max_relative = 1e-14);
    let options = SoftmaxOptions { soft_cap: Some(0.5), mask: Mask::Causal, ..Default::default() };
    let output = softmax_attention(&q, &k, &v, &options);
    let second = (0.5 * (2.0 * LN_2).tanh()).exp();
    assert_relative_eq!(output.out.data[0], (3.0 + 9.0 * second) / (1.0 + second), max_relative = 1e-14);
}

#[test]
fn diag() {
    let (q, k, v) = (rows([[2.0]; 3]), rows([[1.0], [-1.0], [3.0]]), rows([[1.0, 2.0], [5.0, 5.0], [3.0, 4.0]]));
    let options = DiagOptions { block_size: 2, weight: DiagWeight::Relu { epsilon: 0.5 }, ..Default::default() };
    let out = diag_attention(&q, &k, &v, &options);
    assert_relative_eq!(out.data[0], 2.0 / (10f64 + 0.5).sqrt(), max_relative = 1e-14);
    assert_relative_eq!(out.data[5], 24.0 / ((18f64.powi(2) + 24f64.powi(2)) / 2.0 + 0.5).sqrt(), max_relative = 1e-14);
}

#[test]
fn gau() {
    let (q, k, v) = (rows([[1.0; 4]]), rows([[1.0; 4], [-1.0; 4], [2.0; 4]]), rows([[1.0], [10.0], [100.0]]));
    let expect = |norm, bias: f64, expected: f64| {
        let bias = Some(Array::filled([1, 1, 1, 5], bias));
        let out = gau_attention(&q, &k, &v, &GauOptions { norm, bias, ..Default::default() });
        assert_relative_eq!(out.data[0], expected, max_relative = 1e-14);
    };
    expect(GauNorm::Length, 0.0, (16.0 + 6400.0) / 9.0);
    expect(GauNorm::LengthWidth, 0.5, (4.5f64.powi(2) + 8.5f64.powi(2) * 100.0) / 12.0);
    expect(GauNorm::RowSum { epsilon: 1.0 }, 1.0, (9.0 + 2500.0) / 35.0);
    expect(GauNorm::Fixed { length: 2.0 }, 1.0, (9.0 + 2500.0) / 1.0);
}

#[test]
fn linear() {
    let weight = |map, q: [f64; 2], k: [f64; 2]| {
        let options = LinearOptions { map, normalizer: None, ..Default::default() };
        linear_attention(&rows([q]), &rows([k]), &rows([[1.0]]), &options).data[0]
    };
    let (q, k) = ([3.0, -4.0], [2.0, 1.0]);
    let s = 2.0;
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for (map, expected) in [
        (FeatureMap::Identity, s),
        (FeatureMap::EluPlusOne, 4.0 * 3.0 + (-4f64).exp() * 2.0),
        (FeatureMap::Relu, 6.0),
        (FeatureMap::ReluSquared, 36.0),
        (FeatureMap::Silu, 6.0 * sigmoid(3.0) * sigmoid(2.0) - 4.0 * sigmoid(-4.0) * sigmoid(1.0)),
        (FeatureMap::Exp, E.powi(5) + E.powi(-3)),
        (FeatureMap::Softmax, sigmoid(7.0) * sigmoid(1.0) + sigmoid(-7.0) * sigmoid(-1.0)),
        (FeatureMap::Taylor, 1.0 + s + s * s / 2.0),
        (FeatureMap::Cosine, 1.0 + s / (5.0 * 5f64.sqrt())),
    ] {
        assert_relative_eq!(weight(map, q, k), expected, max_relative = 1e-14);
    }
}

#[test]
fn decay_and_normalizer() {
    let (q, k, v) = (rows([[1.0]; 3]), rows([[1.0]; 3]), rows([[1.0], [10.0], [100.0]]));
    let run = |log_decay: Array| {
        let (map, normalizer, log_decay) = (FeatureMap::Identity, Some(0.25), Some(log_decay));
        linear_attention(&q, &k, &v, &LinearOptions { map, causal: true, normalizer, log_decay, ..Default::default() })
            .data
    };
    assert_relative_eq!(run(rows([[-LN_2]]))[2], 105.25 / 2.0, max_relative = 1e-14);
    assert_relative_eq!(run(rows([[-9.0, -LN_2, 0.0]]))[2], 110.5 / 2.75, max_relative = 1e-14);
}

#[test]
fn performer() {
    let (q, k, v) = (rows([[2.0; 16]]), rows([[1.0; 16], [0.5; 16]]), rows([[1.0], [10.0]]));
    // ω is 0 or along one axis: ωx̃ = 0 or x; ‖x̃‖² = 4x².
    let mut omega = Array::zeros([1, 1, 2, 16]);
    omega.data[0] = 2.0;
    let run = |map| {
        let options = PerformerOptions { map, epsilon: 0.5, ..Default::default() };
        performer_attention(&q, &k, &v, &omega, &options).data[0]
    };
    // Key exponents −1, −2 and 0, −1/2, less their maximum 0; query exponents 0, −2 after their maximum.
    let first = (E.powi(-1) + E.powi(-4)) / 2.0;
    let second = (1.0 + E.powf(-2.5)) / 2.0;
    assert_relative_eq!(
        run(FavorMap::Positive),
        (first + 10.0 * second) / (first + second + 0.5),
        max_relative = 1e-14
    );
    let relu = |x: f64, y: f64| {
        let (zero, x, y) = (1e-3, x / 2f64.sqrt() + 1e-3, y / 2f64.sqrt() + 1e-3);
        x * y + zero * zero
    };
    let (first, second) = (relu(2.0, 1.0), relu(2.0, 0.5));
    assert_relative_eq!(run(FavorMap::Relu), (first + 10.0 * second) / (first + second + 0.5), max_relative = 1e-14);
}

#[test]
fn norm() {
    let (q, k) = (rows([[2.0]]), rows([[3.0]]));
    let v = Array { data: vec![0.5, 1.0, 1.5, 2.0], shape: [1, 2, 1, 2] };
    let second = |norm| {
        let options = NormOptions { map: FeatureMap::Identity, epsilon: 7.0, norm, ..Default::default() };
        norm_attention(&q, &k, &v, &options).data[1]
    };
    assert_relative_eq!(second(NormScope::Head), 6.0 / (22.5f64 + 7.0).sqrt(), max_relative = 1e-14);
    assert_relative_eq!(second(NormScope::AllHeads), 6.0 / (67.5f64 + 7.0).sqrt(), max_relative = 1e-14);
}

#[test]
fn mixed_chunk() {
    let ones = rows([[1.0]; 5]);
    let v = rows([[1.0], [10.0], [100.0], [1e3], [1e4]]);
    let run = |causal, global_norm| {
        let options = MixedChunkOptions { chunk_size: 2, causal, global_norm, ..Default::default() };
        mixed_chunk_attention(&ones, &ones, &ones, &ones, &v, &options).data
    };
    assert_relative_eq!(run(true, GlobalNorm::Mean)[1], 11.0 / 4.0, max_relative = 1e-14);
    assert_relative_eq!(run(true, GlobalNorm::Mean)[3], 1100.0 / 4.0 + 11.0 / 2.0, max_relative = 1e-14);
    assert_relative_eq!(run(true, GlobalNorm::Mean)[4], 1e4 / 4.0 + 1111.0 / 4.0, max_relative = 1e-14);
    assert_relative_eq!(run(true, GlobalNorm::Chunk)[4], 1e4 / 4.0 + 1111.0 / 2.0, max_relative = 1e-14);
    assert_relative_eq!(run(true, GlobalNorm::Length)[4], 1e4 / 4.0 + 1111.0 / 5.0, max_relative = 1e-14);
    assert_relative_eq!(run(false, GlobalNorm::Mean)[2], 1100.0 / 4.0 + 11111.0 / 5.0, max_relative = 1e-14);
}
