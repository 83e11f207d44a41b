//! What the engines are handed: operands as views `V` and results as elements `O` of a backend, checked against the
//! problem in one place.

use super::{
    DType, Decay, Elements, Linear, LinearShapes, Operand, Quadratic, QuadraticShapes, ensure_dtype, ensure_shape,
    ensure_value,
};
use crate::{Error, Result};

/// The operands of the quadratic engine.
#[derive(Debug, Clone, Copy)]
pub struct QuadraticInputs<V> {
    /// [B, H, N, D]
    pub q: V,
    /// [B, Hk, M, D]
    pub k: V,
    /// [B, Hk, M, E]
    pub v: V,
    /// [B, M], 0 removes a key
    pub key_mask: Option<V>,
    /// [1 or H, 2R + 1]
    pub bias: Option<V>,
    /// [B, H, N, M], each of them or 1
    pub attention_bias: Option<V>,
    /// `[H]`
    pub sinks: Option<V>,
}

impl<V> QuadraticInputs<V> {
    /// Nothing but q, k and v.
    pub fn new(q: V, k: V, v: V) -> Self {
        Self { q, k, v, key_mask: None, bias: None, attention_bias: None, sinks: None }
    }
}

/// What the forward pass of the quadratic engine left behind, and the gradients of its results.
#[derive(Debug, Clone, Copy)]
pub struct QuadraticSaved<V> {
    /// The output [B, H, N, E].
    pub out: V,
    /// The row statistic [B, H, N].
    pub statistic: V,
    /// Gradient of the output.
    pub d_out: V,
    /// Gradient of the log-sum-exp [B, H, N]; softmax only.
    pub d_statistic: Option<V>,
}

/// Where the gradients of the quadratic engine go; each is overwritten.
#[derive(Debug)]
pub struct QuadraticGradients<O> {
    /// As q, contiguous.
    pub q: O,
    /// As k, contiguous.
    pub k: O,
    /// As v, contiguous; on the CPU also in the dtype of sums.
    pub v: O,
    /// As the bias; on the CPU, like those that follow, also in the dtype of sums. Each is left out without room.
    pub bias: Option<O>,
    /// As the attention bias, if that is a float.
    pub attention_bias: Option<O>,
    /// As the sinks.
    pub sinks: Option<O>,
}

impl<O> QuadraticGradients<O> {
    /// Room for those of q, k and v.
    pub fn new(q: O, k: O, v: O) -> Self {
        Self { q, k, v, bias: None, attention_bias: None, sinks: None }
    }
}

/// A state handed in: the sums over the tokens before this call.
#[derive(Debug, Clone, Copy)]
pub struct StateView<V> {
    /// S: [B, state heads, D', E]
    pub s: V,
    /// z: [B, state heads, D']
    pub z: V,
    /// Running stabiliser of exponential FAVOR+ features: [B, state heads]
    pub stabilizer: Option<V>,
    /// Tokens that the state has seen.
    pub position: usize,
}

/// The operands of the linear engine.
#[derive(Debug, Clone, Copy)]
pub struct LinearInputs<V> {
    /// [B, Hq, N, D]
    pub q: V,
    /// [B, Hk, M, D]
    pub k: V,
    /// [B, Hv, M, E]
    pub v: V,
    /// [B, M], 0 removes a key
    pub key_mask: Option<V>,
    /// [state heads] or [B, state heads, M]
    pub log_decay: Option<V>,
    /// [m, D], for FAVOR+ maps
    pub omega: Option<V>,
    /// Sums over earlier tokens
    pub state: Option<StateView<V>>,
}

/// Where the results of the linear engine go; everything is overwritten.
#[derive(Debug)]
pub struct LinearOutputs<O> {
    /// [B, H, N, E], in the dtype of q or that of sums
    pub out: O,
    /// The divisors, [`Linear::statistic_len`] of them, in the dtype of sums; the backward pass needs them.
    pub statistic: Option<O>,
    /// The sums after the last key.
    pub state: Option<StateMut<O>>,
}

