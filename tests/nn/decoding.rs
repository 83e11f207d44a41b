use attn_kernels::nn::{Attention, AttentionConfig, Cache, Mechanism};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarMap;

use super::{Scratch, WIDTH, assert_close, assert_refused, layer, layers, random};

/// Runs pieces of these lengths through a cache, and returns their outputs end to end.
pub fn run(layer: &Attention, cache: &mut Cache, x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let (mut start, mut outs) = (0, Vec::new());
    for length in lengths {
        outs.push(layer.forward_cached(&x.narrow(1, start, *length)?, cache)?);
        start += length;
    }
    assert_eq!(start, x.dim(1)?);
    Tensor::cat(&outs, 1)
}

#[test]
fn pieces_are_the_whole() -> Result<()> {
    let x = random("x", &[2, 23, WIDTH])?;
    let cuts: [&[usize]; 5] = [&[23], &[1; 23], &[7, 1, 0, 9, 1, 5], &[5, 10, 1, 7], &[1, 3, 19]];
    for config in layers() {
        let (_, layer) = layer(&config)?;
        let whole = layer.forward(&x)?;
        for lengths in cuts {
            let mut cache = layer.cache()?;
            let out = run(&layer, &mut cache, &x, lengths)?;
            assert_close(&out, &whole, 1e-11, &format!("{config:?} in {lengths:?}"))?;
            assert_eq!(cache.len(), 23);
        }
    }
    Ok(())
}

