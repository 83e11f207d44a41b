//! Padding on any side leaves the outputs and gradients of the other tokens as they are without it.

use attn_kernels::nn::{Block, LanguageModel, LanguageModelConfig, Mechanism, seeded_weights};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarMap;

use super::{WIDTH, assert_close, enlarge, is_trained, layer, layers_both_ways, random};

/// Visible tokens of every sequence.
const TOKENS: usize = 13;
/// With padding.
const ROWS: usize = 20;

/// Where the visible tokens of three sequences stand: on the left, on the right, in between; in the second batch some
/// have neighbours that are removed.
fn places() -> [[Vec<usize>; 3]; 2] {
    let range = |from: usize| (from..from + TOKENS).collect::<Vec<_>>();
    let holes = |at: &[usize]| (0..ROWS).filter(|row| !at.contains(row)).collect();
    [[range(0), range(7), range(3)], [range(7), holes(&[0, 1, 5, 6, 9, 18, 19]), holes(&[2, 3, 4, 8, 13, 15, 17])]]
}

/// `[3, ROWS]`, 1 at the places.
fn mask(places: &[Vec<usize>]) -> Result<Tensor> {
    let row = |places: &Vec<usize>| (0..ROWS).map(|row| u8::from(places.contains(&row))).collect::<Vec<_>>();
    let rows: Vec<u8> = places.iter().flat_map(row).collect();
    Tensor::from_vec(rows, (places.len(), ROWS), &Device::Cpu)
}

/// The rows at the places, `[3, TOKENS, …]`.
fn visible(rows: &Tensor, places: &[Vec<usize>]) -> Result<Tensor> {
    let indices = |places: &Vec<usize>| places.iter().map(|place| *place as u32).collect::<Vec<_>>();
    let pick = |(index, places)| rows.get(index)?.index_select(&Tensor::new(indices(places), &Device::Cpu)?, 0);
    Tensor::stack(&places.iter().enumerate().map(pick).collect::<Result<Vec<_>>>()?, 0)
}

/// ⟨y, fixed random numbers⟩
fn loss(y: &Tensor) -> Result<Tensor> {
    (y * random("loss", y.dims())?)?.sum_all()
}

/// Compares outputs and the gradients of all weights (and of x) of a padded batch with those of the batch without
/// padding.
fn compare(
    what: &str,
    places: &[Vec<usize>],
    variables: &VarMap,
    forward: impl Fn(bool) -> Result<(Tensor, Vec<Tensor>)>,
) -> Result<()> {
    let (padded, padded_inputs) = forward(true)?;
    let (plain, plain_inputs) = forward(false)?;
    let padded = visible(&padded, places)?;
    assert_close(&padded, &plain, 1e-11, what)?;
    let (padded, plain) = (loss(&padded)?.backward()?, loss(&plain)?.backward()?);
    for (name, variable) in variables.data().lock().unwrap().iter().filter(|(name, _)| is_trained(name)) {
        let (Some(a), Some(b)) = (padded.get(variable), plain.get(variable)) else { panic!("{what}: {name}") };
        let scale = 1.0 + b.abs()?.max_all()?.to_scalar::<f64>()?;
        assert_close(a, b, 1e-10 * scale, &format!("{what}: gradient of {name}"))?;
    }
    for (a, b) in padded_inputs.iter().zip(&plain_inputs) {
        let (Some(a), Some(b)) = (padded.get(a), plain.get(b)) else { panic!("{what}: no gradient of the input") };
        assert_close(&visible(a, places)?, b, 1e-10, &format!("{what}: gradient of the input"))?;
    }
    Ok(())
}

#[test]
fn of_layers() -> Result<()> {
    for config in layers_both_ways() {
        let (variables, layer) = layer(&config)?;
        for places in places() {
            let x = random("padded", &[3, ROWS, WIDTH])?;
            let mask = mask(&places)?;
            compare(&format!("{config:?} at {places:?}"), &places, &variables, |padded| {
                let x = Var::from_tensor(&if padded { x.clone() } else { visible(&x, &places)? })?;
                let y = layer.forward_masked(&x, padded.then_some(&mask))?;
                Ok((y, vec![x.as_tensor().clone()]))
            })?;
        }
    }
    Ok(())
}

#[test]
fn of_language_models() -> Result<()> {
    let tokens = Tensor::from_vec((0..3 * ROWS as u32).map(|i| i * i % 11).collect(), (3, ROWS), &Device::Cpu)?;
    for name in LanguageModelConfig::NAMES {
        let mut config = LanguageModelConfig::named(name, 11, 16, 3, 2)?;
        for mechanism in std::iter::once(&mut config.attention.mechanism).chain(&mut config.second_half) {
            match mechanism {
                Mechanism::Diag { block, .. } => *block = 6,
                Mechanism::Flash { chunk, .. } => *chunk = 6,
                Mechanism::Performer { epsilon, .. } => *epsilon = 0.0,
                _ => {}
            }
        }
        let variables = VarMap::new();
        let model = LanguageModel::new(&config, seeded_weights(&variables, 1, DType::F64, &Device::Cpu))?;
        enlarge(&variables)?;
        for places in places() {
            let mask = mask(&places)?;
            compare(&format!("{name} at {places:?}"), &places, &variables, |padded| {
                let tokens = if padded { tokens.clone() } else { visible(&tokens, &places)? };
                Ok((model.forward_masked(&tokens, padded.then_some(&mask))?, Vec::new()))
            })?;
            // Block by block, as in a model of one's own.
            let x = random("rows", &[3, ROWS, 16])?;
            for block in model.blocks().iter().filter(|block| !needs_first_values(block)) {
                let padded = visible(&block.forward_masked(&x, Some(&mask))?, &places)?;
                assert_close(&padded, &block.forward_masked(&visible(&x, &places)?, None)?, 1e-11, name)?;
            }
        }
    }
    Ok(())
}

/// RWKV-7 behind the first layer works in a model alone.
fn needs_first_values(block: &Block) -> bool {
    matches!(block.attention().config().mechanism, Mechanism::Rwkv7 { place: Some([layer, _]), .. } if layer > 0)
}

/// NaN in the rows of padding reaches no other row.
#[test]
fn holds_anything() -> Result<()> {
    let [places, _] = places();
    let mask = mask(&places)?;
    let x = random("padded", &[3, ROWS, WIDTH])?;
    let keep = mask.unsqueeze(2)?.broadcast_as(x.shape())?;
    let poisoned = keep.where_cond(&x, &Tensor::full(f64::NAN, x.shape(), &Device::Cpu)?)?;
    for config in layers_both_ways() {
        let (_, layer) = layer(&config)?;
        let [a, b] = [&x, &poisoned].map(|x| visible(&layer.forward_masked(x, Some(&mask))?, &places));
        assert_close(&a?, &b?, 0.0, &format!("{config:?}"))?;
    }
    Ok(())
}
