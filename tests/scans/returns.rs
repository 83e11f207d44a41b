//! Returns and advantages, as their users meet them.

use attn_kernels::{discounted_returns, generalized_advantages};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::random::Random;

/// An agent in a corridor of five places learns to walk right, where the reward is, from its advantages.
#[test]
fn a_policy_learns_from_its_advantages() -> Result<()> {
    const PLACES: usize = 5;
    const STEPS: usize = 20;
    let dev = &Device::Cpu;
    let mut random = Random::new("corridor");
    let logits = Var::zeros((PLACES, 2), DType::F32, dev)?;
    let values = Var::zeros(PLACES + 1, DType::F32, dev)?;
    let mut mean_return = Vec::new();
    for _ in 0..150 {
        let chances = candle_nn::ops::softmax(&logits, 1)?.to_vec2::<f32>()?;
        let (mut places, mut actions, mut rewards, mut ends) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut place = 0;
        for _ in 0..STEPS {
            let right = random.uniform() < f64::from(chances[place][1]);
            places.push(place as u32);
            actions.push(u32::from(right));
            place = if right { place + 1 } else { place.saturating_sub(1) };
            let is_end = place == PLACES;
            rewards.push(if is_end { 1f32 } else { -0.05 });
            ends.push(u8::from(is_end));
            place = if is_end { 0 } else { place };
        }
        let row = |x: Tensor| x.unsqueeze(0);
        let (rewards, ends) = (row(Tensor::new(rewards, dev)?)?, row(Tensor::new(ends, dev)?)?);
        let seen = values.index_select(&Tensor::new([&places[..], &[place as u32]].concat(), dev)?, 0)?.unsqueeze(0)?;
        let advantages = generalized_advantages(&rewards, &seen.detach(), 0.95, 0.9, &ends)?.squeeze(0)?;
        let returns = discounted_returns(&rewards, 0.95, &ends)?;
        mean_return.push(returns.mean_all()?.to_scalar::<f32>()?);
        let chosen = candle_nn::ops::log_softmax(&logits, 1)?
            .index_select(&Tensor::new(places, dev)?, 0)?
            .gather(&Tensor::new(actions, dev)?.unsqueeze(1)?, 1)?
            .squeeze(1)?;
        let off = (seen.narrow(1, 0, STEPS)? - returns)?.sqr()?.mean_all()?;
        let loss = (off - (chosen * advantages)?.mean_all()?)?;
        let gradients = loss.backward()?;
        for var in [&logits, &values] {
            let gradient = gradients.get(var).expect("a gradient").clone();
            var.set(&(var.as_tensor() - (gradient * 1.0)?)?)?;
        }
    }
    let mean = |range: &[f32]| range.iter().sum::<f32>() / range.len() as f32;
    let (first, last) = (mean(&mean_return[..10]), mean(&mean_return[140..]));
    assert!(last > first + 0.3 && last > 0.5, "{first} to {last}");
    Ok(())
}
