use super::{
    DType, Elements, Operand, Part, Sequences, check_heads, check_key_mask, check_qkv, ensure_dtype, ensure_shape,
    ensure_value,
};
use crate::Result;

/// The rank-one part of a transition, with what it is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankOne<V> {
    /// None.
    None,
    /// The delta rule: what the state holds under the key, after the decay, is replaced by the value, to the part β:
    /// a = −β k, b = e^g ⊙ k, and β k is added in place of k.
    Rule {
        /// [B, Hs, N], in the dtype of sums
        beta: V,
    },
    /// Any.
    Free {
        /// [B, Hk, N, D]
        a: V,
        /// [B, Hk, N, D], applied before the decay
        b: V,
    },
}

impl<V> RankOne<V> {
    /// The same with other views.
    pub fn map<W>(self, mut view: impl FnMut(V) -> W) -> RankOne<W> {
        match self {
            Self::None => RankOne::None,
            Self::Rule { beta } => RankOne::Rule { beta: view(beta) },
            Self::Free { a, b } => RankOne::Free { a: view(a), b: view(b) },
        }
    }

    /// Views by reference.
    pub fn as_ref(&self) -> RankOne<&V> {
        match self {
            Self::None => RankOne::None,
            Self::Rule { beta } => RankOne::Rule { beta },
            Self::Free { a, b } => RankOne::Free { a, b },
        }
    }
}

/// The form in which the log-decay of the delta engine is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeltaDecay {
    /// None: the state never shrinks by itself.
    None,
    /// `[Hs]`
    Head,
    /// `[B, Hs, N]`
    Token,
    /// `[B, Hs, N, D]`
    Channel,
}

/// Sizes of a delta problem, checked against each other. Output head h of H = max(Hq, Hs) reads query head h·Hq/H, and so
/// on; the state has Hs = max(Hk, Hv) heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeltaShapes {
    /// Element type of q, k, v.
    pub dtype: DType,
    /// B
    pub batch: usize,
    /// Hq
    pub query_heads: usize,
    /// Hk
    pub key_heads: usize,
    /// Hv
    pub value_heads: usize,
    /// N
    pub tokens: usize,
    /// D
    pub width: usize,
    /// E
    pub value_width: usize,
    /// Form of the log-decay.
    pub decay: DeltaDecay,
    /// Form of the rank-one part.
    pub rank_one: RankOne<()>,
    /// Whether tokens read what was before them, and themselves by a bonus.
    pub bonus: bool,
    /// Sequences that are packed into the one batch entry, when there are any.
    pub sequences: Option<Sequences>,
}

impl DeltaShapes {
    /// Checks q [B, Hq, N, D], k [B, Hk, N, D], v [B, Hv, N, E], the rank-one part, the log-decay and the bonus, the
    /// key mask [B, N] and offsets of sequences.
    pub fn new<T: Operand>(
        function: &'static str,
        [q, k, v]: [&T; 3],
        rank_one: RankOne<&T>,
        [log_decay, bonus]: [Option<&T>; 2],
        key_mask: Option<&T>,
        sequences: Option<&Sequences>,
    ) -> Result<Self> {
        let dtype = check_qkv(function, [q, k, v], sequences)?;
        check_key_mask(function, k, key_mask)?;
        let (tokens, width) = (q.dims()[2], q.dims()[3]);
        ensure_shape(function, "k", k, &[None, None, Some(tokens), None], "[batch, key heads, tokens of q, width]")?;
        let mut shapes = Self {
            dtype,
            batch: q.dims()[0],
            query_heads: q.dims()[1],
            key_heads: k.dims()[1],
            value_heads: v.dims()[1],
            tokens,
            width,
            value_width: v.dims()[3],
            decay: DeltaDecay::None,
            rank_one: rank_one.map(|_| ()),
            bonus: bonus.is_some(),
            sequences: sequences.cloned(),
        };
        check_heads(function, [q, k, v])?;
        if let Some(sequences) = sequences {
            let differs = sequences.ranges().find(|[queries, keys]| queries != keys);
            let got = differs.map_or(String::new(), |[queries, keys]| format!("queries {queries:?}, keys {keys:?}"));
            ensure_value(got.is_empty(), function, "sequences", got, "the same tokens for queries and keys")?;
        }
        shapes.check_rank_one(function, rank_one)?;
        if let Some(log_decay) = log_decay {
            shapes.decay = shapes.check_decay(function, log_decay)?;
        }
        if let Some(bonus) = bonus {
            shapes.check_bonus(function, bonus)?;
        }
        Ok(shapes)
    }

