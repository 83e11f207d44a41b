//! What caches take: memory and time.

use attn_kernels::nn::{Attention, AttentionConfig, Mechanism, seeded_weights};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarMap;

use super::{WIDTH, layer, layers, random};

/// Bytes after each of `steps` tokens that follow a prompt.
fn bytes(config: &AttentionConfig, prompt: usize, steps: usize) -> Result<Vec<usize>> {
    let (_, layer) = layer(config)?;
    let mut cache = layer.cache()?;
    assert_eq!(cache.bytes(), 0);
    layer.forward_cached(&random("prompt", &[1, prompt, WIDTH])?, &mut cache)?;
    let token = random("token", &[1, 1, WIDTH])?;
    let step = |_| {
        layer.forward_cached(&token, &mut cache)?;
        Ok(cache.bytes())
    };
    (0..steps).map(step).collect()
}

#[test]
fn sums_are_constant_and_rows_bounded() -> Result<()> {
    for config in layers() {
        let what = format!("{config:?}");
        let bytes = bytes(&config, 300, 200)?;
        let largest = *bytes.iter().max().unwrap();
        // A row of keys and values, in f64.
        let row = 8 * config.key_heads() * 2 * 4;
        match config.mechanism {
            Mechanism::Softmax { window: None, .. } => {
                let needed = 500 * row;
                assert!((needed..needed * 8 / 5).contains(&bytes[199]), "{what}: {} for {needed}", bytes[199]);
            }
            Mechanism::Gau { .. } => {
                let needed = 8 * 500 * (4 + 2 * WIDTH);
                assert!((needed..needed * 8 / 5).contains(&bytes[199]), "{what}: {} for {needed}", bytes[199]);
            }
            Mechanism::Softmax { window: Some(w), .. } | Mechanism::Diag { block: w, .. } => {
                assert!(largest <= (2 * w + 64) * row, "{what}: {largest}");
            }
            Mechanism::Flash { chunk, .. } => {
                let sums = 8 * (4 * 2 * WIDTH + 4);
                let rows = (2 * chunk + 64) * 8 * (4 + 4 + 2 * WIDTH);
                assert!(largest <= sums + rows, "{what}: {largest}");
            }
            ref mechanism if mechanism.is_recurrent() => {
                let (heads, key_heads) = (config.heads, config.key_heads());
                // Widths of D, rows that the convolutions keep, and channels of each.
                let (width, kept, channels) = match *mechanism {
                    Mechanism::Gla { key_width: Some(width), convolution: None, .. } => (width, 0, 0),
                    Mechanism::Gla { convolution: Some(taps), .. } => (2, taps - 1, 4 * (2 + 2 + 4)),
                    Mechanism::Deltanet { key_width, convolution, .. } => {
                        let width = key_width.unwrap_or(4);
                        (width, convolution - 1, 4 * (2 * width + 4))
                    }
                    Mechanism::GatedDeltanet { key_width, convolution, .. } => {
                        let width = key_width.unwrap_or(4);
                        (width, convolution - 1, 2 * key_heads * width + 4 * heads)
                    }
                    Mechanism::Kda { convolution, .. } => (4, convolution - 1, 3 * 4 * 4),
                    Mechanism::Mamba2 { key_width, convolution, .. } => {
                        (key_width, convolution - 1, 2 * key_heads * key_width + 4 * heads)
                    }
                    Mechanism::Mamba { states, convolution, .. } => {
                        let inner = config.head_width();
                        (inner * states / 4, convolution - 1, inner)
                    }
                    Mechanism::Rwkv7 { .. } => (0, 1, heads * config.head_width().pow(2) + WIDTH),
                    Mechanism::S4d { states } => (2 * WIDTH * states / 4, 0, 0),
                    Mechanism::Lru { states, .. } => (0, 2, states.unwrap_or(WIDTH)),
                    _ => (4, 0, 0),
                };
                let state_heads = if matches!(mechanism, Mechanism::Gla { .. }) { key_heads } else { heads };
                let expected = 8 * (state_heads * width * 4 + kept * channels);
                assert!(bytes.iter().all(|bytes| *bytes == expected), "{what}: {bytes:?}, not {expected}");
            }
            _ => {
                let features = match config.mechanism {
                    Mechanism::Performer { map, features, .. } => map.feature_width(features),
                    Mechanism::Linear { map, .. } | Mechanism::Norm { map, .. } => map.feature_width(4),
                    _ => 4,
                };
                let sums = 8 * config.key_heads() * features * (4 + 1);
                let stabilizer = matches!(config.mechanism, Mechanism::Performer { map, .. } if map.is_exponential());
                let expected = sums + if stabilizer { 8 * config.key_heads() } else { 0 };
                assert!(bytes.iter().all(|bytes| *bytes == expected), "{what}: {bytes:?}, not {expected}");
            }
        }
    }
    Ok(())
}

/// A long window, where each row must be moved rarely: bounded without a copy of the window per token.
#[test]
fn a_window_is_bounded_at_any_length() -> Result<()> {
    let config = AttentionConfig::new(WIDTH, 1, Mechanism::Softmax { window: Some(300), soft_cap: None });
    let bytes = bytes(&config, 1000, 1500)?;
    let (row, largest) = (8 * 2 * WIDTH, *bytes.iter().max().unwrap());
    assert!(largest <= (2 * 300 + 64) * row, "{largest}");
    assert!(largest >= 299 * row, "{largest}");
    Ok(())
}

#[test]
fn appending_does_not_move_what_is_there() -> Result<()> {
    let variables = VarMap::new();
    let config = AttentionConfig::new(WIDTH, 1, Mechanism::default());
    let layer = Attention::new(&config, seeded_weights(&variables, 0, DType::F32, &Device::Cpu))?;
    let (mut cache, mut sizes) = (layer.cache()?, Vec::new());
    let token = Tensor::zeros((1, 1, WIDTH), DType::F32, &Device::Cpu)?;
    for _ in 0..2000 {
        layer.forward_cached(&token, &mut cache)?;
        sizes.push(cache.bytes());
    }
    // A change of size is a copy of all rows: they get rarer as the cache grows.
    let copies = sizes.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(copies <= 13, "{copies} copies for 2000 tokens");
    Ok(())
}
