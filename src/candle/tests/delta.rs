//! The delta engine against candle's own gradients of the recurrence, token by token.

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::super::{
    delta_attention, delta_attention_with_state, gated_linear_attention, gated_linear_attention_with_state,
    generalized_delta_attention, generalized_delta_attention_with_state,
};
use super::random;
use crate::{DeltaOptions, Sequences};

const TOKENS: usize = 37;

/// All inputs, tracked: q, k, v, log-decay, state, β, a, b, bonus.
struct Inputs {
    q: Var,
    k: Var,
    v: Var,
    log_decay: Var,
    state: Var,
    beta: Var,
    a: Var,
    b: Var,
    bonus: Var,
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Gated,
    Bonus,
    Rule,
    Free,
}

impl Form {
    const ALL: [Self; 4] = [Self::Gated, Self::Bonus, Self::Rule, Self::Free];
}

impl Inputs {
    fn new(dtype: DType) -> Result<Self> {
        let device = &Device::Cpu;
        let var = |tensor: Tensor| Var::from_tensor(&tensor.to_dtype(dtype)?.contiguous()?);
        let rows = |width: usize, scale: f64| var((Tensor::randn(0f64, 1.0, (2, 2, TOKENS, width), device)? * scale)?);
        Ok(Self {
            q: rows(8, 1.0)?,
            k: rows(8, 0.5)?,
            v: rows(6, 1.0)?,
            log_decay: var((Tensor::rand(0f64, 1.0, (2, 2, TOKENS, 8), device)? * -1.0)?)?,
            state: var(Tensor::randn(0f64, 1.0, (2, 2, 8, 6), device)?)?,
            beta: var(Tensor::rand(0f64, 1.0, (2, 2, TOKENS), device)?)?,
            a: rows(8, 0.3)?,
            b: rows(8, 0.3)?,
            bonus: var(Tensor::randn(0f64, 1.0, (2, 8), device)?)?,
        })
    }

    fn used(&self, form: Form) -> Vec<(&'static str, &Var)> {
        let shared = [("q", &self.q), ("k", &self.k), ("v", &self.v), ("g", &self.log_decay), ("state", &self.state)];
        let own: &[_] = match form {
            Form::Gated => &[],
            Form::Bonus => &[("bonus", &self.bonus)],
            Form::Rule => &[("beta", &self.beta)],
            Form::Free => &[("a", &self.a), ("b", &self.b)],
        };
        [&shared[..], own].concat()
    }

    /// A range of tokens, from a state.
    fn call(&self, form: Form, start: usize, len: usize, state: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let cut = |x: &Var| x.narrow(2, start, len);
        let (q, k, v) = (cut(&self.q)?, cut(&self.k)?, cut(&self.v)?);
        let bonus = matches!(form, Form::Bonus).then(|| self.bonus.as_tensor().clone());
        let log_decay = Some(cut(&self.log_decay)?);
        let options = DeltaOptions { log_decay, bonus, normalize: Some(1e-3), ..Default::default() };
        match form {
            Form::Gated | Form::Bonus => gated_linear_attention_with_state(&q, &k, &v, &options, state),
            Form::Rule => delta_attention_with_state(&q, &k, &v, &cut(&self.beta)?, &options, state),
            Form::Free => {
                let (a, b) = (cut(&self.a)?, cut(&self.b)?);
                generalized_delta_attention_with_state(&q, &k, &v, [&a, &b], &options, state)
            }
        }
    }

