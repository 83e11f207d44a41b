//! Rotary embedding behind the feature map: the formula of the reference, and products of distances.

use attn_kernels::candle::*;
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::nn::Rotary;
use attn_kernels::performer::{FavorMap, PerformerOptions};
use attn_kernels::reference::{self, Array, Gradients};
use attn_kernels::transnormer::{NormOptions, NormScope};
use candle_core::{DType, Device, Result, Tensor, Var};

use super::by_hand::array;
use super::{assert_close, assert_refused, random};

const BASE: f64 = 100.0;
const WIDTH: usize = 6;
const MAPS: [FeatureMap; 9] = [
    FeatureMap::Identity,
    FeatureMap::EluPlusOne,
    FeatureMap::Relu,
    FeatureMap::ReluSquared,
    FeatureMap::Silu,
    FeatureMap::Exp,
    FeatureMap::Softmax,
    FeatureMap::Taylor,
    FeatureMap::Cosine,
];

/// An operation with its options, for tensors and for arrays.
enum Call {
    Linear(LinearOptions<Tensor>),
    Norm(NormOptions<Tensor>),
    Performer(PerformerOptions<Tensor>, Tensor),
}

/// Heads of q, k, v and numbers of queries and keys.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    heads: [usize; 3],
    queries: usize,
    keys: usize,
}

fn calls(causal: bool, key_mask: Option<&Tensor>, log_decay: Option<&Tensor>) -> Result<Vec<(String, Call)>> {
    let (mut calls, mask, decay) = (Vec::new(), || key_mask.cloned(), || log_decay.cloned());
    for map in MAPS {
        for normalizer in [None, Some(0.1)] {
            let options =
                LinearOptions { map, causal, normalizer, log_decay: decay(), key_mask: mask(), sequences: None };
            calls.push((format!("linear {map:?} {normalizer:?}"), Call::Linear(options)));
        }
        for norm in [NormScope::Head, NormScope::AllHeads] {
            let options =
                NormOptions { map, causal, epsilon: 0.1, norm, log_decay: decay(), key_mask: mask(), sequences: None };
            calls.push((format!("norm {map:?} {norm:?}"), Call::Norm(options)));
        }
    }
    for map in [FavorMap::Positive, FavorMap::Hyperbolic, FavorMap::Relu].into_iter().filter(|_| log_decay.is_none()) {
        let options = PerformerOptions { map, causal, epsilon: 0.1, key_mask: mask(), sequences: None };
        calls.push((format!("performer {map:?}"), Call::Performer(options, random("omega", &[4, WIDTH])?)));
    }
    Ok(calls)
}

/// Causal calls whose divisors stay away from 0.
fn tame_calls() -> Result<Vec<(String, Call)>> {
    let is_tame = |call: &Call| {
        !matches!(
            call,
            Call::Linear(LinearOptions { map: FeatureMap::Identity | FeatureMap::Silu, normalizer: Some(_), .. })
        )
    };
    Ok(calls(true, None, None)?.into_iter().filter(|(_, call)| is_tame(call)).collect())
}

impl Call {
    fn rotary(&self) -> Result<Rotary> {
        let width = match self {
            Self::Performer(options, omega) => options.map.feature_width(omega.dim(0)?),
            _ => WIDTH,
        };
        Rotary::new(width, BASE)
    }

