use super::ensure_value;
use crate::Result;

/// Dropout of attention weights (Vaswani et al. 2017), behind their normalisation:
///
/// ```text
/// o_i = Σ_j m_ij w_ij v_j / (1 − p),   m_ij = 0 with probability p, else 1
/// ```
///
/// Random numbers are counted, not drawn: m_ij depends on the seed, the batch entry (of packed sequences: the sequence), the
/// query's head, and the query's and the key's index, and on nothing else. So the backward pass makes the mask again, and it is
/// the same with any instruction set, number of threads and order of computation. Every call needs a seed of its own: one that
/// has been used gives the same mask.
///
/// The generator is Philox 4×32-10 (Salmon et al. 2011): the key is the seed, its low word first, the counter
/// (⌊j/4⌋, i, head, batch entry); of the four words, the pair has word j mod 4, and is dropped where that is below p·2³².
///
/// ```
/// use attn_kernels::Dropout;
///
/// let dropout = Dropout { p: 0.25, seed: 7 };
/// let kept = (0..4000).filter(|&key| dropout.keeps([0, 0, 0, key])).count();
/// assert!((2900..3100).contains(&kept));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability that a weight is dropped, from 0, which drops none, to below 1.
    pub p: f64,
    /// Of the mask.
    pub seed: u64,
}

/// Factors of a round, and what is added to the words of the key.
pub(crate) const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
pub(crate) const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
pub(crate) const ROUNDS: u32 = 10;

/// Philox 4×32-10
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let product = |i: usize| u64::from(MULTIPLIERS[i]) * u64::from(counter[2 * i]);
        let halves = [product(0), product(1)].map(|x| [(x >> 32) as u32, x as u32]);
        let [[high0, low0], [high1, low1]] = halves;
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

impl Dropout {
    /// Whether the weight of (batch entry, head, query, key) is kept.
    pub fn keeps(&self, [batch, head, query, key]: [usize; 4]) -> bool {
        let counter = [key / 4, query, head, batch].map(|index| index as u32);
        u64::from(philox(counter, self.key())[key % 4]) >= self.threshold()
    }

    /// What the weight of (batch entry, head, query, key) is multiplied by: 0 or 1/(1 − p).
    pub fn factor(&self, pair: [usize; 4]) -> f64 {
        if self.keeps(pair) { self.scale() } else { 0.0 }
    }

    /// 1/(1 − p)
    pub(crate) fn scale(&self) -> f64 {
        1.0 / (1.0 - self.p)
    }

    /// The seed in two words.
    pub(crate) fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Words below it are dropped.
    pub(crate) fn threshold(&self) -> u64 {
        (self.p * 2f64.powi(32)) as u64
    }

    /// Itself, unless it drops nothing.
    pub(super) fn checked(self, function: &'static str) -> Result<Option<Self>> {
        ensure_value((0.0..1.0).contains(&self.p), function, "dropout", self.p, "a probability from 0 to below 1")?;
        Ok(Some(self).filter(|dropout| dropout.threshold() > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that are published with the generator.
    #[test]
    fn known_answers() {
        let all = u32::MAX;
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([all; 4], [all; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn probabilities() {
        for p in [0.1, 0.5, 0.9] {
            let dropout = Dropout { p, seed: 1 << 40 };
            let kept = (0..40_000).filter(|&at| dropout.keeps([at % 2, at / 2 % 3, at / 6 % 40, at / 240])).count();
            let deviation = (kept as f64 - 40_000.0 * (1.0 - p)) / (40_000.0 * p * (1.0 - p)).sqrt();
            assert!(deviation.abs() < 3.0, "{p}: {kept} kept");
        }
        assert_eq!(Dropout { p: 0.0, seed: 3 }.checked("f").unwrap(), None);
        for p in [1.0, -0.1, f64::NAN, f64::INFINITY] {
            assert!(Dropout { p, seed: 3 }.checked("f").is_err(), "{p}");
        }
    }
}
