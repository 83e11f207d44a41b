//! Biases by the distance between query and key, for the `bias` of softmax attention.

use crate::Result;
use crate::problem::ensure_value;

/// The slopes m of ALiBi (Press et al. 2022) for each head: 2^{−8h/H}, h = 1 … H, for H a power of two; for others those of
/// the power below, then every second of twice as many heads.
///
/// ```
/// use attn_kernels::alibi_slopes;
///
/// assert_eq!(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
/// assert_eq!(alibi_slopes(3), [0.0625, 0.00390625, 0.25]);
/// ```
pub fn alibi_slopes(heads: usize) -> Vec<f64> {
    let below = if heads == 0 { 1 } else { 1 << heads.ilog2() };
    let slopes = |heads: usize| (1..=heads).map(move |h| (-8.0 * h as f64 / heads as f64).exp2());
    slopes(below).chain(slopes(2 * below).step_by(2)).take(heads).collect()
}

/// The bias of ALiBi, −m·|j − p|, `[H, 2R + 1]` row-major: entry R + d of a head for a key at distance d = j − p.
///
/// ```
/// # #[cfg(feature = "candle")]
/// # fn main() -> candle_core::Result<()> {
/// use attn_kernels::{Mask, SoftmaxOptions, alibi_bias, softmax_attention};
/// use candle_core::{DType, Device, Tensor};
///
/// let x = Tensor::randn(0f32, 1.0, (1, 4, 10, 8), &Device::Cpu)?;
/// let bias = Tensor::from_vec(alibi_bias(4, 9), (4, 19), &Device::Cpu)?.to_dtype(DType::F32)?;
/// let options = SoftmaxOptions { mask: Mask::Causal, bias: Some(bias), ..Default::default() };
/// assert_eq!(softmax_attention(&x, &x, &x, &options)?.dims(), x.dims());
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "candle"))]
/// # fn main() {}
/// ```
pub fn alibi_bias(heads: usize, radius: usize) -> Vec<f64> {
    let row = |slope: f64| (0..2 * radius + 1).map(move |entry| -slope * entry.abs_diff(radius) as f64);
    alibi_slopes(heads).into_iter().flat_map(row).collect()
}

/// How T5 (Raffel et al. 2020) puts distances into buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct T5Buckets {
    /// How many there are, an even number if `bidirectional`. T5 has 32.
    pub count: usize,
    /// Distances from here on are in the last bucket of their direction. T5 has 128.
    pub max_distance: usize,
    /// Keys behind the query have half of the buckets; else all of them are in that of distance 0. Encoders have it.
    pub bidirectional: bool,
}

/// The bucket of each distance d = j − p from −R to R: near ones have a bucket each, far ones share them by the logarithm.
/// A learned table `[buckets, H]` becomes the bias `[H, 2R + 1]` of softmax attention, which has a gradient:
///
/// ```
/// # #[cfg(feature = "candle")]
/// # fn main() -> candle_core::Result<()> {
/// use attn_kernels::{SoftmaxOptions, T5Buckets, softmax_attention, t5_buckets};
/// use candle_core::{Device, Tensor, Var};
///
/// let table = Var::randn(0f32, 1.0, (32, 4), &Device::Cpu)?;
/// let buckets = t5_buckets(9, T5Buckets { count: 32, max_distance: 128, bidirectional: true })?;
/// let bias = table.index_select(&Tensor::new(&buckets[..], &Device::Cpu)?, 0)?.t()?;
/// let x = Tensor::randn(0f32, 1.0, (1, 4, 10, 8), &Device::Cpu)?;
/// // T5 does not scale scores.
/// let options = SoftmaxOptions { scale: Some(1.0), bias: Some(bias), ..Default::default() };
/// let gradients = softmax_attention(&x, &x, &x, &options)?.sqr()?.sum_all()?.backward()?;
/// assert!(gradients.get(&table).is_some());
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "candle"))]
/// # fn main() {}
/// ```
///
/// # Errors
/// Fewer than two buckets of a direction, an odd number for two; a `max_distance` that is not beyond those with a bucket of
/// their own.
pub fn t5_buckets(radius: usize, buckets: T5Buckets) -> Result<Vec<u32>> {
    let T5Buckets { count, max_distance, bidirectional } = buckets;
    let own = if bidirectional { count / 2 } else { count };
    let fits = (2..1 << 31).contains(&own) && (!bidirectional || count.is_multiple_of(2));
    ensure_value(fits, "t5_buckets", "count", count, "at least 2 for each direction, as many for both")?;
    let exact = own / 2;
    let needs = format!("more than the {exact} distances with a bucket of their own");
    ensure_value(max_distance > exact, "t5_buckets", "max_distance", max_distance, &needs)?;
    let bucket = |distance: usize| {
        if distance < exact {
            return distance;
        }
        let share = (distance as f64 / exact as f64).ln() / (max_distance as f64 / exact as f64).ln();
        (exact + (share * (own - exact) as f64) as usize).min(own - 1)
    };
    let of = |entry: usize| match entry.checked_sub(radius) {
        Some(after @ 1..) if bidirectional => own + bucket(after),
        Some(_) => bucket(0),
        None => bucket(radius - entry),
    };
    Ok((0..2 * radius + 1).map(|entry| of(entry) as u32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_of_any_number_of_heads() {
        assert!(alibi_slopes(0).is_empty());
        assert_eq!(alibi_slopes(1), [0.00390625]);
        assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        let twelve = alibi_slopes(12);
        assert_eq!(twelve[..8], alibi_slopes(8));
        assert_eq!(twelve[8..], [1, 3, 5, 7].map(|h| (-0.5 * f64::from(h)).exp2()));
    }

    #[test]
    fn biases_fall_with_the_distance() {
        let near = [-0.125, -0.0625, 0.0, -0.0625, -0.125];
        assert_eq!(alibi_bias(2, 2), [near, near.map(|x| x / 16.0)].concat());
        assert_eq!(alibi_bias(3, 0), [0.0; 3]);
    }

    /// The numbers of the published program for 32 buckets up to 128.
    #[test]
    fn buckets_of_t5() {
        let buckets = t5_buckets(200, T5Buckets { count: 32, max_distance: 128, bidirectional: true }).unwrap();
        let at = |distance: i64| buckets[(200 + distance) as usize];
        let distances = [0, -1, -7, -8, -11, -12, -16, -23, -32, -64, -91, -127, -128, -200];
        assert_eq!(distances.map(at), [0, 1, 7, 8, 8, 9, 10, 11, 12, 14, 15, 15, 15, 15]);
        assert_eq!([1, 8, 16, 64, 200].map(at), [17, 24, 26, 30, 31]);

        let buckets = t5_buckets(200, T5Buckets { count: 32, max_distance: 128, bidirectional: false }).unwrap();
        let at = |distance: i64| buckets[(200 + distance) as usize];
        assert_eq!([0, 1, 200].map(at), [0, 0, 0]);
        assert_eq!([-1, -15, -16, -32, -64, -127, -128].map(at), [1, 15, 16, 21, 26, 31, 31]);
    }

    #[test]
    fn bad_buckets_are_refused() {
        let refused = |count, max_distance, bidirectional| {
            t5_buckets(3, T5Buckets { count, max_distance, bidirectional }).unwrap_err().to_string()
        };
        assert!(refused(1, 10, false).contains("`count` is 1"));
        assert!(refused(7, 10, true).contains("`count` is 7"));
        assert!(refused(2, 10, true).contains("`count` is 2"));
        assert!(refused(32, 16, false).contains("`max_distance` is 16, needs more than the 16"));
    }
}