/// Room for a state, in the dtype of sums.
#[derive(Debug)]
pub struct StateMut<O> {
    /// S: [B, state heads, D', E]
    pub s: O,
    /// z: [B, state heads, D']
    pub z: O,
    /// Running stabiliser of exponential FAVOR+ features: [B, state heads]
    pub stabilizer: Option<O>,
}

/// The gradient of a state, in the dtype of sums. The stabiliser, the unit of S and z, is held fixed and has none.
#[derive(Debug, Clone, Copy)]
pub struct StateGradient<T> {
    /// By S: [B, state heads, D', E]
    pub s: T,
    /// By z: [B, state heads, D']
    pub z: T,
}

/// What the forward pass of the linear engine left behind, and the gradients of its results.
#[derive(Debug, Clone, Copy)]
pub struct LinearSaved<V> {
    /// The output [B, H, N, E].
    pub out: V,
    /// The row statistic, needed when [`Linear::statistic_len`] is above 0: [B, H, N], or [B, N] for a norm over
    /// all heads.
    pub statistic: Option<V>,
    /// Gradient of the output.
    pub d_out: V,
    /// Gradient of the state after the last key; `None` is 0.
    pub d_state: Option<StateGradient<V>>,
}

/// Where the gradients of the linear engine go; each is overwritten.
#[derive(Debug)]
pub struct LinearGradients<O> {
    /// As q, contiguous.
    pub q: O,
    /// As k, contiguous.
    pub k: O,
    /// As v, contiguous; on the CPU also in the dtype of sums.
    pub v: O,
    /// As the log-decay, which must be per token.
    pub log_decay: Option<O>,
    /// As the state handed in, contiguous.
    pub state: Option<StateGradient<O>>,
}

/// Refuses room for a result that has the wrong length or dtype.
pub(super) fn check_output(
    function: &'static str,
    argument: &'static str,
    room: &impl Elements,
    len: usize,
    dtypes: &[DType],
) -> Result<()> {
    if !dtypes.contains(&room.dtype()) {
        let needs: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
        return Err(Error::DType { function, argument, got: room.dtype().to_string(), needs: needs.join(" or ") });
    }
    if room.len() != len {
        let (got, needs) = (format!("{} elements", room.len()), format!("{len} elements"));
        return Err(Error::Shape { function, argument, got, needs });
    }
    Ok(())
}

/// Refuses operands of other shapes than the problem's.
pub(super) fn check_shapes<S: PartialEq + std::fmt::Debug>(function: &'static str, got: &S, needs: &S) -> Result<()> {
    if got == needs {
        return Ok(());
    }
    let (got, needs) = (format!("{got:?}"), format!("the problem's {needs:?}"));
    Err(Error::Shape { function, argument: "q, k, v", got, needs })
}

impl<V: Operand> QuadraticInputs<V> {
    pub(crate) fn check(&self, problem: &Quadratic) -> Result<()> {
        let (mask, bias) = (self.key_mask.as_ref(), self.bias.as_ref());
        let shapes = QuadraticShapes::new(
            problem.function,
            [&self.q, &self.k, &self.v],
            mask,
            bias,
            problem.shapes.sequences.as_ref(),
        )?;
        let shapes = shapes.with_attention_bias(problem.function, self.attention_bias.as_ref())?;
        let shapes = shapes.with_sinks(problem.function, self.sinks.as_ref())?;
        check_shapes(problem.function, &shapes, &problem.shapes)
    }
}

impl Quadratic {
    /// Refuses room for the results of the forward pass that does not fit.
    pub(crate) fn check_outputs<O: Elements>(&self, out: &O, statistic: Option<&O>) -> Result<()> {
        let (function, dtype) = (self.function, self.shapes.dtype);
        check_output(function, "out", out, self.output_len(), &[dtype, dtype.accumulator()])?;
        let Some(statistic) = statistic else { return Ok(()) };
        check_output(function, "statistic", statistic, self.statistic_len(), &[dtype.accumulator()])
    }
}

