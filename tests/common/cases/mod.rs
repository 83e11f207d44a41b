//! Cases are data: what is computed on which sizes, and why.

mod beside;
mod linear;
mod long;
mod mixed_chunk;
mod norm;
mod performer;
mod quadratic;

use attn_kernels::Sequences;
use attn_kernels::gau::{GauOptions, MixedChunkOptions};
use attn_kernels::linear::LinearOptions;
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::{DType, Dropout, Mask};
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{DiagOptions, NormOptions};

use super::buffers::Layout;

pub use linear::linear;
pub use long::long_sums;
pub use mixed_chunk::mixed_chunk;
pub use norm::norm;
pub use performer::performer;
pub use quadratic::{diag, gau, softmax};

/// How an optional tensor of the options is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// Key mask: the first key and about a quarter of the others removed, not the same ones in every batch entry.
    SomeKeys,
    /// Key mask: as `SomeKeys`, and batch entry 0 keeps none.
    NoKeys,
    /// Bias: one row for all heads.
    Shared,
    /// Bias or log-decay.
    PerHead,
    /// Log-decay of about −0.1.
    PerToken,
    /// Log-decay per token, 0 or about −30: products of a few factors underflow.
    Strong,
    /// Log-decay per token, all 0.
    Zero,
    /// Log-decay per token of about −0.1, and every ninth so strong that nothing is left: −∞, the lowest f32 and others.
    Resets,
    /// Log-decay per token, all this many times −1/10 000.
    Constant(u32),
    /// Attention bias that has these of batch entries, heads, queries and keys; sinks: `Entry::Own` or `Entry::Wide`.
    Pairs([bool; 4], Entry),
}

/// Entries of an attention bias or sinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Numbers in the dtype of q.
    Own,
    /// Numbers in f32.
    Wide,
    /// Numbers in the dtype of q, a fifth of them and every entry of the second row −∞.
    Holes,
    /// The same pairs removed by a mask.
    Keep,
}

/// A public operation with its options.
#[derive(Debug, Clone)]
pub enum Operation {
    Softmax(SoftmaxOptions<Extra>),
    Diag(DiagOptions<Extra>),
    Gau(GauOptions<Extra>),
    Linear(LinearOptions<Extra>),
    /// With the number of random directions.
    Performer(PerformerOptions<Extra>, usize),
    Norm(NormOptions<Extra>),
    MixedChunk(MixedChunkOptions<Extra>),
}

impl Operation {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Softmax(_) => "softmax_attention",
            Self::Diag(_) => "diag_attention",
            Self::Gau(_) => "gau_attention",
            Self::Linear(_) => "linear_attention",
            Self::Performer(..) => "performer_attention",
            Self::Norm(_) => "norm_attention",
            Self::MixedChunk(_) => "mixed_chunk_attention",
        }
    }

    pub fn key_mask(&self) -> Option<Extra> {
        match self {
            Self::Softmax(options) => options.key_mask,
            Self::Diag(options) => options.key_mask,
            Self::Gau(options) => options.key_mask,
            Self::Linear(options) => options.key_mask,
            Self::Performer(options, _) => options.key_mask,
            Self::Norm(options) => options.key_mask,
            Self::MixedChunk(options) => options.key_mask,
        }
    }

    pub fn bias(&self) -> Option<Extra> {
        match self {
            Self::Softmax(options) => options.bias,
            Self::Gau(options) => options.bias,
            Self::MixedChunk(options) => options.bias,
            _ => None,
        }
    }

    pub fn attention_bias(&self) -> Option<Extra> {
        match self {
            Self::Softmax(options) => options.attention_bias,
            _ => None,
        }
    }

    pub fn sinks(&self) -> Option<Extra> {
        match self {
            Self::Softmax(options) => options.sinks,
            _ => None,
        }
    }

    /// Whether the attention bias is a mask of pairs.
    pub fn keeps_pairs(&self) -> bool {
        matches!(self.attention_bias(), Some(Extra::Pairs(_, Entry::Keep)))
    }

    pub fn dropout(&self) -> Option<Dropout> {
        match self {
            Self::Softmax(options) => options.dropout,
            _ => None,
        }
    }

    /// Whether kernels have it.
    pub fn is_on_gpu(&self) -> bool {
        let is_range = |mask: Mask| !mask.has_gaps() && !matches!(mask, Mask::Prefix { .. });
        let has_mask = match self {
            Self::Softmax(options) => is_range(options.mask),
            Self::Gau(options) => is_range(options.mask),
            _ => true,
        };
        has_mask && self.attention_bias().is_none() && self.sinks().is_none() && self.dropout().is_none()
    }

    pub fn log_decay(&self) -> Option<Extra> {
        match self {
            Self::Linear(options) => options.log_decay,
            Self::Norm(options) => options.log_decay,
            _ => None,
        }
    }

    /// The same on packed sequences.
    pub fn on(mut self, sequences: Sequences) -> Self {
        let packed = Some(sequences);
        match &mut self {
            Self::Softmax(options) => options.sequences = packed,
            Self::Diag(options) => options.sequences = packed,
            Self::Gau(options) => options.sequences = packed,
            Self::Linear(options) => options.sequences = packed,
            Self::Performer(options, _) => options.sequences = packed,
            Self::Norm(options) => options.sequences = packed,
            Self::MixedChunk(options) => options.sequences = packed,
        }
        self
    }

    /// Whether there are forms that take and return a state.
    pub fn has_state(&self) -> bool {
        matches!(self, Self::Linear(_) | Self::Performer(..) | Self::Norm(_))
    }
}