    /// The recurrence in candle's operations.
    fn plain(&self, form: Form) -> Result<(Tensor, Tensor)> {
        let unit = |x: &Var| x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + 1e-3)?.sqrt()?);
        let (q, k) = ((unit(&self.q)? / 8f64.sqrt())?, unit(&self.k)?);
        let mut s = self.state.as_tensor().clone();
        let mut outs = Vec::new();
        for t in 0..TOKENS {
            let column = |x: &Tensor| x.narrow(2, t, 1)?.transpose(2, 3);
            let row = |x: &Tensor| x.narrow(2, t, 1);
            let before = s.clone();
            s = s.broadcast_mul(&column(&self.log_decay)?.exp()?)?;
            s = match form {
                Form::Gated | Form::Bonus => (s + column(&k)?.contiguous()?.matmul(&row(&self.v)?.contiguous()?)?)?,
                Form::Rule => {
                    let held = row(&k)?.contiguous()?.matmul(&s)?;
                    let beta = self.beta.narrow(2, t, 1)?.unsqueeze(3)?;
                    let change = (row(&self.v)? - held)?.broadcast_mul(&beta)?;
                    (s + column(&k)?.contiguous()?.matmul(&change)?)?
                }
                Form::Free => {
                    let held = row(&self.b)?.contiguous()?.matmul(&before)?;
                    let s = (s + column(&self.a)?.contiguous()?.matmul(&held)?)?;
                    (s + column(&k)?.contiguous()?.matmul(&row(&self.v)?.contiguous()?)?)?
                }
            };
            let read = if matches!(form, Form::Bonus) { &before } else { &s };
            let out = row(&q)?.contiguous()?.matmul(read)?;
            outs.push(match form {
                Form::Bonus => {
                    let weighed = row(&k)?.broadcast_mul(&self.bonus.reshape((1, 2, 1, 8))?)?;
                    let own = (row(&q)? * weighed)?.sum_keepdim(D::Minus1)?;
                    (out + row(&self.v)?.broadcast_mul(&own)?)?
                }
                _ => out,
            });
        }
        Ok((Tensor::cat(&outs, 2)?, s))
    }
}

fn far(x: &Tensor, y: &Tensor) -> Result<f64> {
    let (x, y) = (x.to_dtype(DType::F64)?, y.to_dtype(DType::F64)?);
    let largest = y.abs()?.max_all()?.to_scalar::<f64>()?;
    Ok((x - y)?.abs()?.max_all()?.to_scalar::<f64>()? / largest.max(1e-9))
}

/// Of a loss that depends on the output and on the last state.
fn gradients((out, state): &(Tensor, Tensor)) -> Result<GradStore> {
    (out.sqr()?.sum_all()? + (state.sqr()?.sum_all()? * 0.5)?.to_dtype(out.dtype())?)?.backward()
}

#[test]
fn gradients_are_those_of_candle() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        let inputs = Inputs::new(dtype)?;
        for form in Form::ALL {
            let ours = inputs.call(form, 0, TOKENS, Some(inputs.state.as_tensor()))?;
            let plain = inputs.plain(form)?;
            assert!(far(&ours.0, &plain.0)? < tolerance && far(&ours.1, &plain.1)? < tolerance, "{form:?} {dtype:?}");
            let (ours, plain) = (gradients(&ours)?, gradients(&plain)?);
            for (name, input) in inputs.used(form) {
                let far = far(ours.get(input).unwrap(), plain.get(input).unwrap())?;
                assert!(far < tolerance, "{form:?} {dtype:?} {name}: {far:e}");
            }
        }
    }
    Ok(())
}

/// Pieces train as the whole, through their states; detached ones end the way back.
#[test]
fn pieces_train_as_the_whole() -> Result<()> {
    let inputs = Inputs::new(DType::F64)?;
    for form in Form::ALL {
        let given = inputs.state.as_tensor();
        let (first, between) = inputs.call(form, 0, 20, Some(given))?;
        let (second, last) = inputs.call(form, 20, TOKENS - 20, Some(&between))?;
        let pieces = (Tensor::cat(&[first, second], 2)?, last);
        let whole = inputs.call(form, 0, TOKENS, Some(given))?;
        assert!(far(&pieces.0, &whole.0)? < 1e-13 && far(&pieces.1, &whole.1)? < 1e-13);
        let (pieces, whole) = (gradients(&pieces)?, gradients(&whole)?);
        for (name, input) in inputs.used(form) {
            let far = far(pieces.get(input).unwrap(), whole.get(input).unwrap())?;
            assert!(far < 1e-12, "{form:?} {name}: {far:e}");
        }
        let cut = inputs.call(form, 20, TOKENS - 20, Some(&between.detach()))?;
        assert!(gradients(&cut)?.get(&inputs.state).is_none());
    }
    Ok(())
}

