use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::config::yes;
use super::defaults;
use super::recurrent::Slopes;
use crate::Error;
use crate::gau::{GauNorm, GlobalNorm};
use crate::linear::FeatureMap;
use crate::performer::FavorMap;
use crate::random_features::FeatureKind;
use crate::transnormer::{DiagWeight, NormScope};

/// The kinds of attention and their choices.
///
/// In JSON a mechanism is an object with its `kind` in snake case, and every other field may be left out, as in
/// `{ "kind": "performer", "features": 128 }`. The layers' weights are listed at [`Attention`](super::Attention).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Mechanism {
    /// [Softmax attention](crate::candle::softmax_attention).
    Softmax {
        /// Keys that a token sees: itself and the w − 1 before it (and after it when not causal). Default: all.
        #[serde(default)]
        window: Option<usize>,
        /// Soft-cap c of the scores, c·tanh(s/c). Default: none.
        #[serde(default)]
        soft_cap: Option<f64>,
    },
    /// [Linear attention](crate::candle::linear_attention).
    Linear {
        /// φ. Default elu + 1.
        #[serde(default)]
        map: FeatureMap,
        /// Whether rows are divided by ⟨φ(q), z⟩ + 1e-6. Default: yes.
        #[serde(default = "yes")]
        normalized: bool,
    },
    /// [Performer attention](crate::candle::performer_attention).
    Performer {
        /// m, random directions. Default 256.
        #[serde(default = "defaults::features")]
        features: usize,
        /// How the directions are drawn. Default: orthogonal.
        #[serde(default = "defaults::feature_kind")]
        directions: FeatureKind,
        /// Seed of the directions of a new layer. A layer that is loaded has those of its checkpoint. Default 0.
        #[serde(default)]
        seed: u64,
        /// The features. Default: positive.
        #[serde(default)]
        map: FavorMap,
        /// ε ≥ 0, added to the divisor. Default 1e-6. The divisor is relative to the largest exponents seen, so with ε
        /// above 0 the gradient is inexact by as much as ε weighs in it.
        #[serde(default = "defaults::epsilon")]
        epsilon: f64,
    },
    /// [NormAttention](crate::candle::norm_attention) of TransNormer.
    Norm {
        /// φ. Default elu + 1.
        #[serde(default)]
        map: FeatureMap,
        /// ε > 0 under the root of the norm. Default 1e-6.
        #[serde(default = "defaults::epsilon")]
        epsilon: f64,
        /// Norm per head or over all heads. Default: per head.
        #[serde(default)]
        scope: NormScope,
    },
    /// [DiagAttention](crate::candle::diag_attention) of TransNormer.
    Diag {
        /// Positions in a block. Default 64.
        #[serde(default = "defaults::block")]
        block: usize,
        /// Softmax or ReLU. Default: softmax.
        #[serde(default = "defaults::diag_weight")]
        weight: DiagWeight,
    },
    /// Retention (RetNet, Sun et al. 2023): [NormAttention](crate::candle::norm_attention) of plain q and k with a decay
    /// per head, o = silu(x W_g) ⊙ RMSNorm(t).
    Retention {
        /// Log-decay g_h ≤ 0 of every head of keys and values. Default: ln γ_h with γ_h = 1 − 2^{−5−h}.
        #[serde(default)]
        log_decay: Option<Vec<f64>>,
        /// Whether the output passes the gate silu(x W_g). Default: yes.
        #[serde(default = "yes")]
        gate: bool,
        /// ε > 0 under the root of the norm per head. Default 1e-6.
        #[serde(default = "defaults::epsilon")]
        epsilon: f64,
    },
    /// Gated attention unit (Hua et al. 2022): [`gau_attention`](crate::candle::gau_attention) between gates, in the
    /// place of attention and feed-forward.
    Gau {
        /// s, the width of queries and keys. Default 128.
        #[serde(default = "defaults::key_width")]
        key_width: usize,
        /// Width of values and gate, in units of `width`. Default 2.
        #[serde(default = "defaults::expansion")]
        expansion: usize,
        /// Scaling of the weights. Default: the sum of the row with ε = 1e-6, which does not depend on the length.
        #[serde(default = "defaults::gau_norm")]
        norm: GauNorm,
        /// R ≥ 1 of the relative bias: distances up to R have a number each, those beyond share the last. `None`: no
        /// bias. Default 128.
        #[serde(default = "defaults::reach")]
        bias_reach: Option<usize>,
    },
    /// FLASH (Hua et al. 2022): [`mixed_chunk_attention`](crate::candle::mixed_chunk_attention) between gates, in the
    /// place of attention and feed-forward, with a relative bias inside chunks.
    Flash {
        /// C, positions in a chunk. Default 256.
        #[serde(default = "defaults::chunk")]
        chunk: usize,
        /// s, the width of queries and keys. Default 128.
        #[serde(default = "defaults::key_width")]
        key_width: usize,
        /// Width of values and gate, in units of `width`. Default 2.
        #[serde(default = "defaults::expansion")]
        expansion: usize,
        /// Scaling of the part between chunks. Default: the mean over finished chunks.
        #[serde(default)]
        global_norm: GlobalNorm,
    },
    /// Gated linear attention (GLA, Yang et al. 2023): [`gated_linear_attention`](crate::candle::gated_linear_attention) with
    /// g = ln sigmoid(x W_gk)/c per channel of the keys, an RMS norm per head and an output gate silu(x W_g).
    Gla {
        /// Width of a head of queries and keys. Default: half of `head_width`.
        #[serde(default)]
        key_width: Option<usize>,
        /// Width between the two factors of W_gk. Default 16.
        #[serde(default = "defaults::low_rank")]
        low_rank: usize,
        /// c > 0. Default 16.
        #[serde(default = "defaults::gate_divisor")]
        gate_divisor: f64,
        /// Taps of the [short convolutions](crate::candle::causal_convolution) of queries, keys and values, with SiLU.
        /// Default: none.
        #[serde(default)]
        convolution: Option<usize>,
        /// ε > 0 under the root of the norm. Default 1e-5.
        #[serde(default = "defaults::norm_epsilon")]
        epsilon: f64,
    },
    /// DeltaNet (Yang et al. 2024): [`delta_attention`](crate::candle::delta_attention) of l2-normalised queries and keys with
    /// β = sigmoid(x W_b), behind short convolutions, and an RMS norm per head.
    Deltanet {
        /// Width of a head of queries and keys. Default: `head_width`.
        #[serde(default)]
        key_width: Option<usize>,
        /// Taps of the short convolutions. Default 4.
        #[serde(default = "defaults::taps")]
        convolution: usize,
        /// Whether the normed output passes the gate silu(x W_g). Default: no.
        #[serde(default)]
        gate: bool,
        /// Whether β is 2·sigmoid(x W_b), so that transitions have eigenvalues down to −1 (Grazzi et al. 2024). Default: no.
        #[serde(default)]
        negative_eigenvalues: bool,
        /// ε > 0 under the root of the norm. Default 1e-5.
        #[serde(default = "defaults::norm_epsilon")]
        epsilon: f64,
    },
    /// Gated DeltaNet (Yang et al. 2024) as in Qwen3-Next and Qwen3.5: DeltaNet with a decay per head and token,
    /// g = −e^A softplus(x W_a + b), and an output gate silu(x W_z) behind the norm. `key_heads` are those of queries and
    /// keys, `heads` those of values.
    GatedDeltanet {
        /// Width of a head of queries and keys. Default: `head_width`.
        #[serde(default)]
        key_width: Option<usize>,
        /// Taps of the short convolutions. Default 4.
        #[serde(default = "defaults::taps")]
        convolution: usize,
        /// ε > 0 under the root of the norm. Default 1e-6.
        #[serde(default = "defaults::epsilon")]
        epsilon: f64,
    },
    /// Kimi Delta Attention (Kimi Team 2025): DeltaNet with a decay per channel of the keys,
    /// g = −e^A softplus(x W_fa W_fb + b), and an output gate sigmoid(x W_ga W_gb) behind the norm.
    Kda {
        /// Taps of the short convolutions. Default 4.
        #[serde(default = "defaults::taps")]
        convolution: usize,
        /// ε > 0 under the root of the norm. Default 1e-5.
        #[serde(default = "defaults::norm_epsilon")]
        epsilon: f64,
    },
    /// Mamba-2 (Dao & Gu 2024): [`linear_attention`](crate::candle::linear_attention) of C, B and Δx with
    /// g = −e^A Δ and Δ = softplus(x W_Δ + b) per head, a skip D ⊙ x, and an RMS norm of all heads behind the gate silu(z).
    /// `key_heads` are the groups of B and C, 1 by default, `head_width` is that of x, 2 · `width` / `heads` by default. A block
    /// of it usually has no feed-forward part.
    Mamba2 {
        /// Width of a head of B and C: the state size of the paper. Default 128.
        #[serde(default = "defaults::key_width")]
        key_width: usize,
        /// Taps of the short convolution of x, B and C. Default 4.
        #[serde(default = "defaults::taps")]
        convolution: usize,
        /// Whether the convolution has a bias. Default: yes.
        #[serde(default = "yes")]
        convolution_bias: bool,
        /// ε > 0 under the root of the norm. Default 1e-5.
        #[serde(default = "defaults::norm_epsilon")]
        epsilon: f64,
    },
    /// Mamba (Gu & Dao 2023): [`selective_scan`](crate::candle::selective_scan) of convolved rows between gates. One head, whose
    /// `head_width` is the inner width, 2 · `width` by default. A block of it usually has no feed-forward part.
    Mamba {
        /// Numbers in the state of a channel. Default 16.
        #[serde(default = "defaults::states")]
        states: usize,
        /// Width of the rows that Δ is made of. Default: a sixteenth of `width`, rounded up.
        #[serde(default)]
        rank: Option<usize>,
        /// Taps of the short convolution. Default 4.
        #[serde(default = "defaults::taps")]
        convolution: usize,
        /// Whether the convolution has a bias. Default: yes.
        #[serde(default = "yes")]
        convolution_bias: bool,
    },
    /// Lightning attention (Qin et al. 2024) as in MiniMax-Text-01: [`linear_attention`](crate::candle::linear_attention) of
    /// silu(x W_qkv) with a decay per head, an RMS norm of all heads, and an output gate sigmoid(x W_o) behind it.
    Lightning {
        /// How fast the heads forget. Default: geometric.
        #[serde(default)]
        slopes: Slopes,
        /// The layer's number, from 0, and how many there are: deeper layers forget more slowly. Default: in a model those of
        /// the block, alone 0 of 1.
        #[serde(default)]
        place: Option<[usize; 2]>,
        /// ε > 0 under the root of the norm. Default 1e-6.
        #[serde(default = "defaults::epsilon")]
        epsilon: f64,
    },
    /// RWKV-7 (Peng et al. 2025): [`generalized_delta_attention`](crate::candle::generalized_delta_attention) of rows that are
    /// mixed with those before, with a decay and a rate of learning per channel, a norm of every head, a bonus for a token's
    /// own key, and a gate. Layers behind the first mix their values with those of the first.
    Rwkv7 {
        /// Widths between the two factors of what makes w, a, the share of the first values, and the gate. Default: those of
        /// RWKV-LM, c·√width in steps of 32, 32 at least, with c of 2.5, 2.5, 1.7 and 5.
        #[serde(default)]
        ranks: Option<[usize; 4]>,
        /// The layer's number among those of RWKV-7, from 0, and how many there are. That of number 0 hands its values on to
        /// the others; these work in a [`LanguageModel`](super::LanguageModel) alone. Default: in a model those of the block,
        /// alone 0 of 1.
        #[serde(default)]
        place: Option<[usize; 2]>,
        /// ε > 0 under the root of the norm. Default 64e-5.
        #[serde(default = "defaults::group_epsilon")]
        epsilon: f64,
    },
    /// S4D (Gu et al. 2022): a state-space model with a diagonal complex A for every channel, by its kernel inside chunks of
    /// tokens and by its recurrence between them; GELU and a gated linear unit behind. It begins as S4D-Lin. `heads` is 1. A
    /// block of it usually has no feed-forward part.
    S4d {
        /// Complex numbers in the state of a channel, each for a pair of conjugates: half of the paper's N. Default 32.
        #[serde(default = "defaults::complex_states")]
        states: usize,
    },
    /// Linear recurrent unit (LRU, Orvieto et al. 2023): [`complex_diagonal_scan`](crate::candle::complex_diagonal_scan) between
    /// complex matrices; GELU and a gated linear unit behind. `heads` is 1. A block of it usually has no feed-forward part.
    Lru {
        /// Complex numbers in the state. Default: `width`.
        #[serde(default)]
        states: Option<usize>,
        /// Where |λ| of the eigenvalues begins, 0 ≤ inner < outer ≤ 1: even on the ring. Default 0 and 1.
        #[serde(default = "defaults::radii")]
        radii: [f64; 2],
        /// Their arguments begin between 0 and this, at most 2π. Default 2π.
        #[serde(default = "defaults::phase")]
        phase: f64,
    },
}

