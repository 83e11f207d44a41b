use candle_core::{Result, Tensor};

pub(super) use crate::problem::ensure_causal;

/// The sums that linear attention carries from one piece of a sequence to the next, with H the larger of key heads
/// and value heads, D' the width of the features, E that of the values:
///
/// ```text
/// S = Σ_t decay · φ(k_t) v_tᵀ    [B, H, D', E]
/// z = Σ_t decay · φ(k_t)         [B, H, D']
/// c                              [B, H], the running stabiliser; exponential FAVOR+ features only
/// ```
///
/// All in f32, f64 for f64 inputs, of a size that does not depend on how many tokens have been seen. A function with
/// state returns one; handing it to the same function with the next piece continues the sequence.
///
/// S and z carry gradients: where anything that they depend on is tracked, so are they, and a state handed in receives
/// what its outputs and the next state bring. Pieces of a sequence then train as the whole does, in memory that grows
/// with it; [`detach`](Self::detach) between them truncates. c is the unit that S and z are in, held fixed and never
/// tracked: outputs depend on it no further than through ε. On CUDA states carry no gradient: those returned are outside of any
/// graph, tracked ones handed in are refused.
#[derive(Debug, Clone)]
pub struct LinearState {
    s: Tensor,
    z: Tensor,
    stabilizer: Option<Tensor>,
    position: usize,
}

impl LinearState {
    /// A state from its tensors, for one that was stored or sent elsewhere. Shapes and dtypes are checked where it is
    /// used.
    pub fn new(s: Tensor, z: Tensor, stabilizer: Option<Tensor>, position: usize) -> Self {
        Self { s, z, stabilizer, position }
    }

    /// S, `[B, H, D', E]`.
    pub fn s(&self) -> &Tensor {
        &self.s
    }

    /// z, `[B, H, D']`.
    pub fn z(&self) -> &Tensor {
        &self.z
    }

    /// c, `[B, H]`; exponential FAVOR+ features only.
    pub fn stabilizer(&self) -> Option<&Tensor> {
        self.stabilizer.as_ref()
    }

    /// Keys seen so far; of packed sequences by the longest.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The same state outside of the graph: what is computed from it has no gradient by what came before. Between the
    /// pieces of a sequence this is truncated backpropagation, in memory that does not grow with their number.
    pub fn detach(&self) -> Self {
        Self {
            s: self.s.detach(),
            z: self.z.detach(),
            stabilizer: self.stabilizer.as_ref().map(Tensor::detach),
            position: self.position,
        }
    }

    /// Bytes that the tensors take.
    pub fn size_in_bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }

    /// The states of several sequences as those of one call, at the position of the farthest.
    pub(super) fn cat(states: &[Self]) -> Result<Self> {
        let all = |of: fn(&Self) -> &Tensor| Tensor::cat(&states.iter().map(of).collect::<Vec<_>>(), 0);
        let stabilizers: Vec<&Tensor> = states.iter().filter_map(Self::stabilizer).collect();
        Ok(Self {
            s: all(Self::s)?,
            z: all(Self::z)?,
            stabilizer: (!stabilizers.is_empty()).then(|| Tensor::cat(&stabilizers, 0)).transpose()?,
            position: states.iter().map(Self::position).max().unwrap_or(0),
        })
    }

    /// That of one batch entry or sequence.
    pub(super) fn entry(&self, index: usize) -> Result<Self> {
        let of = |tensor: &Tensor| tensor.narrow(0, index, 1);
        let stabilizer = self.stabilizer.as_ref().map(of).transpose()?;
        Ok(Self { s: of(&self.s)?, z: of(&self.z)?, stabilizer, position: self.position })
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.s, &self.z].into_iter().chain(&self.stabilizer)
    }
}
