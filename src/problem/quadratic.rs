use super::{
    DType, Dropout, Mask, Operand, Part, Sequences, check_key_mask, check_qkv, ensure_dtype, ensure_shape, ensure_value,
};
use crate::{Error, Result};

/// What a score turns into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Weight {
    /// exp(s − L), L the log-sum-exp of the row.
    Softmax,
    /// max(s, 0)
    Relu,
    /// max(s, 0)²
    ReluSquared,
}

/// What happens to Σ_j weight_ij v_j.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum QuadraticFinish {
    /// Nothing.
    None,
    /// Times a constant.
    Scale(f64),
    /// Divided by Σ_j weight_ij + ε.
    RowSum {
        /// ε ≥ 0.
        epsilon: f64,
    },
    /// Divided by √(mean over the row of its squares + ε).
    RmsNorm {
        /// ε > 0.
        epsilon: f64,
    },
}

/// What is divided by n, the number of keys of the batch entry that the key mask leaves (M without one); where that is 0,
/// by 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PerKey {
    /// Nothing.
    #[default]
    Nothing,
    /// Products of queries and keys, along with their scale.
    Scores,
    /// The finished rows.
    Sums,
}

/// A number for each pair of query and key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairTerm {
    /// [B, H, N, M], each of them or 1.
    pub dims: [usize; 4],
    /// A float: what is added to the score. u8: 0 removes the pair.
    pub dtype: DType,
}

/// Sizes of a quadratic problem, checked against each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuadraticShapes {
    /// Element type of q, k, v.
    pub dtype: DType,
    /// B
    pub batch: usize,
    /// H
    pub heads: usize,
    /// Hk, a divisor of H
    pub key_heads: usize,
    /// N
    pub queries: usize,
    /// M
    pub keys: usize,
    /// D
    pub width: usize,
    /// E
    pub value_width: usize,
    /// Heads (1 or H) and radius R of the bias, when there is one.
    pub bias: Option<(usize, usize)>,
    /// The term of each pair, when there is one.
    pub attention_bias: Option<PairTerm>,
    /// Element type of the sinks `[H]`, when there are any.
    pub sinks: Option<DType>,
    /// Sequences that are packed into the one batch entry, when there are any.
    pub sequences: Option<Sequences>,
}

impl QuadraticShapes {
    /// Checks q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, E], the key mask [B, M], the bias [1 or H, 2R + 1] and offsets
    /// of sequences.
    pub fn new<T: Operand>(
        function: &'static str,
        [q, k, v]: [&T; 3],
        key_mask: Option<&T>,
        bias: Option<&T>,
        sequences: Option<&Sequences>,
    ) -> Result<Self> {
        let dtype = check_qkv(function, [q, k, v], sequences)?;
        check_key_mask(function, k, key_mask)?;
        let (heads, key_heads) = (q.dims()[1], k.dims()[1]);
        if heads % key_heads != 0 {
            return Err(Error::Shape {
                function,
                argument: "k",
                got: format!("{key_heads} heads"),
                needs: format!("a divisor of the {heads} heads of q"),
            });
        }
        let needs = [Some(q.dims()[0]), Some(key_heads), Some(k.dims()[2]), None];
        ensure_shape(function, "v", v, &needs, "[batch, heads of k, keys, value width]")?;
        let bias = match bias {
            None => None,
            Some(bias) => Some(check_bias(function, bias, heads, dtype)?),
        };
        Ok(Self {
            dtype,
            batch: q.dims()[0],
            heads,
            key_heads,
            queries: q.dims()[2],
            keys: k.dims()[2],
            width: q.dims()[3],
            value_width: v.dims()[3],
            bias,
            attention_bias: None,
            sinks: None,
            sequences: sequences.cloned(),
        })
    }

    /// The same with a term for each pair, [B, H, N, M], each of them or 1, in the dtype of q, f32 or u8.
    pub fn with_attention_bias<T: Operand>(self, function: &'static str, term: Option<&T>) -> Result<Self> {
        let Some(term) = term else { return Ok(self) };
        let (dims, dtype) = (term.dims(), term.dtype());
        let full = [self.batch, self.heads, self.queries, self.keys];
        let fits = dims.iter().zip(full).all(|(&size, full)| size == 1 || size == full);
        let dims = <[usize; 4]>::try_from(dims).ok().filter(|_| fits);
        let Some(dims) = dims else {
            let needs = format!("[batch, heads, queries, keys] = {full:?}, each of them or 1");
            let got = format!("shape {:?}", term.dims());
            return Err(Error::Shape { function, argument: "attention_bias", got, needs });
        };
        if ![self.dtype, DType::F32, DType::U8].contains(&dtype) {
            let needs = format!("{} (that of q), f32, or u8 to keep pairs", self.dtype);
            return Err(Error::DType { function, argument: "attention_bias", got: dtype.to_string(), needs });
        }
        let needs = "none with packed sequences: a call for each";
        ensure_value(self.sequences.is_none(), function, "attention_bias", "given", needs)?;
        Ok(Self { attention_bias: Some(PairTerm { dims, dtype }), ..self })
    }

    /// The same with sinks `[H]`, in the dtype of q or f32.
    pub fn with_sinks<T: Operand>(self, function: &'static str, sinks: Option<&T>) -> Result<Self> {
        let Some(sinks) = sinks else { return Ok(self) };
        ensure_shape(function, "sinks", sinks, &[Some(self.heads)], "[heads of q]")?;
        let dtype = sinks.dtype();
        if ![self.dtype, DType::F32].contains(&dtype) {
            let needs = format!("{} (that of q) or f32", self.dtype);
            return Err(Error::DType { function, argument: "sinks", got: dtype.to_string(), needs });
        }
        Ok(Self { sinks: Some(dtype), ..self })
    }

