//! What the hardware would need at least.

use super::tensor::Float;

/// Published rates of a GPU: bytes per second, and operations per second of dense matrix products.
struct Rates {
    /// Part of the driver's name for it; the first match counts.
    name: &'static str,
    bytes: f64,
    half: f64,
    tf32: f64,
    double: f64,
}

const KNOWN: [Rates; 6] = [
    Rates { name: "H200", bytes: 4.8e12, half: 989e12, tf32: 494e12, double: 67e12 },
    Rates { name: "H100 PCIe", bytes: 2.0e12, half: 756e12, tf32: 378e12, double: 51e12 },
    Rates { name: "H100 NVL", bytes: 3.9e12, half: 835e12, tf32: 417e12, double: 60e12 },
    Rates { name: "H100 80GB HBM3", bytes: 3.35e12, half: 989e12, tf32: 494e12, double: 67e12 },
    Rates { name: "A100-SXM4-80GB", bytes: 2.039e12, half: 312e12, tf32: 156e12, double: 19.5e12 },
    Rates { name: "A100", bytes: 1.555e12, half: 312e12, tf32: 156e12, double: 19.5e12 },
];

/// The longer of the times that the counted operations and bytes take at published rates, in seconds, if the device is
/// known. Products of f32 are taken as three of tf32.
pub fn seconds(device: &str, float: Float, flops: f64, bytes: f64) -> Option<f64> {
    let rates = KNOWN.iter().find(|rates| device.contains(rates.name))?;
    let flops_per_s = match float {
        Float::Bf16 | Float::F16 => rates.half,
        Float::F32 => rates.tf32 / 3.0,
        Float::F64 => rates.double,
    };
    Some((flops / flops_per_s).max(bytes / rates.bytes))
}