    fn tensors(&self, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let rotary = self.rotary()?;
        match self {
            Self::Linear(options) => rotary_linear_attention(q, k, v, &rotary, options),
            Self::Norm(options) => rotary_norm_attention(q, k, v, &rotary, options),
            Self::Performer(options, omega) => {
                let omega = omega.to_dtype(if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 })?;
                rotary_performer_attention(q, k, v, &omega, &rotary, options)
            }
        }
    }

    fn step(&self, [q, k, v]: [&Tensor; 3], state: Option<&LinearState>) -> Result<(Tensor, LinearState)> {
        let rotary = self.rotary()?;
        match self {
            Self::Linear(options) => rotary_linear_attention_with_state(q, k, v, &rotary, options, state),
            Self::Norm(options) => rotary_norm_attention_with_state(q, k, v, &rotary, options, state),
            Self::Performer(options, omega) => {
                rotary_performer_attention_with_state(q, k, v, omega, &rotary, options, state)
            }
        }
    }

    /// The output of the reference, and the gradients of ⟨d_out, o⟩.
    fn arrays(&self, [q, k, v]: [&Array; 3], d_out: &Array) -> Result<(Array, Gradients)> {
        let optional = |tensor: &Option<Tensor>| -> Result<Option<Array>> {
            tensor.as_ref().map(|tensor| array(&tensor.to_dtype(DType::F64)?)).transpose()
        };
        Ok(match self {
            Self::Linear(LinearOptions { map, causal, normalizer, log_decay, key_mask, .. }) => {
                let (log_decay, key_mask) = (optional(log_decay)?, optional(key_mask)?);
                let options = LinearOptions {
                    map: *map,
                    causal: *causal,
                    normalizer: *normalizer,
                    log_decay,
                    key_mask,
                    sequences: None,
                };
                let out = reference::rotary_linear_attention(q, k, v, BASE, &options);
                (out, reference::rotary_linear_attention_backward(q, k, v, BASE, &options, d_out))
            }
            Self::Norm(NormOptions { map, causal, epsilon, norm, log_decay, key_mask, .. }) => {
                let (log_decay, key_mask) = (optional(log_decay)?, optional(key_mask)?);
                let (map, causal, epsilon, norm) = (*map, *causal, *epsilon, *norm);
                let options = NormOptions { map, causal, epsilon, norm, log_decay, key_mask, sequences: None };
                let out = reference::rotary_norm_attention(q, k, v, BASE, &options);
                (out, reference::rotary_norm_attention_backward(q, k, v, BASE, &options, d_out))
            }
            Self::Performer(PerformerOptions { map, causal, epsilon, key_mask, .. }, omega) => {
                let (map, causal, epsilon, key_mask) = (*map, *causal, *epsilon, optional(key_mask)?);
                let (options, omega) =
                    (PerformerOptions { map, causal, epsilon, key_mask, sequences: None }, array(omega)?);
                let out = reference::rotary_performer_attention(q, k, v, &omega, BASE, &options);
                (out, reference::rotary_performer_attention_backward(q, k, v, &omega, BASE, &options, d_out))
            }
        })
    }
}

fn inputs(sizes: Sizes) -> Result<[Tensor; 3]> {
    let Sizes { heads: [q, k, v], queries, keys } = sizes;
    Ok([random("q", &[2, q, queries, WIDTH])?, random("k", &[2, k, keys, WIDTH])?, random("v", &[2, v, keys, 5])?])
}

#[track_caller]
fn assert_same(ours: &Tensor, theirs: &Array, what: &str) -> Result<()> {
    let scale = theirs.data.iter().fold(1.0, |scale: f64, x| scale.max(x.abs()));
    let theirs = Tensor::from_vec(theirs.data.clone(), ours.shape(), &Device::Cpu)?;
    assert_close(ours, &theirs, 1e-11 * scale, what)
}

/// Output and gradients of every call are those of the O(N²) loops.
fn check(sizes: Sizes, causal: bool, key_mask: Option<&Tensor>, log_decay: Option<&Tensor>) -> Result<()> {
    let variables = inputs(sizes)?.map(|x| Var::from_tensor(&x));
    let [q, k, v] = &variables;
    let [q, k, v] = [q, k, v].map(|x| x.as_ref().unwrap().as_tensor());
    for (what, call) in calls(causal, key_mask, log_decay)? {
        let what = format!("{what} {sizes:?} causal {causal} masked {}", key_mask.is_some());
        let out = call.tensors([q, k, v])?;
        let d_out = random("d_out", out.dims())?;
        let gradients = (&out * &d_out)?.sum_all()?.backward()?;
        let (expected, by_hand) = call.arrays([&array(q)?, &array(k)?, &array(v)?], &array(&d_out)?)?;
        assert_same(&out, &expected, &what)?;
        for (name, variable, expected) in [("q", q, &by_hand.q), ("k", k, &by_hand.k), ("v", v, &by_hand.v)] {
            let Some(gradient) = gradients.get(variable) else { panic!("{what}: no gradient of {name}") };
            assert_same(gradient, expected, &format!("{what}: d{name}"))?;
        }
    }
    Ok(())
}