    /// The sizes of each part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Part, Self)> {
        Part::all(self.sequences.as_ref(), self.queries, self.keys).into_iter().map(|part| {
            let shapes = Self { sequences: None, queries: part.queries.len(), keys: part.keys.len(), ..self.clone() };
            (part, shapes)
        })
    }

    /// Position of the first query among the keys, M − N.
    pub fn offset(&self) -> i64 {
        self.keys as i64 - self.queries as i64
    }
}

fn check_bias<T: Operand>(function: &'static str, bias: &T, heads: usize, dtype: DType) -> Result<(usize, usize)> {
    ensure_dtype(function, "bias", bias, dtype, "that of q")?;
    let dims = bias.dims();
    let fits = dims.len() == 2 && (dims[0] == 1 || dims[0] == heads) && dims[1] % 2 == 1;
    if !fits {
        return Err(Error::Shape {
            function,
            argument: "bias",
            got: format!("shape {dims:?}"),
            needs: format!("[1 or {heads} heads, 2·radius + 1]"),
        });
    }
    Ok((dims[0], dims[1] / 2))
}

/// One computation of the quadratic engine:
///
/// ```text
/// s_ij = cap(scale·⟨q_i, k_j⟩) + bias[j − p] + b_ij
/// o_i  = finish_i(Σ_j weight(s_ij) v_j)        over the visible j
/// ```
///
/// with the attention bias b. A sink is one more key for softmax, with a score of its own and the value 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Quadratic {
    pub(crate) function: &'static str,
    pub(crate) shapes: QuadraticShapes,
    pub(crate) weight: Weight,
    pub(crate) mask: Mask,
    pub(crate) scale: f64,
    pub(crate) soft_cap: Option<f64>,
    pub(crate) finish: QuadraticFinish,
    pub(crate) per_key: PerKey,
    pub(crate) dropout: Option<Dropout>,
    /// What the first batch entry counts as for dropout.
    pub(crate) first_entry: usize,
}

impl Quadratic {
    /// Checks the choices against the shapes.
    pub fn new(
        function: &'static str,
        shapes: QuadraticShapes,
        weight: Weight,
        mask: Mask,
        scale: f64,
        soft_cap: Option<f64>,
        finish: QuadraticFinish,
    ) -> Result<Self> {
        ensure_value(scale.is_finite(), function, "scale", scale, "a finite number")?;
        if let Some(cap) = soft_cap {
            ensure_value(cap.is_finite() && cap > 0.0, function, "soft_cap", cap, "a finite number above 0")?;
        }
        mask.check(function)?;
        match finish {
            QuadraticFinish::None => {}
            QuadraticFinish::Scale(scale) => {
                ensure_value(scale.is_finite(), function, "scale", scale, "a finite number")?
            }
            QuadraticFinish::RowSum { epsilon } => {
                ensure_value(epsilon.is_finite() && epsilon >= 0.0, function, "epsilon", epsilon, "at least 0")?
            }
            QuadraticFinish::RmsNorm { epsilon } => ensure_value(
                epsilon.is_finite() && epsilon > 0.0,
                function,
                "epsilon",
                epsilon,
                "a finite number above 0",
            )?,
        }
        let is_softmax = weight == Weight::Softmax;
        ensure_value(shapes.sinks.is_none() || is_softmax, function, "sinks", "given", "softmax, for which they are")?;
        if let Some((_, radius)) = shapes.bias {
            let reach = shapes.parts().map(|(_, part)| mask.reach(part.queries, part.keys)).max().unwrap_or(0);
            let needs = format!("at least {reach}, the largest distance that the mask leaves visible");
            ensure_value(radius >= reach, function, "bias", format!("of radius {radius}"), &needs)?;
        }
        Ok(Self {
            function,
            shapes,
            weight,
            mask,
            scale,
            soft_cap,
            finish,
            per_key: PerKey::Nothing,
            dropout: None,
            first_entry: 0,
        })
    }

    /// The same with a division by the number of keys.
    pub fn per_key(self, per_key: PerKey) -> Self {
        Self { per_key, ..self }
    }

    /// The same with dropout of the weights, which must be those of softmax.
    pub fn with_dropout(self, dropout: Option<Dropout>) -> Result<Self> {
        let Some(dropout) = dropout else { return Ok(self) };
        let is_softmax = self.weight == Weight::Softmax;
        ensure_value(is_softmax, self.function, "dropout", "given", "softmax, for which it is")?;
        Ok(Self { dropout: dropout.checked(self.function)?, ..self })
    }

    /// The computation of each part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Part, Self)> {
        self.shapes.parts().map(|(part, shapes)| {
            let first_entry = part.sequence.unwrap_or(0);
            (part, Self { shapes, first_entry, ..self.clone() })
        })
    }

    /// Sizes and dtype.
    pub fn shapes(&self) -> &QuadraticShapes {
        &self.shapes
    }

    /// Elements of the output [B, H, N, E].
    pub fn output_len(&self) -> usize {
        self.statistic_len() * self.shapes.value_width
    }

    /// Elements of the row statistic [B, H, N]: the log-sum-exp (softmax), the divisor (row sum, RMS norm).
    pub fn statistic_len(&self) -> usize {
        self.shapes.batch * self.shapes.heads * self.shapes.queries
    }
}