impl<V: Operand> QuadraticSaved<V> {
    pub(crate) fn check(&self, problem: &Quadratic) -> Result<()> {
        let (function, shapes) = (problem.function, &problem.shapes);
        let rows = [shapes.batch, shapes.heads, shapes.queries].map(Some);
        let out = [rows[0], rows[1], rows[2], Some(shapes.value_width)];
        ensure_shape(function, "out", &self.out, &out, "[batch, heads, queries, value width]")?;
        ensure_shape(function, "d_out", &self.d_out, &out, "[batch, heads, queries, value width]")?;
        for (argument, view) in [("statistic", Some(&self.statistic)), ("d_statistic", self.d_statistic.as_ref())] {
            if let Some(view) = view {
                ensure_shape(function, argument, view, &rows, "[batch, heads, queries]")?;
                ensure_dtype(function, argument, view, shapes.dtype.accumulator(), "the dtype of sums")?;
            }
        }
        Ok(())
    }
}

impl<O: Elements> QuadraticGradients<O> {
    pub(crate) fn check(&self, problem: &Quadratic) -> Result<()> {
        let (function, shapes) = (problem.function, &problem.shapes);
        let keys = shapes.batch * shapes.key_heads * shapes.keys;
        let queries = problem.statistic_len() * shapes.width;
        check_output(function, "gradient of q", &self.q, queries, &[shapes.dtype])?;
        check_output(function, "gradient of k", &self.k, keys * shapes.width, &[shapes.dtype])?;
        let dtypes = [shapes.dtype, shapes.dtype.accumulator()];
        check_output(function, "gradient of v", &self.v, keys * shapes.value_width, &dtypes)?;
        if let (Some(bias), Some((heads, radius))) = (&self.bias, shapes.bias) {
            check_output(function, "gradient of bias", bias, heads * (2 * radius + 1), &dtypes)?;
        }
        let sums = shapes.dtype.accumulator();
        if let Some(room) = &self.attention_bias {
            let term = shapes.attention_bias.filter(|term| term.dtype.is_float());
            ensure_value(term.is_some(), function, "gradient of attention_bias", "asked for", "a bias that is added")?;
            let (len, dtype) = term.map_or((0, sums), |term| (term.dims.iter().product(), term.dtype));
            check_output(function, "gradient of attention_bias", room, len, &[dtype, sums])?;
        }
        if let Some(room) = &self.sinks {
            ensure_value(shapes.sinks.is_some(), function, "gradient of sinks", "asked for", "sinks")?;
            let dtype = shapes.sinks.unwrap_or(sums);
            check_output(function, "gradient of sinks", room, shapes.heads, &[dtype, sums])?;
        }
        Ok(())
    }
}

impl<V: Operand> LinearInputs<V> {
    /// Sizes and dtypes; the numbers of the log-decay are the backend's to look at.
    pub(crate) fn check(&self, problem: &Linear) -> Result<()> {
        let function = problem.function;
        let (mask, decay) = (self.key_mask.as_ref(), self.log_decay.as_ref());
        let shapes = LinearShapes::new(
            function,
            problem.scan,
            [&self.q, &self.k, &self.v],
            mask,
            decay,
            problem.shapes.sequences.as_ref(),
        )?;
        check_shapes(function, &shapes, &problem.shapes)?;
        problem.check_omega(self.omega.as_ref())?;
        match &self.state {
            Some(state) => problem.check_state(&state.s, &state.z, state.stabilizer.as_ref()),
            None => Ok(()),
        }
    }
}

