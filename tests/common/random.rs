//! Seeded numbers, the same in every run.

use attn_kernels::reference::Array;

/// splitmix64
pub struct Random(u64);

impl Random {
    /// A stream of its own for every name.
    pub fn new(name: &str) -> Self {
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, b| (hash ^ b as u64).wrapping_mul(0x100_0000_01b3));
        Self(hash)
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// In (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Normal entries of standard deviation `std`.
    pub fn array(&mut self, shape: [usize; 4], std: f64) -> Array {
        Array::from_fn(shape, |_| std * self.normal())
    }
}
