//! Multi-query associative recall (Arora et al. 2023): pairs of a key and a value, then every key again, in another
//! order, each of which must be answered by its value.

use candle_core::{Device, Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Keys are the tokens below this, values the same number of tokens above.
pub const KEYS: usize = 128;

pub struct Task {
    /// u32 `[batch, 3 · pairs]`: key, value, key, value …, then the keys asked for
    pub tokens: Tensor,
    /// u32 `[batch, pairs]`: for each of the last `pairs` tokens the number of its value
    pub answers: Tensor,
}

impl Task {
    /// A function of `seed` and `stream` alone; `pairs` is at most [`KEYS`].
    pub fn random(batch: usize, pairs: usize, seed: u64, stream: u64, device: &Device) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(stream);
        let mut below = |limit: usize| (random.next_u64() % limit as u64) as usize;
        let (mut tokens, mut answers) = (Vec::new(), Vec::new());
        for _ in 0..batch {
            let keys = first_of_shuffled((0..KEYS as u32).collect(), pairs, &mut below);
            let pairs: Vec<_> = keys.into_iter().map(|key| (key, below(KEYS) as u32)).collect();
            let asked = first_of_shuffled(pairs.clone(), pairs.len(), &mut below);
            tokens.extend(pairs.iter().flat_map(|&(key, value)| [key, KEYS as u32 + value]));
            tokens.extend(asked.iter().map(|&(key, _)| key));
            answers.extend(asked.iter().map(|&(_, value)| value));
        }
        Ok(Self {
            tokens: Tensor::from_vec(tokens, (batch, 3 * pairs), device)?,
            answers: Tensor::from_vec(answers, (batch, pairs), device)?,
        })
    }
}

/// `count` different items in random order (Fisher and Yates).
fn first_of_shuffled<T>(mut items: Vec<T>, count: usize, below: &mut impl FnMut(usize) -> usize) -> Vec<T> {
    for i in 0..count {
        let other = i + below(items.len() - i);
        items.swap(i, other);
    }
    items.truncate(count);
    items
}