/// Outputs alone have the gradients of outputs with an unused state; those of 16 bits are those of f32, rounded once.
#[test]
fn outputs_alone() -> Result<()> {
    let inputs = Inputs::new(DType::F32)?;
    let options = DeltaOptions { log_decay: Some(inputs.log_decay.as_tensor().clone()), ..Default::default() };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let rows = |x: &Var| x.to_dtype(dtype);
        let (q, k, v, a, b) =
            (rows(&inputs.q)?, rows(&inputs.k)?, rows(&inputs.v)?, rows(&inputs.a)?, rows(&inputs.b)?);
        let beta = inputs.beta.as_tensor();
        let pairs = [
            (
                gated_linear_attention(&q, &k, &v, &options)?,
                gated_linear_attention_with_state(&q, &k, &v, &options, None)?.0,
            ),
            (
                delta_attention(&q, &k, &v, beta, &options)?,
                delta_attention_with_state(&q, &k, &v, beta, &options, None)?.0,
            ),
            (
                generalized_delta_attention(&q, &k, &v, [&a, &b], &options)?,
                generalized_delta_attention_with_state(&q, &k, &v, [&a, &b], &options, None)?.0,
            ),
        ];
        for (alone, with_state) in pairs {
            assert_eq!(alone.dtype(), dtype);
            assert_eq!(far(&alone, &with_state)?, 0.0);
            let weights = Tensor::randn(0f32, 1.0, alone.shape(), &Device::Cpu)?.to_dtype(dtype)?;
            let [alone, with_state] = [alone, with_state].map(|out| (out * &weights)?.sum_all()?.backward());
            let (alone, with_state) = (alone?, with_state?);
            for input in [&inputs.q, &inputs.k, &inputs.v, &inputs.log_decay] {
                assert_eq!(far(alone.get(input).unwrap(), with_state.get(input).unwrap())?, 0.0);
            }
        }
        let [q, k, v] = [&q, &k, &v].map(|x| Var::from_tensor(&x.detach()));
        let [q, k, v] = [q?, k?, v?];
        let out = delta_attention(&q, &k, &v, beta, &options)?;
        let weights = random(out.dims(), 5)?.to_dtype(dtype)?;
        let narrow = (&out * &weights)?.sum_all()?.backward()?;
        let [wide_q, wide_k, wide_v] = [&q, &k, &v].map(|x| Var::from_tensor(&x.to_dtype(DType::F32)?));
        let (wide_q, wide_k, wide_v) = (wide_q?, wide_k?, wide_v?);
        let wide = delta_attention(&wide_q, &wide_k, &wide_v, beta, &options)?;
        assert_eq!(far(&out, &wide.to_dtype(dtype)?)?, 0.0);
        let wide = (wide * weights.to_dtype(DType::F32)?)?.sum_all()?.backward()?;
        for (input, wide_input) in [(&q, &wide_q), (&k, &wide_k), (&v, &wide_v)] {
            let expected = wide.get(wide_input).unwrap().to_dtype(dtype)?;
            assert_eq!(far(narrow.get(input).unwrap(), &expected)?, 0.0);
        }
    }
    Ok(())
}

/// Packed sequences are what they are alone, with a state each.
#[test]
fn packed_sequences_are_alone() -> Result<()> {
    let row = |x: &Var| x.narrow(0, 0, 1);
    let inputs = Inputs::new(DType::F32)?;
    let (q, k, v, beta) = (row(&inputs.q)?, row(&inputs.k)?, row(&inputs.v)?, row(&inputs.beta)?);
    let lengths = [5usize, 0, 31, 1];
    let states = Tensor::randn(0f32, 1.0, (4, 2, 8, 6), &Device::Cpu)?;
    let options = |log_decay, sequences| DeltaOptions { log_decay: Some(log_decay), sequences, ..Default::default() };
    let sequences = Some(Sequences::of_lengths(lengths.map(|length| length as u32)));
    let (out, last) =
        delta_attention_with_state(&q, &k, &v, &beta, &options(row(&inputs.log_decay)?, sequences), Some(&states))?;
    let mut start = 0;
    for (index, length) in lengths.into_iter().enumerate() {
        let cut = |x: &Tensor| x.narrow(2, start, length);
        let options = options(cut(&row(&inputs.log_decay)?)?, None);
        let state = states.narrow(0, index, 1)?;
        let (alone, alone_last) =
            delta_attention_with_state(&cut(&q)?, &cut(&k)?, &cut(&v)?, &cut(&beta)?, &options, Some(&state))?;
        if length > 0 {
            assert_eq!(far(&alone, &cut(&out)?)?, 0.0);
        }
        assert_eq!(far(&alone_last, &last.narrow(0, index, 1)?)?, 0.0);
        start += length;
    }
    Ok(())
}