#[test]
fn operations_are_the_formula() -> Result<()> {
    let mask = Tensor::from_vec((0..26).map(|i| u8::from(i % 5 != 1 && i != 25)).collect(), (2, 13), &Device::Cpu)?;
    for causal in [false, true] {
        for heads in [[2, 2, 2], [4, 2, 2], [2, 2, 4]] {
            check(Sizes { heads, queries: 13, keys: 13 }, causal, None, None)?;
            check(Sizes { heads, queries: 7, keys: 13 }, causal, Some(&mask), None)?;
        }
        check(Sizes { heads: [2, 1, 1], queries: 13, keys: 9 }, causal, None, None)?;
    }
    let per_head = Tensor::new(&[-0.3f64, -1.5], &Device::Cpu)?;
    let per_token = (random("decay", &[2, 2, 13])?.abs()? * -0.5)?;
    for decay in [&per_head, &per_token] {
        check(Sizes { heads: [2, 2, 2], queries: 13, keys: 13 }, true, Some(&mask), Some(decay))?;
    }
    Ok(())
}

/// The gradient of a log-decay per token is the sum of both passes'.
#[test]
fn decays_receive_gradients() -> Result<()> {
    let [q, k, v] = inputs(Sizes { heads: [2, 2, 2], queries: 9, keys: 9 })?;
    let decay = Var::from_tensor(&(random("decay", &[2, 2, 9])?.abs()? * -0.5)?)?;
    let call = Call::Linear(LinearOptions {
        causal: true,
        normalizer: Some(0.1),
        log_decay: Some(decay.as_tensor().clone()),
        ..Default::default()
    });
    let out = call.tensors([&q, &k, &v])?;
    let d_out = random("d_out", out.dims())?;
    let gradients = (&out * &d_out)?.sum_all()?.backward()?;
    let (_, by_hand) = call.arrays([&array(&q)?, &array(&k)?, &array(&v)?], &array(&d_out)?)?;
    assert_same(gradients.get(&decay).unwrap(), &by_hand.log_decay.unwrap(), "log-decay")
}

/// Pieces of any length, token by token as well, are the whole.
#[test]
fn pieces_are_the_whole() -> Result<()> {
    let [q, k, v] = inputs(Sizes { heads: [4, 2, 2], queries: 17, keys: 17 })?;
    for (what, call) in tame_calls()? {
        let whole = call.tensors([&q, &k, &v])?;
        for lengths in [&[17][..], &[5, 1, 11], &[1; 17]] {
            let (mut state, mut at) = (None, 0);
            for &length in lengths {
                let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(2, at, length));
                let (out, next) = call.step([&q?, &k?, &v?], state.as_ref())?;
                assert_close(&out, &whole.narrow(2, at, length)?, 1e-11, &format!("{what} in {lengths:?}"))?;
                (state, at) = (Some(next), at + length);
            }
            assert_eq!(state.unwrap().position(), 17);
        }
    }
    Ok(())
}

/// S of rotated features, z of the features themselves.
#[test]
fn states_are_sums() -> Result<()> {
    let [q, k, v] = inputs(Sizes { heads: [2, 2, 2], queries: 9, keys: 9 })?;
    let call = Call::Linear(LinearOptions { map: FeatureMap::Exp, causal: true, ..Default::default() });
    let (_, state) = call.step([&q, &k, &v], None)?;
    let phi = k.exp()?;
    assert_close(state.z(), &phi.sum(2)?, 1e-12, "z")?;
    let s = call.rotary()?.apply(&phi, 0)?.transpose(2, 3)?.contiguous()?.matmul(&v)?;
    assert_close(state.s(), &s, 1e-12, "S")
}

