use super::{
    DType, Operand, Part, Sequences, check_heads, check_key_mask, check_qkv, ensure_dtype, ensure_shape, ensure_value,
};
use crate::Result;
use crate::gau::GlobalNorm;
use crate::linear::FeatureMap;
use crate::performer::FavorMap;
use crate::transnormer::NormScope;

/// φ of the linear engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Map {
    /// A function of the row alone.
    Plain(FeatureMap),
    /// FAVOR+ features over m random directions.
    Favor {
        /// The kind of features.
        map: FavorMap,
        /// m
        directions: usize,
    },
}

impl Map {
    /// Width of φ(x) for x of width `width`.
    pub fn feature_width(self, width: usize) -> usize {
        match self {
            Self::Plain(map) => map.feature_width(width),
            Self::Favor { map, directions } => map.feature_width(directions),
        }
    }

    /// Whether keys carry a running stabiliser.
    pub fn is_stabilized(self) -> bool {
        matches!(self, Self::Favor { map, .. } if map.is_exponential())
    }
}

/// Which keys' sum a query reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// The whole sequence.
    Full,
    /// Keys at or before the query (bottom-right aligned when lengths differ).
    Causal,
    /// Keys of the chunks before the query's chunk.
    ChunkExclusive {
        /// Positions in a chunk, at least 1.
        chunk: usize,
    },
}

impl Scan {
    /// Causal or full.
    pub fn new(causal: bool) -> Self {
        if causal { Self::Causal } else { Self::Full }
    }
}

/// The form in which log-decay is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// None: the sums never shrink.
    None,
    /// `[H]`
    Head,
    /// `[B, H, M]`
    Token,
}

/// What happens to t_i = φ(q_i) S.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LinearFinish {
    /// Nothing.
    None,
    /// Divided by ⟨φ(q_i), z⟩ + ε; a zero divisor gives 0.
    Normalize {
        /// ε ≥ 0.
        epsilon: f64,
    },
    /// Divided by √(mean t² + ε).
    RmsNorm {
        /// ε > 0.
        epsilon: f64,
        /// What the mean runs over.
        scope: NormScope,
    },
    /// Scaled by chunk, for FLASH's global branch.
    ChunkNorm {
        /// The scale.
        norm: GlobalNorm,
        /// Positions in a chunk.
        chunk: usize,
    },
}

/// Sizes of a linear problem, checked against each other. Output head h of H = max(Hq, Hv) reads query head
/// h·Hq/H, and so on; the state has max(Hk, Hv) heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearShapes {
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
    pub queries: usize,
    /// M
    pub keys: usize,
    /// D
    pub width: usize,
    /// E
    pub value_width: usize,
    /// Form of the log-decay.
    pub decay: Decay,
    /// Sequences that are packed into the one batch entry, when there are any.
    pub sequences: Option<Sequences>,
}

impl LinearShapes {
    /// Checks q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hv, M, E], the key mask [B, M], the log-decay ([state heads] or
    /// [B, state heads, M]) and offsets of sequences.
    pub fn new<T: Operand>(
        function: &'static str,
        scan: Scan,
        [q, k, v]: [&T; 3],
        key_mask: Option<&T>,
        log_decay: Option<&T>,
        sequences: Option<&Sequences>,
    ) -> Result<Self> {
        let dtype = check_qkv(function, [q, k, v], sequences)?;
        check_key_mask(function, k, key_mask)?;
        let mut shapes = Self {
            dtype,
            batch: q.dims()[0],
            query_heads: q.dims()[1],
            key_heads: k.dims()[1],
            value_heads: v.dims()[1],
            queries: q.dims()[2],
            keys: k.dims()[2],
            width: q.dims()[3],
            value_width: v.dims()[3],
            decay: Decay::None,
            sequences: sequences.cloned(),
        };
        check_heads(function, [q, k, v])?;
        if let Scan::ChunkExclusive { .. } = scan {
            let needs = [None, None, Some(shapes.queries), None];
            ensure_shape(function, "k", k, &needs, "[batch, heads, queries, width]: as many keys as queries")?;
            let differs = shapes.parts().find(|(_, part)| part.queries != part.keys);
            let got = differs.map(|(_, shapes)| format!("one of {} queries and {} keys", shapes.queries, shapes.keys));
            let fits = got.is_none();
            ensure_value(fits, function, "sequences", got.unwrap_or_default(), "as many keys as queries in each")?;
        }
        if let Some(log_decay) = log_decay {
            shapes.decay = shapes.check_decay(function, scan, log_decay)?;
        }
        Ok(shapes)
    }