    fn check_rank_one<T: Operand>(&self, function: &'static str, rank_one: RankOne<&T>) -> Result<()> {
        match rank_one {
            RankOne::None => Ok(()),
            RankOne::Rule { beta } => {
                let needs = [self.batch, self.state_heads(), self.tokens].map(Some);
                ensure_shape(function, "beta", beta, &needs, "[batch, heads, tokens]")?;
                ensure_dtype(function, "beta", beta, self.dtype.accumulator(), "the dtype of sums")
            }
            RankOne::Free { a, b } => [("a", a), ("b", b)].into_iter().try_for_each(|(argument, operand)| {
                let needs = [self.batch, self.key_heads, self.tokens, self.width].map(Some);
                ensure_shape(function, argument, operand, &needs, "[batch, key heads, tokens, width], as k")?;
                ensure_dtype(function, argument, operand, self.dtype, "that of q")
            }),
        }
    }

    fn check_bonus<T: Operand>(&self, function: &'static str, bonus: &T) -> Result<()> {
        let holds = self.rank_one == RankOne::None;
        ensure_value(holds, function, "bonus", "given", "none where there is a rank-one part")?;
        ensure_shape(function, "bonus", bonus, &[self.state_heads(), self.width].map(Some), "[heads, width]")?;
        ensure_dtype(function, "bonus", bonus, self.dtype.accumulator(), "the dtype of sums")
    }

    fn check_decay<T: Operand>(&self, function: &'static str, log_decay: &T) -> Result<DeltaDecay> {
        let argument = "log_decay";
        ensure_dtype(function, argument, log_decay, self.dtype.accumulator(), "the dtype of sums")?;
        let per_channel = [self.batch, self.state_heads(), self.tokens, self.width].map(Some);
        let (needs, decay): (&[Option<usize>], _) = match log_decay.dims().len() {
            1 => (&per_channel[1..2], DeltaDecay::Head),
            3 => (&per_channel[..3], DeltaDecay::Token),
            _ => (&per_channel, DeltaDecay::Channel),
        };
        let names = "[batch, heads, tokens, width] (or [batch, heads, tokens], or [heads])";
        ensure_shape(function, argument, log_decay, needs, names)?;
        Ok(decay)
    }

    /// The sizes of each part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Part, Self)> {
        Part::all(self.sequences.as_ref(), self.tokens, self.tokens).into_iter().map(|part| {
            let shapes = Self { sequences: None, tokens: part.queries.len(), ..self.clone() };
            (part, shapes)
        })
    }

    /// How many states there are: one for each batch entry or sequence.
    pub fn states(&self) -> usize {
        self.sequences.as_ref().map_or(self.batch, Sequences::count)
    }

    /// H = max(Hq, Hs), the heads of the output.
    pub fn heads(&self) -> usize {
        self.query_heads.max(self.state_heads())
    }

    /// Hs = max(Hk, Hv), the heads of the state.
    pub fn state_heads(&self) -> usize {
        self.key_heads.max(self.value_heads)
    }

    /// Sizes of the log-decay; none without.
    pub(crate) fn decay_dims(&self) -> Vec<usize> {
        let all = [self.batch, self.state_heads(), self.tokens, self.width];
        match self.decay {
            DeltaDecay::None => Vec::new(),
            DeltaDecay::Head => all[1..2].to_vec(),
            DeltaDecay::Token => all[..3].to_vec(),
            DeltaDecay::Channel => all.to_vec(),
        }
    }
}

/// One computation of the delta engine; see [`DeltaOptions`](crate::delta::DeltaOptions) for the recurrence.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    pub(crate) function: &'static str,
    pub(crate) shapes: DeltaShapes,
    pub(crate) scale: f64,
    pub(crate) normalize: Option<f64>,
}