/// The same sequence at other positions, behind a state of nothing.
#[test]
fn outputs_do_not_depend_on_where_positions_begin() -> Result<()> {
    let [q, k, v] = inputs(Sizes { heads: [2, 2, 2], queries: 13, keys: 13 })?;
    for (what, call) in tame_calls()? {
        let (near, state) = call.step([&q, &k, &v], None)?;
        let nothing = |x: &Tensor| x.zeros_like();
        let stabilizer = state.stabilizer().map(|c| c.affine(0.0, f64::NEG_INFINITY)).transpose()?;
        for position in [100, 1_000_000] {
            let begun = LinearState::new(nothing(state.s())?, nothing(state.z())?, stabilizer.clone(), position);
            let (far, _) = call.step([&q, &k, &v], Some(&begun))?;
            assert_close(&far, &near, 1e-8, &format!("{what} at {position}"))?;
        }
    }
    Ok(())
}

/// Rows that a key mask removes may hold anything, and receive no gradient.
#[test]
fn removed_rows_hold_anything() -> Result<()> {
    let [q, k, v] = inputs(Sizes { heads: [2, 2, 2], queries: 13, keys: 13 })?;
    let mask =
        Tensor::from_vec((0..26).map(|i| u8::from(i % 13 != 4 && i % 13 != 0)).collect(), (2, 13), &Device::Cpu)?;
    let keep = mask.unsqueeze(1)?.unsqueeze(3)?;
    for causal in [false, true] {
        for (what, call) in calls(causal, Some(&mask), None)? {
            let clean = call.tensors([&q, &k, &v])?;
            for poison in [f64::NAN, f64::INFINITY, 1e200] {
                let spoil = |x: &Tensor| -> Result<Var> {
                    let poison = Tensor::full(poison, x.shape(), &Device::Cpu)?;
                    Var::from_tensor(&keep.broadcast_as(x.shape())?.where_cond(x, &poison)?)
                };
                let (k, v) = (spoil(&k)?, spoil(&v)?);
                let out = call.tensors([&q, &k, &v])?;
                assert_close(&out, &clean, 1e-12, &format!("{what} {poison}"))?;
                let gradients = out.sqr()?.sum_all()?.backward()?;
                for x in [&k, &v] {
                    let gradient = gradients.get(x).unwrap();
                    let removed = keep.broadcast_as(x.shape())?.where_cond(&x.zeros_like()?, gradient)?;
                    assert_eq!(removed.abs()?.sum_all()?.to_scalar::<f64>()?, 0.0, "{what} {poison}");
                    assert!(gradient.sum_all()?.to_scalar::<f64>()?.is_finite(), "{what} {poison}");
                }
            }
        }
    }
    Ok(())
}