impl<O: Elements> LinearOutputs<O> {
    pub(crate) fn check(&self, problem: &Linear) -> Result<()> {
        let (function, dtype) = (problem.function, problem.shapes.dtype);
        let sums = [dtype.accumulator()];
        check_output(function, "out", &self.out, problem.output_len(), &[dtype, dtype.accumulator()])?;
        if let Some(statistic) = &self.statistic {
            check_output(function, "statistic", statistic, problem.statistic_len(), &sums)?;
        }
        let Some(state) = &self.state else { return Ok(()) };
        let shapes = problem.state_shapes();
        check_output(function, "state.s", &state.s, shapes.s.iter().product(), &sums)?;
        check_output(function, "state.z", &state.z, shapes.z.iter().product(), &sums)?;
        let len = shapes.stabilizer.map_or(0, |dims| dims.iter().product());
        match &state.stabilizer {
            Some(stabilizer) => check_output(function, "state.stabilizer", stabilizer, len, &sums),
            None => ensure_value(len == 0, function, "state.stabilizer", "missing", "room for it"),
        }
    }
}

impl<V: Operand> LinearSaved<V> {
    pub(crate) fn check(&self, problem: &Linear) -> Result<()> {
        let (function, shapes) = (problem.function, &problem.shapes);
        let out = [shapes.batch, shapes.heads(), shapes.queries, shapes.value_width].map(Some);
        ensure_shape(function, "out", &self.out, &out, "[batch, heads, queries, value width]")?;
        ensure_shape(function, "d_out", &self.d_out, &out, "[batch, heads, queries, value width]")?;
        if let Some(StateGradient { s, z }) = &self.d_state {
            problem.check_sums(["d_state.s", "d_state.z"], s, z)?;
        }
        let len = problem.statistic_len();
        let Some(statistic) = &self.statistic else {
            return ensure_value(len == 0, function, "statistic", "missing", "that of the forward pass");
        };
        let per_head = len == shapes.batch * shapes.heads() * shapes.queries;
        let needs = if per_head { vec![out[0], out[1], out[2]] } else { vec![out[0], out[2]] };
        ensure_shape(function, "statistic", statistic, &needs, "that of the forward pass")?;
        ensure_dtype(function, "statistic", statistic, shapes.dtype.accumulator(), "the dtype of sums")
    }
}

impl<O: Elements> LinearGradients<O> {
    pub(crate) fn check<V>(&self, problem: &Linear, inputs: &LinearInputs<V>) -> Result<()> {
        let (function, shapes) = (problem.function, &problem.shapes);
        let LinearShapes { batch, queries, keys, width, value_width, .. } = *shapes;
        let dtype = [shapes.dtype];
        check_output(function, "gradient of q", &self.q, batch * shapes.query_heads * queries * width, &dtype)?;
        check_output(function, "gradient of k", &self.k, batch * shapes.key_heads * keys * width, &dtype)?;
        let dtypes = [shapes.dtype, shapes.dtype.accumulator()];
        check_output(function, "gradient of v", &self.v, batch * shapes.value_heads * keys * value_width, &dtypes)?;
        if let Some(StateGradient { s, z }) = &self.state {
            let given = inputs.state.is_some();
            ensure_value(given, function, "gradient of state", "asked for", "a state that is handed in")?;
            let (shapes, sums) = (problem.state_shapes(), [shapes.dtype.accumulator()]);
            check_output(function, "gradient of state.s", s, shapes.s.iter().product(), &sums)?;
            check_output(function, "gradient of state.z", z, shapes.z.iter().product(), &sums)?;
        }
        let Some(log_decay) = &self.log_decay else { return Ok(()) };
        let given = shapes.decay == Decay::Token;
        ensure_value(given, function, "gradient of log_decay", "asked for", "a log-decay per token")?;
        let (len, dtype) = (batch * shapes.state_heads() * keys, shapes.dtype.accumulator());
        check_output(function, "gradient of log_decay", log_decay, len, &[dtype])
    }
}