impl Delta {
    /// Checks the choices.
    pub fn new(function: &'static str, shapes: DeltaShapes, scale: f64, normalize: Option<f64>) -> Result<Self> {
        ensure_value(scale.is_finite(), function, "scale", scale, "a finite number")?;
        if let Some(epsilon) = normalize {
            let holds = epsilon.is_finite() && epsilon > 0.0;
            ensure_value(holds, function, "normalize", epsilon, "a finite number above 0")?;
        }
        let holds = shapes.rank_one != RankOne::None || shapes.decay == DeltaDecay::Channel || shapes.bonus;
        let got = format!("{:?}", shapes.decay).to_lowercase();
        let needs = "one per channel (linear attention has the others)";
        ensure_value(holds, function, "log_decay", got, needs)?;
        Ok(Self { function, shapes, scale, normalize })
    }

    /// The computation of each part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Part, Self)> {
        self.shapes.parts().map(|(part, shapes)| (part, Self { shapes, ..self.clone() }))
    }

    /// The computation of some columns of the values.
    pub(crate) fn columns(&self, columns: &std::ops::Range<usize>) -> Self {
        let shapes = DeltaShapes { value_width: columns.len(), ..self.shapes.clone() };
        Self { shapes, ..self.clone() }
    }

    /// Sizes and dtype.
    pub fn shapes(&self) -> &DeltaShapes {
        &self.shapes
    }

    /// Elements of the output [B, H, N, E].
    pub fn output_len(&self) -> usize {
        self.shapes.batch * self.shapes.heads() * self.shapes.tokens * self.shapes.value_width
    }

    /// Sizes of the state, [B, Hs, D, E] in the dtype of sums.
    pub fn state_shape(&self) -> [usize; 4] {
        let shapes = &self.shapes;
        [shapes.states(), shapes.state_heads(), shapes.width, shapes.value_width]
    }
}

/// The operands of the delta engine.
#[derive(Debug, Clone, Copy)]
pub struct DeltaInputs<V> {
    /// [B, Hq, N, D]
    pub q: V,
    /// [B, Hk, N, D]
    pub k: V,
    /// [B, Hv, N, E]
    pub v: V,
    /// Rank-one part of the transitions.
    pub rank_one: RankOne<V>,
    /// `[Hs]`, `[B, Hs, N]` or `[B, Hs, N, D]`
    pub log_decay: Option<V>,
    /// [Hs, D]
    pub bonus: Option<V>,
    /// [B, N], 0 removes a token
    pub key_mask: Option<V>,
    /// S after the tokens before: [B, Hs, D, E]
    pub state: Option<V>,
}

/// Where the results of the delta engine go; everything is overwritten.
#[derive(Debug)]
pub struct DeltaOutputs<O> {
    /// [B, H, N, E], in the dtype of q or that of sums
    pub out: O,
    /// S after the last token: [B, Hs, D, E], in the dtype of sums
    pub state: Option<O>,
}

/// The gradients of the results of the delta engine.
#[derive(Debug, Clone, Copy)]
pub struct DeltaSaved<V> {
    /// Of the output, [B, H, N, E].
    pub d_out: V,
    /// Of the state after the last token, [B, Hs, D, E]; none is 0.
    pub d_state: Option<V>,
}

/// Where the gradients of the delta engine go, contiguous; each is overwritten.
#[derive(Debug)]
pub struct DeltaGradients<O> {
    /// As q.
    pub q: O,
    /// As k.
    pub k: O,
    /// As v.
    pub v: O,
    /// As the rank-one part.
    pub rank_one: RankOne<O>,
    /// As the log-decay, which must be per token or channel.
    pub log_decay: Option<O>,
    /// As the bonus.
    pub bonus: Option<O>,
    /// As the state handed in.
    pub state: Option<O>,
}

