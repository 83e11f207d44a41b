//! What only the inside of a cache shows.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarMap;

use super::cache::Contents;
use super::{Attention, AttentionConfig, Mechanism, seeded_weights};
use crate::candle::LinearState;

/// A state of nothing at another position.
fn begun(state: &LinearState, position: usize) -> Result<LinearState> {
    let nothing = |c: &Tensor| c.zeros_like()?.affine(1.0, f64::NEG_INFINITY);
    let stabilizer = state.stabilizer().map(nothing).transpose()?;
    Ok(LinearState::new(state.s().zeros_like()?, state.z().zeros_like()?, stabilizer, position))
}

/// A sequence that begins at position 100 or 100 000 gives what it gives from 0 on, in every mechanism.
#[test]
fn rotary_is_relative() -> Result<()> {
    let x = (Tensor::arange(0f64, 11.0 * 16.0, &Device::Cpu)? * 0.7)?.sin()?.reshape((1, 11, 16))?;
    for name in Mechanism::NAMES {
        let mut mechanism = Mechanism::named(name)?;
        if mechanism.is_recurrent() {
            // Without positions.
            continue;
        }
        match &mut mechanism {
            Mechanism::Diag { block, .. } => *block = 5,
            Mechanism::Flash { chunk, .. } => *chunk = 5,
            _ => {}
        }
        let heads = if mechanism.is_gated_unit() { 1 } else { 2 };
        let plain = AttentionConfig::new(16, heads, mechanism);
        let config = AttentionConfig { rotary: Some(10000.0.into()), ..plain.clone() };
        let build = |config: &AttentionConfig| -> Result<Attention> {
            let variables = VarMap::new();
            let layer = Attention::new(config, seeded_weights(&variables, 0, DType::F64, &Device::Cpu))?;
            // The scale of gated units is small at first.
            let data = variables.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            data.get("gamma").map_or(Ok(()), |gamma| gamma.set(&gamma.ones_like()?))?;
            Ok(layer)
        };
        let layer = build(&config)?;
        let whole = layer.forward_masked(&x, None)?;
        let largest = whole.abs()?.max_all()?.to_scalar::<f64>()?;
        let distance =
            |a: &Tensor| -> Result<f64> { (a - &whole)?.abs()?.max_all()?.to_scalar::<f64>().map(|d| d / largest) };
        for position in [100, 100_000] {
            let mut cache = layer.cache()?;
            if let Contents::Sums(_) = cache.contents {
                let mut first = layer.cache()?;
                layer.forward_cached(&x, &mut first)?;
                let Contents::Sums(Some(state)) = &first.contents else { candle_core::bail!("{name}: no state") };
                cache.contents = Contents::Sums(Some(begun(state, position)?));
            }
            (cache.position, cache.batch) = (position, Some(1));
            let shifted = distance(&layer.forward_cached(&x, &mut cache)?)?;
            assert!(shifted < 1e-8, "{name} at {position}: {shifted:e}");
        }
        // Rotation matters.
        let without = build(&plain)?.forward_masked(&x, None)?;
        assert!(distance(&without)? > 1e-6, "{name}");
    }
    Ok(())
}