impl Default for Mechanism {
    /// Softmax over all keys.
    fn default() -> Self {
        Self::Softmax { window: None, soft_cap: None }
    }
}

impl Mechanism {
    /// The names of all kinds.
    pub const NAMES: [&'static str; 18] = [
        "softmax",
        "linear",
        "performer",
        "norm",
        "diag",
        "retention",
        "gau",
        "flash",
        "gla",
        "deltanet",
        "gated_deltanet",
        "kda",
        "mamba2",
        "mamba",
        "lightning",
        "rwkv7",
        "s4d",
        "lru",
    ];

    /// The mechanism of that [name](Self::NAMES) with its defaults.
    ///
    /// # Errors
    /// A name that is not in the list.
    pub fn named(name: &str) -> Result<Self> {
        if !Self::NAMES.contains(&name) {
            let (got, needs) = (format!("`{name}`"), format!("one of {}", Self::NAMES.join(", ")));
            return Err(Error::Value { function: "Mechanism::named", argument: "name", got, needs }.into());
        }
        // What a configuration may leave out has its default.
        serde_json::from_value(serde_json::json!({ "kind": name })).map_err(candle_core::Error::wrap)
    }

    /// The name of the kind, as in a configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Softmax { .. } => "softmax",
            Self::Linear { .. } => "linear",
            Self::Performer { .. } => "performer",
            Self::Norm { .. } => "norm",
            Self::Diag { .. } => "diag",
            Self::Retention { .. } => "retention",
            Self::Gau { .. } => "gau",
            Self::Flash { .. } => "flash",
            Self::Gla { .. } => "gla",
            Self::Deltanet { .. } => "deltanet",
            Self::GatedDeltanet { .. } => "gated_deltanet",
            Self::Kda { .. } => "kda",
            Self::Mamba2 { .. } => "mamba2",
            Self::Mamba { .. } => "mamba",
            Self::Lightning { .. } => "lightning",
            Self::Rwkv7 { .. } => "rwkv7",
            Self::S4d { .. } => "s4d",
            Self::Lru { .. } => "lru",
        }
    }

    /// Whether the layer has gates of its own and stands in the place of attention and feed-forward.
    pub fn is_gated_unit(&self) -> bool {
        matches!(self, Self::Gau { .. } | Self::Flash { .. })
    }

    /// Whether the layer has a state of a fixed size between convolutions, gates and norms of its own: GLA, the delta rules,
    /// Mamba-2, Mamba, lightning attention, RWKV-7, S4D, LRU. Such layers are causal and have no rotary embedding.
    pub fn is_recurrent(&self) -> bool {
        matches!(
            self,
            Self::Gla { .. }
                | Self::Deltanet { .. }
                | Self::GatedDeltanet { .. }
                | Self::Kda { .. }
                | Self::Mamba2 { .. }
                | Self::Mamba { .. }
                | Self::Lightning { .. }
                | Self::Rwkv7 { .. }
                | Self::S4d { .. }
                | Self::Lru { .. }
        )
    }

    /// Whether a block of it usually has no feed-forward part.
    pub(super) fn stands_alone(&self) -> bool {
        self.has_one_head() || matches!(self, Self::Mamba2 { .. })
    }

    /// Whether the layer has one head.
    pub(super) fn has_one_head(&self) -> bool {
        self.is_gated_unit() || matches!(self, Self::Mamba { .. } | Self::S4d { .. } | Self::Lru { .. })
    }

    /// Width of the rows that Δ of Mamba is made of, in a layer of a width.
    pub(super) fn rank(&self, width: usize) -> usize {
        match self {
            Self::Mamba { rank: Some(rank), .. } => *rank,
            _ => width.div_ceil(16),
        }
    }

    /// Widths between the factors of RWKV-7 for w, a, v and the gate, in a layer of a width.
    pub(super) fn ranks(&self, width: usize) -> [usize; 4] {
        match self {
            Self::Rwkv7 { ranks: Some(ranks), .. } => *ranks,
            _ => [2.5, 2.5, 1.7, 5.0].map(|factor| {
                let steps = (factor * (width as f64).sqrt() / 32.0).round_ties_even() as usize;
                32 * steps.max(1)
            }),
        }
    }
}