#[test]
fn in_every_dtype() -> Result<()> {
    for config in layers() {
        for (dtype, unit) in [(DType::F32, 2f64.powi(-23)), (DType::BF16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))]
        {
            let variables = VarMap::new();
            let weights = attn_kernels::nn::seeded_weights(&variables, 3, dtype, &Device::Cpu);
            let layer = Attention::new(&config, weights)?;
            let x = random("x", &[1, 12, WIDTH])?.to_dtype(dtype)?;
            let (whole, mut cache) = (layer.forward(&x)?, layer.cache()?);
            let out = run(&layer, &mut cache, &x, &[6, 1, 1, 1, 3])?;
            let scale = whole.to_dtype(DType::F64)?.abs()?.max_all()?.to_scalar::<f64>()?;
            // The attention's output is rounded once, and goes through a projection that rounds too.
            assert_close(&out, &whole, 8.0 * unit * scale, &format!("{config:?} in {dtype:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn reordered_batches_go_on() -> Result<()> {
    let x = random("x", &[3, 17, WIDTH])?;
    let order = [2, 0, 2, 1];
    let reordered = x.index_select(&Tensor::new(&order.map(|row| row as u32), &Device::Cpu)?, 0)?;
    for config in layers() {
        let (_, layer) = layer(&config)?;
        let mut cache = layer.cache()?;
        run(&layer, &mut cache, &x.narrow(1, 0, 13)?, &[9, 4])?;
        cache.reorder(&order)?;
        let out = run(&layer, &mut cache, &reordered.narrow(1, 13, 4)?, &[1, 3])?;
        let whole = layer.forward(&reordered)?.narrow(1, 13, 4)?;
        assert_close(&out, &whole, 1e-11, &format!("{config:?}"))?;
        assert_refused(cache.reorder(&[0, 4]), &["Cache::reorder", "rows", "[0, 4]", "below the batch of 4"]);
        assert_refused(cache.reorder(&[]), &["rows", "empty"]);
        assert_refused(layer.cache()?.reorder(&[0]), &["empty"]);
    }
    Ok(())
}

#[test]
fn truncated_sequences_go_on() -> Result<()> {
    let (x, y) = (random("x", &[2, 13, WIDTH])?, random("y", &[2, 6, WIDTH])?);
    let go_on = |layer: &Attention, cache: &mut Cache, kept: usize| -> Result<()> {
        let out = run(layer, cache, &y, &[1, 5])?;
        let whole = layer.forward(&Tensor::cat(&[&x.narrow(1, 0, kept)?, &y], 1)?)?.narrow(1, kept, 6)?;
        assert_close(&out, &whole, 1e-11, &format!("{:?} to {kept}", layer.config()))
    };
    for config in layers() {
        let (_, layer) = layer(&config)?;
        // The shortest length that the cache can go back to after 13 tokens, but for 0.
        let shortest = match config.mechanism {
            Mechanism::Softmax { window: None, .. } | Mechanism::Gau { .. } => 1,
            // The last 4 keys are there, so none is missing for the next token at 13 or later.
            Mechanism::Softmax { window: Some(_), .. } => 13,
            Mechanism::Diag { .. } | Mechanism::Flash { .. } => 10,
            _ => 13,
        };
        for kept in (0..14).filter(|kept| *kept == 0 || *kept >= shortest) {
            let mut cache = layer.cache()?;
            run(&layer, &mut cache, &x, &[13])?;
            cache.truncate(kept)?;
            assert_eq!(cache.len(), kept);
            go_on(&layer, &mut cache, kept)?;
        }
        let mut cache = layer.cache()?;
        run(&layer, &mut cache, &x, &[13])?;
        if shortest > 1 {
            let possible = match (&config.mechanism, shortest) {
                (_, 10) => "needs 0 or 10 to 13: ",
                (Mechanism::Softmax { .. }, _) => "needs 0 or all 13: ",
                _ => "needs 0 or 13: ",
            };
            assert_refused(cache.truncate(shortest - 1), &["Cache::truncate", "`len` is", possible]);
        }
        assert_refused(cache.truncate(14), &["Cache::truncate", "`len` is 14", "at most the 13"]);
        // A refusal changes nothing.
        go_on(&layer, &mut cache, 13)?;
    }
    Ok(())
}

#[test]
fn clones_go_their_own_ways() -> Result<()> {
    let (x, y) = (random("x", &[1, 9, WIDTH])?, random("y", &[1, 4, WIDTH])?);
    for config in layers() {
        let (_, layer) = layer(&config)?;
        let mut first = layer.cache()?;
        run(&layer, &mut first, &x, &[9])?;
        let mut second = first.clone();
        for step in 0..4 {
            for (cache, sign) in [(&mut first, 1.0), (&mut second, -1.0)] {
                let rows = (&y * sign)?;
                let out = layer.forward_cached(&rows.narrow(1, step, 1)?, cache)?;
                let whole = layer.forward(&Tensor::cat(&[&x, &rows], 1)?)?.narrow(1, 9 + step, 1)?;
                assert_close(&out, &whole, 1e-11, &format!("{config:?}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn stored_states_go_on() -> Result<()> {
    let x = random("x", &[2, 17, WIDTH])?;
    for (index, config) in layers().into_iter().enumerate() {
        let (_, layer) = layer(&config)?;
        let whole = layer.forward(&x)?.narrow(1, 13, 4)?;
        for length in [13, 10, 0] {
            let file = Scratch::new(&format!("state-{index}-{length}"));
            let mut cache = layer.cache()?;
            run(&layer, &mut cache, &x.narrow(1, 0, length)?, &[length])?;
            cache.save(&file.0)?;
            let mut loaded = layer.cache()?;
            // What was there before does not matter.
            run(&layer, &mut loaded, &x.narrow(1, 3, 2)?, &[2])?;
            loaded.load(&file.0)?;
            assert_eq!(loaded.len(), length);
            run(&layer, &mut loaded, &x.narrow(1, length, 13 - length)?, &[13 - length])?;
            let out = run(&layer, &mut loaded, &x.narrow(1, 13, 4)?, &[1, 3])?;
            assert_close(&out, &whole, 1e-11, &format!("{config:?} from {length}"))?;
        }
    }
    Ok(())
}

#[test]
fn grouped_heads_are_repeated_heads() -> Result<()> {
    let is_grouped = |config: &AttentionConfig| config.key_heads == Some(2) && !config.mechanism.is_recurrent();
    for config in layers().into_iter().filter(is_grouped) {
        let (grouped, layer) = layer(&config)?;
        let all = AttentionConfig { key_heads: None, ..config.clone() };
        let all = match config.mechanism {
            Mechanism::Retention { .. } => {
                // Heads 0 and 1 read key head 0 with its decay.
                let decay = [5, 5, 6, 6].map(|power| (-(2f64.powi(-power))).ln_1p()).to_vec();
                let mechanism = Mechanism::Retention { log_decay: Some(decay), gate: true, epsilon: 0.01 };
                AttentionConfig { mechanism, ..all }
            }
            _ => all,
        };
        let (repeated, other) = super::layer(&all)?;
        for (name, variable) in repeated.data().lock().unwrap().iter() {
            let value = grouped.data().lock().unwrap()[name].as_tensor().clone();
            // Rows of keys and values, and norms of all keys.
            let is_repeated = value.dims() != variable.dims();
            let value = match is_repeated {
                true => {
                    let rest = value.elem_count() / (2 * 4);
                    let heads = value.reshape((2, 1, 4, rest))?.broadcast_as((2, 2, 4, rest))?;
                    heads.reshape(variable.dims())?
                }
                false => value,
            };
            variable.set(&value.copy()?)?;
        }
        let x = random("x", &[2, 9, WIDTH])?;
        assert_close(&layer.forward(&x)?, &other.forward(&x)?, 1e-12, &format!("{config:?}"))?;
    }
    Ok(())
}
