//! Rotary embedding in plain f64 loops, its scalings from the papers' conditions; the frequencies of published models.

use std::f64::consts::PI;

use attn_kernels::nn::{Rotary, RotaryConfig, RotaryScaling};
use attn_kernels::reference::Array;
use candle_core::{DType, Device, Result, Tensor, Var};

use super::{assert_close, random, scalings};

/// Batch entry, head and row of all rows.
pub fn rows(x: &Array) -> impl Iterator<Item = [usize; 3]> + use<> {
    let [batch, heads, rows, _] = x.shape;
    (0..batch * heads * rows).map(move |at| [at / rows / heads, at / rows % heads, at % rows])
}

/// Frequency i of rows of which so many numbers are rotated, as the scaling's paper says it.
fn frequency(config: &RotaryConfig, rotated: usize, i: usize) -> f64 {
    let (base, rotated) = (config.base, rotated as f64);
    let plain = base.powf(-2.0 * i as f64 / rotated);
    let wavelength = 2.0 * PI / plain;
    match config.scaling {
        None => plain,
        Some(RotaryScaling::Linear { factor }) => plain / factor,
        Some(RotaryScaling::Llama3 {
            factor,
            low_frequency_factor: low,
            high_frequency_factor: high,
            original_length,
        }) => {
            let length = original_length as f64;
            if wavelength < length / high {
                plain
            } else if wavelength > length / low {
                plain / factor
            } else {
                let smooth = (length / wavelength - low) / (high - low);
                plain * ((1.0 - smooth) / factor + smooth)
            }
        }
        Some(RotaryScaling::Yarn { factor, original_length, beta_fast, beta_slow, truncate, .. }) => {
            // 2π base^{2i/w} turns = L, solved for i.
            let index = |turns: f64| rotated / 2.0 * (original_length as f64 / (2.0 * PI * turns)).log(base);
            let (mut low, mut high) = (index(beta_fast), index(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(rotated - 1.0));
            let ramp = if i as f64 <= low {
                0.0
            } else if i as f64 >= high {
                1.0
            } else {
                (i as f64 - low) / (high - low)
            };
            plain / factor * ramp + plain * (1.0 - ramp)
        }
    }
}

/// What cos and sin are multiplied by.
fn factor(config: &RotaryConfig) -> f64 {
    match config.scaling {
        Some(RotaryScaling::Yarn { attention_factor: Some(given), .. }) => given,
        Some(RotaryScaling::Yarn { factor, mscale: Some(m), mscale_all_dim: Some(all), .. }) => {
            (0.1 * m * factor.ln() + 1.0) / (0.1 * all * factor.ln() + 1.0)
        }
        Some(RotaryScaling::Yarn { factor, .. }) => 0.1 * factor.ln() + 1.0,
        _ => 1.0,
    }
}

/// A row at a position, or at the opposite of one: rotated back.
pub fn rotated(row: &[f64], config: &RotaryConfig, position: f64) -> Vec<f64> {
    let (width, mut y) = (config.width.unwrap_or(row.len()), row.to_vec());
    for pair in 0..width / 2 {
        let (sin, cos) = (position * frequency(config, width, pair)).sin_cos();
        let [a, b] = if config.interleaved { [2 * pair, 2 * pair + 1] } else { [pair, pair + width / 2] };
        y[a] = factor(config) * (row[a] * cos - row[b] * sin);
        y[b] = factor(config) * (row[b] * cos + row[a] * sin);
    }
    y
}

/// x `[…, N, D]` whose first row is at `position`, row by row.
pub fn rotated_rows(x: &Tensor, config: &RotaryConfig, position: f64, sign: f64) -> Result<Tensor> {
    let (count, width) = (x.dims()[x.rank() - 2], x.dims()[x.rank() - 1]);
    let numbers = x.flatten_all()?.to_vec1::<f64>()?;
    let rows = numbers.chunks(width).enumerate();
    let rows = rows.flat_map(|(at, row)| rotated(row, config, sign * (position + (at % count) as f64)));
    Tensor::from_vec(rows.collect(), x.shape(), &Device::Cpu)
}

/// Every way to rotate rows of 8 numbers.
fn configs() -> Vec<RotaryConfig> {
    let mut configs = Vec::new();
    for width in [None, Some(8), Some(4), Some(2)] {
        for interleaved in [false, true] {
            for scaling in [None].into_iter().chain(scalings().map(Some)) {
                configs.push(RotaryConfig { base: 100.0, width, interleaved, scaling });
            }
        }
    }
    configs
}

/// Outputs, and gradients: ⟨R x, d⟩ = ⟨x, Rᵀ d⟩, times the same factor.
#[test]
fn rotations_are_the_formula() -> Result<()> {
    let (x, d_y) = (random("x", &[2, 3, 5, 8])?, random("d_y", &[2, 3, 5, 8])?);
    for config in configs() {
        let rotary = Rotary::new(8, config)?;
        for position in [0, 1021] {
            let what = format!("{config:?} from {position}");
            let (expected, x) = (rotated_rows(&x, &config, position as f64, 1.0)?, Var::from_tensor(&x)?);
            let y = rotary.apply(&x, position)?;
            assert_close(&y, &expected, 1e-12, &what)?;
            let gradients = (&y * &d_y)?.sum_all()?.backward()?;
            let back = rotated_rows(&d_y, &config, position as f64, -1.0)?;
            assert_close(gradients.get(&x).unwrap(), &back, 1e-12, &format!("{what}: dx"))?;
        }
    }
    Ok(())
}

/// Narrow numbers are rotated in f32 and rounded once.
#[test]
fn rotations_in_narrow_dtypes() -> Result<()> {
    for (dtype, unit) in [(DType::F32, 2f64.powi(-24)), (DType::BF16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))] {
        let x = random("x", &[1, 2, 9, 8])?.to_dtype(dtype)?;
        for config in configs() {
            let y = Rotary::new(8, config)?.apply(&x, 7)?;
            let exact = rotated_rows(&x.to_dtype(DType::F64)?, &config, 7.0, 1.0)?;
            let largest = exact.abs()?.max_all()?.to_scalar::<f64>()?;
            // cos, sin, two products and their sum.
            let allowed = largest * (unit + 4.0 * 2f64.powi(-24));
            assert_close(&y.to_dtype(DType::F64)?, &exact, allowed, &format!("{config:?} in {dtype:?}"))?;
        }
    }
    Ok(())
}