impl<V: Operand> DeltaInputs<V> {
    /// Sizes and dtypes; the numbers of the log-decay are the backend's to look at.
    pub(crate) fn check(&self, problem: &Delta) -> Result<()> {
        let (function, shapes) = (problem.function, &problem.shapes);
        let operands = [&self.q, &self.k, &self.v];
        let weights = [self.log_decay.as_ref(), self.bonus.as_ref()];
        let (mask, sequences) = (self.key_mask.as_ref(), shapes.sequences.as_ref());
        let own = DeltaShapes::new(function, operands, self.rank_one.as_ref(), weights, mask, sequences)?;
        super::operands::check_shapes(function, &own, shapes)?;
        self.state.as_ref().map_or(Ok(()), |state| check_state(problem, "state", state))
    }
}

fn check_state<V: Operand>(problem: &Delta, argument: &'static str, state: &V) -> Result<()> {
    let needs = problem.state_shape().map(Some);
    ensure_shape(problem.function, argument, state, &needs, "[batch, heads, width, value width]")?;
    ensure_dtype(problem.function, argument, state, problem.shapes.dtype.accumulator(), "the dtype of sums")
}

impl<O: Elements> DeltaOutputs<O> {
    pub(crate) fn check(&self, problem: &Delta) -> Result<()> {
        let (function, dtype) = (problem.function, problem.shapes.dtype);
        let check = super::operands::check_output;
        check(function, "out", &self.out, problem.output_len(), &[dtype, dtype.accumulator()])?;
        let Some(state) = &self.state else { return Ok(()) };
        check(function, "state", state, problem.state_shape().iter().product(), &[dtype.accumulator()])
    }
}

impl<V: Operand> DeltaSaved<V> {
    pub(crate) fn check(&self, problem: &Delta) -> Result<()> {
        let shapes = &problem.shapes;
        let needs = [shapes.batch, shapes.heads(), shapes.tokens, shapes.value_width].map(Some);
        ensure_shape(problem.function, "d_out", &self.d_out, &needs, "[batch, heads, tokens, value width]")?;
        self.d_state.as_ref().map_or(Ok(()), |state| check_state(problem, "d_state", state))
    }
}

impl<O: Elements> DeltaGradients<O> {
    pub(crate) fn check(&self, problem: &Delta) -> Result<()> {
        let (function, shapes) = (problem.function, &problem.shapes);
        let rows = shapes.batch * shapes.tokens;
        let (own, sums) = ([shapes.dtype], [shapes.dtype.accumulator()]);
        let check = super::operands::check_output;
        let keys = rows * shapes.key_heads * shapes.width;
        check(function, "gradient of q", &self.q, rows * shapes.query_heads * shapes.width, &own)?;
        check(function, "gradient of k", &self.k, keys, &own)?;
        check(function, "gradient of v", &self.v, rows * shapes.value_heads * shapes.value_width, &own)?;
        let given = self.rank_one.as_ref().map(|_| ()) == shapes.rank_one;
        ensure_value(given, function, "gradients of beta, a, b", "others", "those of the rank-one part")?;
        match &self.rank_one {
            RankOne::None => {}
            RankOne::Rule { beta } => {
                check(function, "gradient of beta", beta, rows * shapes.state_heads(), &sums)?;
            }
            RankOne::Free { a, b } => {
                check(function, "gradient of a", a, keys, &own)?;
                check(function, "gradient of b", b, keys, &own)?;
            }
        }
        if let Some(log_decay) = &self.log_decay {
            let fits = matches!(shapes.decay, DeltaDecay::Token | DeltaDecay::Channel);
            let needs = "a log-decay per token or channel";
            ensure_value(fits, function, "gradient of log_decay", "asked for", needs)?;
            let len = shapes.decay_dims().iter().product();
            check(function, "gradient of log_decay", log_decay, len, &sums)?;
        }
        if let Some(bonus) = &self.bonus {
            ensure_value(shapes.bonus, function, "gradient of the bonus", "asked for", "a bonus")?;
            check(function, "gradient of the bonus", bonus, shapes.state_heads() * shapes.width, &sums)?;
        }
        let Some(state) = &self.state else { return Ok(()) };
        check(function, "gradient of the state", state, problem.state_shape().iter().product(), &sums)
    }
}
