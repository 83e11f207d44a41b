use serde::{Deserialize, Serialize};

/// How fast the heads of [lightning attention](super::super::Mechanism::Lightning) forget: the log-decay of head h of H, in
/// layer l of L.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slopes {
    /// −2^{−8(h+1)/H}·(1 − l/(L − 1 + 1e-5) + 1e-5), as in MiniMax-Text-01.
    #[default]
    Geometric,
    /// −8h/H·(1 − l/L), as in flash-linear-attention.
    Linear,
}

impl Slopes {
    /// One for every head.
    pub(super) fn log_decay(self, heads: usize, [layer, layers]: [usize; 2]) -> Vec<f64> {
        let (layer, layers, count) = (layer as f64, layers as f64, heads as f64);
        let slope = |head: usize| match self {
            Self::Geometric => {
                let rest = 1.0 - layer / (layers - 1.0 + 1e-5) + 1e-5;
                -(-8.0 * (head as f64 + 1.0) / count).exp2() * rest
            }
            Self::Linear => -8.0 * head as f64 / count * (1.0 - layer / layers),
        };
        (0..heads).map(slope).collect()
    }
}
