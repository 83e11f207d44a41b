//! What an engine is asked to compute: validated shapes, dtypes and choices.
//!
//! Every error about an argument is worded here, once for all backends; a [`Quadratic`], [`Linear`] or [`Delta`] that
//! exists can be computed.

mod call;
mod delta;
mod dropout;
mod linear;
mod mask;
mod operands;
mod parts;
mod quadratic;
mod sequences;
mod view;

#[cfg(feature = "gpu")]
pub(crate) use call::ensure_alone;
pub(crate) use call::{ensure_causal, ensure_same_rows, ensure_unpacked, ensure_whole_chunks};
pub use delta::{Delta, DeltaDecay, DeltaGradients, DeltaInputs, DeltaOutputs, DeltaSaved, DeltaShapes, RankOne};
pub use dropout::Dropout;
pub(crate) use dropout::{KEY_STEPS, MULTIPLIERS, ROUNDS};
pub use linear::{Decay, Linear, LinearFinish, LinearShapes, Map, Scan, StateShapes};
pub use mask::Mask;
pub use operands::{
    LinearGradients, LinearInputs, LinearOutputs, LinearSaved, QuadraticGradients, QuadraticInputs, QuadraticSaved,
    StateGradient, StateMut, StateView,
};
pub(crate) use parts::Part;
pub use quadratic::{PairTerm, PerKey, Quadratic, QuadraticFinish, QuadraticShapes, Weight};
pub use sequences::Sequences;
pub use view::{DType, Elements, Operand, Slice, SliceMut, Strided, View};

use crate::{Error, Result};

/// Refuses `argument` unless `holds`.
pub(crate) fn ensure_value(
    holds: bool,
    function: &'static str,
    argument: &'static str,
    got: impl std::fmt::Display,
    needs: &str,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Value { function, argument, got: got.to_string(), needs: needs.to_string() })
}

/// Refuses `argument` unless its shape is `needs`; a size of `None` is free, `names` words it.
pub(crate) fn ensure_shape<T: Operand>(
    function: &'static str,
    argument: &'static str,
    operand: &T,
    needs: &[Option<usize>],
    names: &str,
) -> Result<()> {
    let dims = operand.dims();
    let fits = dims.len() == needs.len() && dims.iter().zip(needs).all(|(&d, n)| n.is_none_or(|n| n == d));
    if fits {
        return Ok(());
    }
    let sizes: Vec<String> = needs.iter().map(|n| n.map_or("_".into(), |n| n.to_string())).collect();
    Err(Error::Shape {
        function,
        argument,
        got: format!("shape {dims:?}"),
        needs: format!("{names} = [{}]", sizes.join(", ")),
    })
}

/// Refuses `argument` unless its dtype is `needs`.
pub(crate) fn ensure_dtype<T: Operand>(
    function: &'static str,
    argument: &'static str,
    operand: &T,
    needs: DType,
    why: &str,
) -> Result<()> {
    if operand.dtype() == needs {
        return Ok(());
    }
    Err(Error::DType { function, argument, got: operand.dtype().to_string(), needs: format!("{needs} ({why})") })
}

/// The checks that both engines share on q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hv, M, E].
fn check_qkv<T: Operand>(function: &'static str, [q, k, v]: [&T; 3], sequences: Option<&Sequences>) -> Result<DType> {
    let free = [None; 4];
    ensure_shape(function, "q", q, &free, "[batch, heads, queries, width]")?;
    ensure_shape(function, "k", k, &free, "[batch, key heads, keys, width]")?;
    ensure_shape(function, "v", v, &free, "[batch, key heads, keys, value width]")?;
    let dtype = q.dtype();
    if !dtype.is_float() {
        return Err(Error::DType {
            function,
            argument: "q",
            got: dtype.to_string(),
            needs: "f32, f64, f16 or bf16".into(),
        });
    }
    ensure_dtype(function, "k", k, dtype, "that of q")?;
    ensure_dtype(function, "v", v, dtype, "that of q")?;
    let (batch, width) = (q.dims()[0], q.dims()[3]);
    let keys = k.dims()[2];
    ensure_shape(
        function,
        "k",
        k,
        &[Some(batch), None, None, Some(width)],
        "[batch of q, key heads, keys, width of q]",
    )?;
    ensure_shape(
        function,
        "v",
        v,
        &[Some(batch), None, Some(keys), None],
        "[batch of q, value heads, keys, value width]",
    )?;
    for (argument, operand) in [("q", q), ("k", k), ("v", v)] {
        let dims = operand.dims();
        ensure_value(dims[1] > 0, function, argument, format_args!("a tensor of shape {dims:?}"), "at least one head")?;
        ensure_value(
            dims[3] > 0,
            function,
            argument,
            format_args!("a tensor of shape {dims:?}"),
            "a width of at least 1",
        )?;
    }
    let dims = [q, k, v].map(|operand| operand.dims());
    let heads = dims.iter().map(|dims| dims[1]).fold(0, usize::max);
    let sizes = [batch, heads, dims[0][2].max(keys), width.max(dims[2][3]), size_of::<f64>()];
    let bytes = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let fits = bytes.is_some_and(|bytes| isize::try_from(bytes).is_ok());
    let got = format_args!("a tensor of shape {:?}", dims[0]);
    ensure_value(fits, function, "q", got, "a result that fits in memory")?;
    sequences.map_or(Ok(()), |sequences| sequences.check(function, q, k))?;
    Ok(dtype)
}

/// The heads of the linear family: those of q and of the state, max(Hk, Hv), divide those of the output, the larger of both, and
/// those of k and v divide those of the state.
fn check_heads<T: Operand>(function: &'static str, operands: [&T; 3]) -> Result<()> {
    let [query_heads, key_heads, value_heads] = operands.map(|operand| operand.dims()[1]);
    let state_heads = key_heads.max(value_heads);
    let heads = query_heads.max(state_heads);
    for (argument, count, of) in [
        ("q", query_heads, heads),
        ("k", state_heads, heads),
        ("k", key_heads, state_heads),
        ("v", value_heads, state_heads),
    ] {
        if of % count != 0 {
            return Err(Error::Shape {
                function,
                argument,
                got: format!("{count} heads"),
                needs: format!("a divisor of {of} heads (the larger of the others')"),
            });
        }
    }
    Ok(())
}

fn check_key_mask<T: Operand>(function: &'static str, k: &T, key_mask: Option<&T>) -> Result<()> {
    let Some(key_mask) = key_mask else { return Ok(()) };
    let (batch, keys) = (k.dims()[0], k.dims()[2]);
    ensure_shape(function, "key_mask", key_mask, &[Some(batch), Some(keys)], "[batch, keys]")?;
    ensure_dtype(function, "key_mask", key_mask, DType::U8, "0 removes a key")
}