/// The angles at position 1 and the factor, of rows of which the first of each pair is 1.
fn seen(width: usize, config: RotaryConfig) -> Result<(Vec<f64>, f64)> {
    let half = width / 2;
    let row: Vec<f64> = (0..width).map(|i| f64::from(i < half)).collect();
    let row = Tensor::from_vec(row, (1, 1, 1, width), &Device::Cpu)?;
    let y = Rotary::new(width, config)?.apply(&row, 1)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(((0..half).map(|i| y[i + half].atan2(y[i])).collect(), y[0].hypot(y[half])))
}

/// `inv_freq` and `attention_scaling` of transformers 5.24 for the configurations of Llama 3.1, Qwen 2.5 with YaRN, GPT-OSS and
/// a model with `mscale` as in DeepSeek's.
#[test]
fn frequencies_of_published_models() -> Result<()> {
    let yarn = |factor, original_length, mscale: Option<[f64; 2]>, truncate| RotaryScaling::Yarn {
        factor,
        original_length,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: mscale.map(|[m, _]| m),
        mscale_all_dim: mscale.map(|[_, all]| all),
        truncate,
    };
    let llama3 = RotaryScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_length: 8192,
    };
    // Width, base, scaling, frequencies by their number, factor.
    type Case = (usize, f64, RotaryScaling, &'static [(usize, f64)], f64);
    let cases: [Case; 4] = [
        (
            128,
            5e5,
            llama3,
            &[
                (1, 0.8146172165870667),
                (28, 0.0032114461064338684),
                (30, 0.0013718936825171113),
                (31, 0.0008567514596506953),
                (34, 0.0001785077911335975),
                (36, 7.784655463183299e-05),
                (63, 3.068925877869333e-07),
            ],
            1.0,
        ),
        (
            128,
            1e6,
            yarn(4.0, 32768, None, true),
            &[
                (1, 0.8058422207832336),
                (22, 0.00865964312106371),
                (25, 0.004131738096475601),
                (31, 0.000802959781140089),
                (36, 0.0001798411540221423),
                (40, 4.4456985051510856e-05),
                (63, 3.102344408034696e-07),
            ],
            1.138629436111989,
        ),
        (
            64,
            150000.0,
            yarn(32.0, 4096, None, false),
            &[
                (1, 0.6890442967414856),
                (8, 0.05081327259540558),
                (10, 0.019334999844431877),
                (15, 0.00105260219424963),
                (20, 1.818833698052913e-05),
                (31, 3.023511396804679e-07),
            ],
            1.3465735902799727,
        ),
        (
            64,
            10000.0,
            yarn(40.0, 4096, Some([0.707, 1.2]), true),
            &[
                (10, 0.05623412877321243),
                (15, 0.0083345090970397),
                (20, 0.0007905694073997438),
                (22, 0.00017782794020604342),
                (25, 1.8747354260995053e-05),
            ],
            0.8739404576185121,
        ),
    ];
    for (width, base, scaling, expected, expected_factor) in cases {
        let config = RotaryConfig { scaling: Some(scaling), ..base.into() };
        let (frequencies, seen_factor) = seen(width, config)?;
        for (i, ours) in frequencies.iter().enumerate() {
            let by_hand = frequency(&config, width, i);
            assert!((ours / by_hand - 1.0).abs() < 1e-12, "{config:?}, frequency {i}: {ours} is not {by_hand}");
        }
        for (i, theirs) in expected {
            // Theirs are powers in f32.
            let error = (frequencies[*i] / theirs - 1.0).abs();
            assert!(error < 2e-6, "{config:?}, frequency {i}: {} is not {theirs}", frequencies[*i]);
        }
        assert!((seen_factor / expected_factor - 1.0).abs() < 1e-12, "{config:?}: {seen_factor}");
        assert!((factor(&config) / expected_factor - 1.0).abs() < 1e-12, "{config:?}");
    }
    Ok(())
}