/// Narrow dtypes are rounded once, at the end: the error is that of the inputs' and the output's rounding.
#[test]
fn in_narrow_dtypes() -> Result<()> {
    let inputs = inputs(Sizes { heads: [2, 2, 2], queries: 40, keys: 40 })?;
    for (dtype, unit) in [(DType::F32, 2f64.powi(-24)), (DType::BF16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))] {
        for (what, call) in tame_calls()? {
            let narrow: Vec<_> = inputs.iter().map(|x| x.to_dtype(dtype)).collect::<Result<_>>()?;
            let exact: Vec<_> = narrow.iter().map(|x| x.to_dtype(DType::F64)).collect::<Result<_>>()?;
            let ours = call.tensors([&narrow[0], &narrow[1], &narrow[2]])?;
            assert_eq!(ours.dtype(), dtype);
            let exact = call.tensors([&exact[0], &exact[1], &exact[2]])?;
            let scale = exact.abs()?.max_all()?.to_scalar::<f64>()?;
            // Where rows are rotated before φ they are rounded to their dtype as well.
            let is_before = ["Taylor", "Cosine", "Identity"].iter().any(|map| what.contains(map));
            let allowed = scale * (if is_before { 40.0 } else { 1.01 } * unit + 60.0 * 2f64.powi(-24));
            assert_close(&ours.to_dtype(DType::F64)?, &exact, allowed, &format!("{what} in {dtype:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let [q, k, v] = inputs(Sizes { heads: [2, 2, 2], queries: 5, keys: 3 })?;
    let options = LinearOptions { causal: true, ..Default::default() };
    let rotary = Rotary::new(8, BASE)?;
    let function = "rotary_linear_attention";
    assert_refused(rotary_linear_attention(&q, &k, &v, &rotary, &options), &[function, "`rotary`", "8", "width 6"]);
    let taylor = LinearOptions { map: FeatureMap::Taylor, ..options.clone() };
    assert_refused(rotary_linear_attention(&q, &k, &v, &rotary, &taylor), &[function, "`rotary`", "8", "width 6"]);
    let rotary = Rotary::new(WIDTH, BASE)?;
    assert_refused(rotary_linear_attention(&q, &k, &v.narrow(2, 0, 2)?, &rotary, &options), &[function, "`v`"]);
    let (_, state) = rotary_linear_attention_with_state(&k, &k, &v, &rotary, &options, None)?;
    let more = random("more", &[2, 2, 7, WIDTH])?;
    let refused = rotary_linear_attention_with_state(&more, &k, &v, &rotary, &options, Some(&state));
    assert_refused(refused, &["rotary_linear_attention_with_state", "`q` is 7 rows", "the 6 keys"]);
    let full = LinearOptions { causal: false, ..options };
    assert_refused(
        rotary_linear_attention_with_state(&k, &k, &v, &rotary, &full, None),
        &["rotary_linear_attention_with_state", "`causal`"],
    );
    Ok(())
}

/// Rows at positions in any order are the rows at these positions, gradients too.
#[test]
fn positions_of_every_row() -> Result<()> {
    let rotary = Rotary::new(WIDTH, BASE)?;
    let positions = [[0u32, 1, 2, 3, 3000], [1023, 1024, 5, 5, 4]];
    let x = Var::from_tensor(&random("x", &[2, 3, 5, WIDTH])?)?;
    let y = rotary.apply_at(&x, &Tensor::new(&positions, &Device::Cpu)?)?;
    let row = |x: &Tensor, entry, row| x.narrow(0, entry, 1)?.narrow(2, row, 1);
    for (entry, positions) in positions.iter().enumerate() {
        for (index, position) in positions.iter().enumerate() {
            let alone = rotary.apply(&row(&x, entry, index)?, *position as usize)?;
            assert_close(&row(&y, entry, index)?, &alone, 0.0, &format!("at {position}"))?;
        }
    }
    let gradient = (&y * random("d_y", y.dims())?)?.sum_all()?.backward()?.remove(&x).unwrap();
    // A rotation: ⟨R x, d⟩ = ⟨x, Rᵀ d⟩.
    let expected = (y * random("d_y", &[2, 3, 5, WIDTH])?)?.sum_all()?.to_scalar::<f64>()?;
    let along = (gradient * x.as_tensor())?.sum_all()?.to_scalar::<f64>()?;
    assert!((along - expected).abs() < 1e-10, "{along} {expected}");
    let at = |positions: Tensor| rotary.apply_at(&x, &positions);
    assert_refused(at(Tensor::zeros((2, 4), DType::U32, &Device::Cpu)?), &["Rotary::apply_at", "[2, 4]", "[2, 5]"]);
    assert_refused(at(Tensor::zeros((2, 5), DType::F32, &Device::Cpu)?), &["Rotary::apply_at", "f32", "u32"]);
    assert_refused(at(Tensor::full(u32::MAX, (2, 5), &Device::Cpu)?), &["`position` is 4294967295"]);
    Ok(())
}