/// One computation.
#[derive(Debug, Clone)]
pub struct Case {
    pub why: &'static str,
    pub operation: Operation,
    pub batch: usize,
    /// Of q, k, v.
    pub heads: [usize; 3],
    pub queries: usize,
    pub keys: usize,
    pub width: usize,
    pub value_width: usize,
    /// Standard deviation of q and k; v is standard normal.
    pub std: f64,
    /// Whether q, k, v and the gradient of the output are the sizes of that.
    pub is_positive: bool,
    /// Tokens whose state is handed in; 0 hands in none.
    pub prefix: usize,
    /// Whether the log-sum-exp has a gradient.
    pub lse_gradient: bool,
    /// Whether the last state has a gradient, and with it the first.
    pub state_gradient: bool,
    pub layout: Layout,
    pub dtypes: &'static [DType],
}

pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

impl Case {
    /// Two heads, 65 queries and keys, widths 16 and 20.
    pub fn new(why: &'static str, operation: Operation) -> Self {
        Self {
            why,
            operation,
            batch: 1,
            heads: [2; 3],
            queries: 65,
            keys: 65,
            width: 16,
            value_width: 20,
            std: 1.0,
            is_positive: false,
            prefix: 0,
            lse_gradient: false,
            state_gradient: false,
            layout: Layout::Contiguous,
            dtypes: &FLOATS,
        }
    }

    pub fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    pub fn heads(self, q: usize, k: usize, v: usize) -> Self {
        Self { heads: [q, k, v], ..self }
    }

    pub fn lengths(self, queries: usize, keys: usize) -> Self {
        Self { queries, keys, ..self }
    }

    pub fn widths(self, width: usize, value_width: usize) -> Self {
        Self { width, value_width, ..self }
    }

    pub fn std(self, std: f64) -> Self {
        Self { std, ..self }
    }

    /// With the state of `prefix` tokens.
    pub fn after(self, prefix: usize) -> Self {
        Self { prefix, ..self }
    }

    pub fn with_lse_gradient(self) -> Self {
        Self { lse_gradient: true, ..self }
    }

    pub fn with_state_gradient(self) -> Self {
        Self { state_gradient: true, ..self }
    }

    pub fn only(self, dtypes: &'static [DType]) -> Self {
        Self { dtypes, ..self }
    }

    /// More than 65 535 batch entries times heads, of one or two tokens.
    fn many_heads(self) -> Self {
        self.batch(257).heads(256, 256, 256).lengths(2, 2).widths(2, 3).only(&[DType::F32])
    }

    /// Heads of the state.
    pub fn state_heads(&self) -> usize {
        self.heads[1].max(self.heads[2])
    }

    /// Heads of the output.
    pub fn output_heads(&self) -> usize {
        self.heads[0].max(self.heads[2])
    }

    /// D', or 0 without a state.
    fn state_width(&self) -> usize {
        match &self.operation {
            Operation::Linear(options) => options.map.feature_width(self.width),
            Operation::Norm(options) => options.map.feature_width(self.width),
            Operation::Performer(options, directions) => options.map.feature_width(*directions),
            _ => 0,
        }
    }

    /// Whether the log-decay is one number per head.
    pub fn has_decay_per_head(&self) -> bool {
        self.operation.log_decay() == Some(Extra::PerHead)
    }

    /// Width of the global branch of mixed chunks.
    pub fn global_width(&self) -> usize {
        self.width + 3
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { why, operation, batch, heads, queries, keys, width, value_width, prefix, layout, .. } = self;
        write!(
            f,
            "{} ({why}): B {batch}, H {heads:?}, N {queries}, M {keys}, D {width}, E {value_width}, after {prefix}, \
             {layout:?}; {operation:?}",
            operation.name()
        )
    }
}

/// Gives the cases of an operation different layouts in turn.
fn in_all_layouts(cases: Vec<Case>) -> Vec<Case> {
    let layouts = Layout::ALL.into_iter().cycle();
    cases.into_iter().zip(layouts).map(|(case, layout)| Case { layout, ..case }).collect()
}

/// Cases of 16-bit operands with rows at multiples of 16 bytes, as the copy engine of GPUs has them.
fn in_whole_vectors(cases: Vec<Case>) -> Vec<Case> {
    let layouts = [Layout::Contiguous, Layout::Tokens].into_iter().cycle();
    let dtypes: &[DType] = &[DType::F16, DType::BF16];
    cases.into_iter().zip(layouts).map(|(case, layout)| Case { layout, dtypes, ..case }).collect()
}

/// The cases of every operation.
pub fn lists() -> [Vec<Case>; 7] {
    [softmax(), diag(), gau(), linear(), performer(), norm(), mixed_chunk()]
}

/// The cases of the linear family with a gradient of the last state, and so of the first; for those that the kernels for
/// warpgroups add there is no more to see, and states of every token must fit in memory.
pub fn state_gradients() -> [Vec<Case>; 3] {
    let is_small = |case: &Case| {
        let features = case.state_width();
        // Beside large keys the gradient of a state gives values more than f16 holds.
        case.batch < 100 && features * case.value_width * case.keys <= 1 << 23 && case.std < 1e3
    };
    [linear(), performer(), norm()].map(|cases| {
        let kept = cases.into_iter().filter(|case| case.dtypes != [DType::F16, DType::BF16] && is_small(case));
        kept.map(Case::with_state_gradient).collect()
    })
}

/// Types in which the reference judges a gradient of states: its product of hundreds of decays, one after another, is no
/// better than f64. There central differences judge.
pub fn judged(case: &Case) -> &'static [DType] {
    match case.operation.log_decay() {
        Some(_) if case.state_gradient && case.dtypes.contains(&DType::F32) => &[DType::F32],
        _ => case.dtypes,
    }
}

/// All cases of all operations.
pub fn all() -> Vec<Case> {
    lists().concat()
}
