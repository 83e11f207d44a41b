mod delta;
mod diag;
mod gau;
mod linear;
mod mixed_chunk;
mod norm;
mod performer;
mod softmax;
mod states;
mod values;

use super::Array;
use crate::problem::Mask;

const MASKS: [Mask; 7] = [
    Mask::Full,
    Mask::Causal,
    Mask::Window { left: Some(2), right: Some(1) },
    Mask::Window { left: None, right: Some(0) },
    Mask::Window { left: Some(1), right: None },
    Mask::Blocks { size: 3, causal: false },
    Mask::Blocks { size: 3, causal: true },
];

/// Queries and keys.
const LENGTHS: [(usize, usize); 3] = [(6, 6), (5, 8), (8, 5)];

/// Uniform in ±1 from a seed (splitmix64).
fn random(shape: [usize; 4], seed: u64) -> Array {
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    Array::from_fn(shape, |_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) as i64 as f64 / i64::MAX as f64
    })
}

/// Standard normal from a seed, as sums of twelve uniforms.
fn normal(shape: [usize; 4], seed: u64) -> Array {
    let uniforms = random([12, shape[0] * shape[1], shape[2], shape[3]], seed);
    let count: usize = shape.iter().product();
    Array { data: (0..count).map(|i| (0..12).map(|n| uniforms.data[n * count + i] / 2.0).sum()).collect(), shape }
}

/// The first key and one more are masked, differently per batch entry.
fn key_mask(batch: usize, keys: usize) -> Array {
    Array::from_fn([1, 1, batch, keys], |[_, _, b, j]| if j == 0 || j == 2 + b { 0.0 } else { 1.0 })
}

/// Fills the rows of masked keys with NaN.
fn poison(x: &mut Array, key_mask: Option<&Array>) {
    let [batch, heads, keys, _] = x.shape;
    let Some(key_mask) = key_mask else { return };
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        for j in (0..keys).filter(|&j| key_mask.row(0, 0, b)[j] == 0.0) {
            x.row_mut(b, h, j).fill(f64::NAN);
        }
    }
}

/// q, k, v of width 3 and value width 4, two batch entries, masked keys poisoned.
fn qkv(heads: [usize; 3], (queries, keys): (usize, usize), key_mask: Option<&Array>) -> [Array; 3] {
    let q = random([2, heads[0], queries, 3], 1);
    let mut k = random([2, heads[1], keys, 3], 2);
    let mut v = random([2, heads[2], keys, 4], 3);
    poison(&mut k, key_mask);
    poison(&mut v, key_mask);
    [q, k, v]
}

#[track_caller]
fn assert_close(x: &Array, y: &Array, tolerance: f64, what: &str) {
    assert_eq!(x.shape, y.shape, "{what}");
    for (i, (x, y)) in x.data.iter().zip(&y.data).enumerate() {
        let fits = x == y || (x - y).abs() <= tolerance * (1.0 + y.abs());
        assert!(fits, "{what}: element {i} is {x}, expected {y}");
    }
}

/// Compares the gradients of Σ ⟨d, output⟩, random d, with central differences of fourth order, for every input. Outputs that are
/// −∞ are left out of the sum.
fn check_gradients(
    inputs: &[Array],
    forward: impl Fn(&[Array]) -> Vec<Array>,
    backward: impl Fn(&[Array], &[Array]) -> Vec<Array>,
    what: &str,
) {
    let outputs = forward(inputs);
    assert!(outputs.iter().all(|output| output.data.iter().all(|x| !x.is_nan())), "{what}: NaN");
    let d: Vec<Array> = outputs.iter().zip(7..).map(|(output, seed)| random(output.shape, seed)).collect();
    let loss = |inputs: &[Array]| -> f64 {
        let outputs = forward(inputs);
        let products = outputs.iter().zip(&d).flat_map(|(output, d)| output.data.iter().zip(&d.data));
        products.filter(|(output, _)| output.is_finite()).map(|(output, d)| output * d).sum()
    };
    let gradients = backward(inputs, &d);
    assert_eq!(gradients.len(), inputs.len(), "{what}");
    let mut shifted = inputs.to_vec();
    for (n, gradient) in gradients.iter().enumerate() {
        let mut differences = Array::zeros(inputs[n].shape);
        for i in 0..inputs[n].data.len() {
            let x = inputs[n].data[i];
            let step = 2e-5;
            let mut at = |steps: f64| {
                shifted[n].data[i] = x + steps * step;
                loss(&shifted)
            };
            differences.data[i] = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * step);
            shifted[n].data[i] = x;
        }
        assert_close(gradient, &differences, 1e-8, &format!("{what}: gradient of input {n}"));
    }
}

/// Rows `range` of an array (of dimension 2).
fn slice_rows(x: &Array, range: std::ops::Range<usize>) -> Array {
    let shape = [x.shape[0], x.shape[1], range.len(), x.shape[3]];
    Array::from_fn(shape, |[b, h, i, d]| x.row(b, h, range.start + i)[d])
}

/// Columns `range` of an array (of dimension 3).
fn slice_columns(x: &Array, range: std::ops::Range<usize>) -> Array {
    let shape = [x.shape[0], x.shape[1], x.shape[2], range.len()];
    Array::from_fn(shape, |[b, h, i, d]| x.row(b, h, i)[range.start + d])
}

/// Puts `part` into rows `start..` of `whole`.
fn place_rows(whole: &mut Array, part: &Array, start: usize) {
    for [b, h, i] in super::quadratic::rows(part) {
        whole.row_mut(b, h, start + i).copy_from_slice(part.row(b, h, i));
    }
}

#[test]
fn visibility() {
    let sees = |mask, position, keys| -> Vec<usize> {
        (0..keys).filter(|&j| super::pairs::is_visible(mask, position, j)).collect()
    };
    let window = Mask::Window { left: Some(2), right: Some(1) };
    let blocks = |causal| Mask::Blocks { size: 4, causal };
    assert_eq!(super::pairs::position(0, 5, 8), 3);
    assert_eq!(super::pairs::position(0, 8, 5), -3);
    assert_eq!(sees(Mask::Full, -9, 3), [0, 1, 2]);
    assert_eq!(sees(Mask::Causal, 1, 4), [0, 1]);
    assert_eq!(sees(Mask::Causal, -1, 4), [0; 0]);
    assert_eq!(sees(window, 3, 9), [1, 2, 3, 4]);
    assert_eq!(sees(window, -1, 9), [0]);
    assert_eq!(sees(blocks(false), 5, 7), [4, 5, 6]);
    assert_eq!(sees(blocks(true), 5, 7), [4, 5]);
    assert_eq!(sees(blocks(false), -1, 7), [0; 0]);
    assert_eq!(sees(Mask::Blocks { size: usize::MAX, causal: false }, 2, 3), [0, 1, 2]);
}