    fn check_decay<T: Operand>(&self, function: &'static str, scan: Scan, log_decay: &T) -> Result<Decay> {
        let argument = "log_decay";
        ensure_value(
            scan == Scan::Causal,
            function,
            argument,
            "given without `causal`",
            "`causal: true`, or no decay",
        )?;
        ensure_dtype(function, argument, log_decay, self.dtype.accumulator(), "the dtype of sums")?;
        let heads = self.state_heads();
        match log_decay.dims().len() {
            1 => {
                ensure_shape(function, argument, log_decay, &[Some(heads)], "[heads]")?;
                Ok(Decay::Head)
            }
            _ => {
                let needs = [Some(self.batch), Some(heads), Some(self.keys)];
                ensure_shape(function, argument, log_decay, &needs, "[batch, heads, keys] (or [heads])")?;
                Ok(Decay::Token)
            }
        }
    }

    /// Checks ω [m, D] and returns m.
    pub fn check_omega<T: Operand>(&self, function: &'static str, omega: &T) -> Result<usize> {
        ensure_shape(function, "omega", omega, &[None, Some(self.width)], "[directions, width of q]")?;
        ensure_dtype(function, "omega", omega, self.dtype.accumulator(), "the dtype of sums")?;
        let directions = omega.dims()[0];
        ensure_value(directions > 0, function, "omega", "empty", "at least one direction")?;
        Ok(directions)
    }

    /// The sizes of each part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Part, Self)> {
        Part::all(self.sequences.as_ref(), self.queries, self.keys).into_iter().map(|part| {
            let shapes = Self { sequences: None, queries: part.queries.len(), keys: part.keys.len(), ..self.clone() };
            (part, shapes)
        })
    }

    /// Keys of the longest sequence, M where nothing is packed.
    pub(crate) fn longest(&self) -> usize {
        self.parts().map(|(_, part)| part.keys).max().unwrap_or(0)
    }

    /// How many states there are: one for each batch entry or sequence.
    pub fn states(&self) -> usize {
        self.sequences.as_ref().map_or(self.batch, Sequences::count)
    }

    /// H = max(Hq, Hv), the heads of the output.
    pub fn heads(&self) -> usize {
        self.query_heads.max(self.value_heads)
    }

    /// max(Hk, Hv), the heads of the state.
    pub fn state_heads(&self) -> usize {
        self.key_heads.max(self.value_heads)
    }

    /// Position of the first query among the keys, M − N.
    pub fn offset(&self) -> i64 {
        self.keys as i64 - self.queries as i64
    }
}

/// One computation of the linear engine; see [`LinearOptions`](crate::linear::LinearOptions) for the recurrence.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    pub(crate) function: &'static str,
    pub(crate) shapes: LinearShapes,
    pub(crate) map: Map,
    pub(crate) scan: Scan,
    pub(crate) finish: LinearFinish,
}

impl Linear {
    /// Checks the choices against the shapes.
    pub fn new(
        function: &'static str,
        shapes: LinearShapes,
        map: Map,
        scan: Scan,
        finish: LinearFinish,
    ) -> Result<Self> {
        match finish {
            LinearFinish::Normalize { epsilon } => {
                ensure_value(epsilon.is_finite() && epsilon >= 0.0, function, "epsilon", epsilon, "at least 0")?
            }
            LinearFinish::RmsNorm { epsilon, .. } => ensure_value(
                epsilon.is_finite() && epsilon > 0.0,
                function,
                "epsilon",
                epsilon,
                "a finite number above 0",
            )?,
            LinearFinish::ChunkNorm { chunk, .. } => {
                ensure_value(chunk > 0, function, "chunk_size", chunk, "at least 1")?
            }
            LinearFinish::None => {}
        }
        if let Scan::ChunkExclusive { chunk } = scan {
            ensure_value(chunk > 0, function, "chunk_size", chunk, "at least 1")?;
            let needs = "a map without stabiliser when chunks are exclusive";
            ensure_value(!map.is_stabilized(), function, "map", "an exponential FAVOR+ map", needs)?;
        }
        Ok(Self { function, shapes, map, scan, finish })
    }