#[test]
fn nothing_to_do() -> Result<()> {
    let empty = Var::zeros((1, 2, 0, 8), DType::F32, &Device::Cpu)?;
    let beta = Var::zeros((1, 2, 0), DType::F32, &Device::Cpu)?;
    let state = Var::randn(0f32, 1.0, (1, 2, 8, 8), &Device::Cpu)?;
    let options = DeltaOptions::default();
    let (out, last) = delta_attention_with_state(&empty, &empty, &empty, &beta, &options, Some(state.as_tensor()))?;
    assert_eq!(out.dims(), [1, 2, 0, 8]);
    assert_eq!(far(&last, &state)?, 0.0);
    assert!(last.sum_all()?.backward()?.get(&state).is_some());
    delta_attention(&empty, &empty, &empty, &beta, &options)?.sum_all()?.backward()?;
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let (x, beta) = (zeros(&[1, 2, 5, 4])?, zeros(&[1, 2, 5])?);
    let long = zeros(&[1, 2, 6, 4])?;
    let default = DeltaOptions::<Tensor>::default;
    let call = |beta: &Tensor, options: &DeltaOptions<Tensor>| delta_attention(&x, &x, &x, beta, options);
    let with_decay = |log_decay: Tensor| DeltaOptions { log_decay: Some(log_decay), ..default() };
    let with_bonus = |bonus: Tensor| DeltaOptions { bonus: Some(bonus), ..default() };
    let nan = Tensor::full(f32::NAN, (1, 2, 5), &Device::Cpu)?;
    let state = |dims: &[usize]| delta_attention_with_state(&x, &x, &x, &beta, &default(), Some(&zeros(dims)?));
    let tracked = Var::zeros(2, DType::F32, &Device::Cpu)?;
    let refusals = [
        (call(&zeros(&[1, 1, 5])?, &default()).err(), "beta"),
        (call(&zeros(&[1, 2, 5])?.to_dtype(DType::F64)?, &default()).err(), "beta"),
        (call(&beta, &with_decay((zeros(&[1, 2, 5])? + 0.1)?)).err(), "log_decay"),
        (call(&beta, &with_decay(nan)).err(), "log_decay"),
        (call(&beta, &with_decay(zeros(&[1, 2, 4])?)).err(), "log_decay"),
        (call(&beta, &with_decay(zeros(&[1, 2, 5, 3])?)).err(), "log_decay"),
        (call(&beta, &with_decay(tracked.as_tensor().clone())).err(), "log_decay"),
        (call(&beta, &DeltaOptions { scale: Some(f64::NAN), ..default() }).err(), "scale"),
        (call(&beta, &DeltaOptions { normalize: Some(0.0), ..default() }).err(), "normalize"),
        (call(&beta, &DeltaOptions { bonus: Some(zeros(&[2, 4])?), ..default() }).err(), "bonus"),
        (gated_linear_attention(&x, &x, &x, &with_bonus(zeros(&[1, 4])?)).err(), "bonus"),
        (gated_linear_attention(&x, &x, &x, &with_bonus(zeros(&[2, 4])?.to_dtype(DType::F64)?)).err(), "bonus"),
        (call(&beta, &DeltaOptions { key_mask: Some(beta.clone()), ..default() }).err(), "key_mask"),
        (call(&beta, &DeltaOptions { sequences: Some(Sequences::new(&[0, 4])), ..default() }).err(), "sequences"),
        (state(&[1, 2, 4, 3]).err(), "state"),
        (state(&[1, 1, 4, 4]).err(), "state"),
        (gated_linear_attention(&x, &x, &x, &default()).err(), "log_decay"),
        (gated_linear_attention(&x, &x, &x, &with_decay(beta.clone())).err(), "log_decay"),
        (delta_attention(&x, &long, &long, &beta, &default()).err(), "k"),
        (generalized_delta_attention(&x, &x, &x, [&x, &zeros(&[1, 2, 5, 3])?], &default()).err(), "b"),
    ];
    for (index, (refusal, argument)) in refusals.into_iter().enumerate() {
        let message = refusal.unwrap_or_else(|| panic!("case {index} is not refused")).to_string();
        assert!(message.contains(&format!("`{argument}`")), "{index}: {message}");
    }
    Ok(())
}
