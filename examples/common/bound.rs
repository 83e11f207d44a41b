//! What the hardware would need at least.

use serde::Serialize;

use super::rates::{self, Product};
use super::tensor::Float;

/// Published rates of a GPU: bytes per second, and operations per second of dense matrix products.
struct Published {
    /// Part of the driver's name for it; the first match counts.
    name: &'static str,
    bytes: f64,
    half: f64,
    tf32: f64,
    double: f64,
}

const KNOWN: [Published; 6] = [
    Published { name: "H200", bytes: 4.8e12, half: 989e12, tf32: 494e12, double: 67e12 },
    Published { name: "H100 PCIe", bytes: 2.0e12, half: 756e12, tf32: 378e12, double: 51e12 },
    Published { name: "H100 NVL", bytes: 3.9e12, half: 835e12, tf32: 417e12, double: 60e12 },
    Published { name: "H100 80GB HBM3", bytes: 3.35e12, half: 989e12, tf32: 494e12, double: 67e12 },
    Published { name: "A100-SXM4-80GB", bytes: 2.039e12, half: 312e12, tf32: 156e12, double: 19.5e12 },
    Published { name: "A100", bytes: 1.555e12, half: 312e12, tf32: 156e12, double: 19.5e12 },
];

/// The rates of a device for sums over one type.
pub struct Rates {
    flops: f64,
    /// What the operations are, in words.
    operations: &'static str,
    bytes: Bytes,
}

enum Bytes {
    Published(f64),
    /// Bytes of a copy and their rate, as far as they were asked for.
    Copies(Vec<(usize, f64)>),
}

/// Two times that no implementation of the counted work is below.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// Of the operations, in seconds.
    pub products: f64,
    /// Of the bytes, in seconds.
    pub bytes: f64,
    /// Operations a second.
    pub flops_rate: f64,
    /// Bytes a second.
    pub bytes_rate: f64,
}

impl Bound {
    pub fn seconds(&self) -> f64 {
        self.products.max(self.bytes)
    }

    /// Which of the two it is.
    pub fn of(&self) -> &'static str {
        if self.products >= self.bytes { "flops" } else { "bytes" }
    }
}

/// A measured time beside its bound, as it is printed and written.
#[derive(Debug, Clone, Serialize)]
pub struct Share {
    bound_ms: f64,
    /// `flops` or `bytes`
    bound_by: &'static str,
    /// The bound over the time; above 1 where bytes stayed in a cache that the copy left.
    share_of_bound: f64,
    /// The rates behind the bound.
    bound_gflops: f64,
    bound_gbytes_per_s: f64,
}

impl Share {
    pub fn new(bound: &Bound, seconds: f64) -> Self {
        Self {
            bound_ms: bound.seconds() * 1e3,
            bound_by: bound.of(),
            share_of_bound: bound.seconds() / seconds,
            bound_gflops: bound.flops_rate / 1e9,
            bound_gbytes_per_s: bound.bytes_rate / 1e9,
        }
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} % {}", self.share_of_bound * 100.0, self.bound_by)
    }
}

impl Rates {
    /// Of the CPU: measured, on the current pool of threads. Of a GPU: published, if the device is known; products of
    /// f32 are taken as three of tf32.
    pub fn of(device: &str, float: Float) -> Option<Self> {
        if device == "cpu" {
            let Product { flops, operations } = rates::product(float);
            return Some(Self { flops, operations, bytes: Bytes::Copies(Vec::new()) });
        }
        let published = KNOWN.iter().find(|published| device.contains(published.name))?;
        let (flops, operations) = match float {
            Float::Bf16 | Float::F16 => (published.half, "dense products of 16 bits"),
            Float::F32 => (published.tf32 / 3.0, "products of f32 as three of tf32"),
            Float::F64 => (published.double, "products of f64"),
        };
        Some(Self { flops, operations, bytes: Bytes::Published(published.bytes) })
    }

    /// The bound of so many operations and bytes. On the CPU the rate of bytes is that of a copy of as many, which is
    /// in the cache if they are: bytes read and bytes written count.
    pub fn bound(&mut self, flops: f64, bytes: f64) -> Bound {
        let bytes_rate = match &mut self.bytes {
            Bytes::Published(rate) => *rate,
            Bytes::Copies(copies) => {
                let size = bytes as usize;
                match copies.iter().find(|(known, _)| *known == size) {
                    Some((_, rate)) => *rate,
                    None => {
                        let rate = rates::copy(size);
                        copies.push((size, rate));
                        rate
                    }
                }
            }
        };
        Bound { products: flops / self.flops, bytes: bytes / bytes_rate, flops_rate: self.flops, bytes_rate }
    }

    /// What shares of the bound are relative to, in a sentence.
    pub fn describe(&self) -> String {
        let flops = format!("{:.0} GFLOP/s ({})", self.flops / 1e9, self.operations);
        match &self.bytes {
            Bytes::Published(rate) => {
                format!(
                    "the longer of counted operations at {flops} and bytes at {:.0} GB/s, published rates",
                    rate / 1e9
                )
            }
            Bytes::Copies(copies) => {
                let largest = copies.iter().max_by_key(|(size, _)| *size);
                let at = largest.map_or(String::new(), |(size, rate)| {
                    format!(" ({:.1} GB/s for {:.0} MB)", rate / 1e9, *size as f64 / 1e6)
                });
                format!("the longer of counted operations at {flops} and a copy of as many bytes{at}, measured here")
            }
        }
    }
}