    /// The computation of each part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Part, Self)> {
        self.shapes.parts().map(|(part, shapes)| (part, Self { shapes, ..self.clone() }))
    }

    /// Sizes and dtype.
    pub fn shapes(&self) -> &LinearShapes {
        &self.shapes
    }

    /// D', the width of the features and of the state.
    pub fn feature_width(&self) -> usize {
        self.map.feature_width(self.shapes.width)
    }

    /// Elements of the output [B, H, N, E].
    pub fn output_len(&self) -> usize {
        self.shapes.batch * self.shapes.heads() * self.shapes.queries * self.shapes.value_width
    }

    /// Elements of the row statistic: the divisor, [B, H, N] or, for a norm over all heads, [B, N]; 0 without one.
    pub fn statistic_len(&self) -> usize {
        self.divisors() * self.shapes.queries
    }

    /// Divisors of a token, over the batch.
    pub(crate) fn divisors(&self) -> usize {
        match self.finish {
            LinearFinish::Normalize { .. } | LinearFinish::RmsNorm { scope: NormScope::Head, .. } => {
                self.shapes.batch * self.shapes.heads()
            }
            LinearFinish::RmsNorm { scope: NormScope::AllHeads, .. } => self.shapes.batch,
            LinearFinish::None | LinearFinish::ChunkNorm { .. } => 0,
        }
    }

    /// Shapes of the state.
    pub fn state_shapes(&self) -> StateShapes {
        let (batch, heads) = (self.shapes.states(), self.shapes.state_heads());
        let features = self.feature_width();
        StateShapes {
            s: [batch, heads, features, self.shapes.value_width],
            z: [batch, heads, features],
            stabilizer: self.map.is_stabilized().then_some([batch, heads]),
        }
    }

    /// Checks that ω is there exactly for FAVOR+ maps, with the rows of this problem.
    pub fn check_omega<T: Operand>(&self, omega: Option<&T>) -> Result<()> {
        let (needed, needs) = match self.map {
            Map::Plain(_) => (None, "none: the feature map has no random directions".to_string()),
            Map::Favor { directions, .. } => (Some(directions), format!("{directions} directions")),
        };
        let given = omega.map(|omega| self.shapes.check_omega(self.function, omega)).transpose()?;
        let got = given.map_or("missing".to_string(), |given| format!("of {given} directions"));
        ensure_value(given == needed, self.function, "omega", got, &needs)
    }

    /// Checks the tensors of a state handed in.
    pub fn check_state<T: Operand>(&self, s: &T, z: &T, stabilizer: Option<&T>) -> Result<()> {
        self.check_sums(["state.s", "state.z"], s, z)?;
        match (stabilizer, self.state_shapes().stabilizer) {
            (Some(tensor), Some(dims)) => self.check_sum("state.stabilizer", tensor, &dims, "[batch, heads]"),
            (None, None) => Ok(()),
            (given, _) => {
                let got = if given.is_some() { "given" } else { "missing" };
                let needs = "exactly the states of exponential FAVOR+ features to have one";
                ensure_value(false, self.function, "state.stabilizer", got, needs)
            }
        }
    }

    /// Checks tensors in the shapes of S and z.
    pub(crate) fn check_sums<T: Operand>(&self, names: [&'static str; 2], s: &T, z: &T) -> Result<()> {
        let shapes = self.state_shapes();
        self.check_sum(names[0], s, &shapes.s, "[batch, heads, features, value width]")?;
        self.check_sum(names[1], z, &shapes.z, "[batch, heads, features]")
    }

    fn check_sum<T: Operand>(
        &self,
        argument: &'static str,
        tensor: &T,
        dims: &[usize],
        names: &'static str,
    ) -> Result<()> {
        let needs: Vec<Option<usize>> = dims.iter().copied().map(Some).collect();
        ensure_shape(self.function, argument, tensor, &needs, names)?;
        ensure_dtype(self.function, argument, tensor, self.shapes.dtype.accumulator(), "the dtype of sums")
    }
}

/// Shapes of a state (S, z, stabiliser), all in the accumulator's dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateShapes {
    /// S: [B, state heads, D', E]
    pub s: [usize; 4],
    /// z: [B, state heads, D']
    pub z: [usize; 3],
    /// Running stabiliser of exponential FAVOR+ features: [B, state heads]
    pub stabilizer: Option<[usize; 2]>,
}
