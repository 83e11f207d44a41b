//! Causal convolution against its reference, forward and backward, in every dtype and on every instruction set.

use attn_kernels::cpu::Isa;
use attn_kernels::reference::{self, Array, ConvolutionInputs};
use attn_kernels::{ConvolutionOptions, Sequences, causal_convolution, causal_convolution_with_state};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::random::Random;

/// What is convolved, and how.
#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    tokens: usize,
    channels: usize,
    taps: usize,
    bias: bool,
    state: bool,
    silu: bool,
    lengths: Option<Vec<u32>>,
    key_mask: Option<Vec<u8>>,
}

impl Case {
    fn new([batch, tokens, channels, taps]: [usize; 4]) -> Self {
        let (bias, state, silu, lengths, key_mask) = (false, false, false, None, None);
        Self { batch, tokens, channels, taps, bias, state, silu, lengths, key_mask }
    }

    fn sequences(&self) -> usize {
        self.lengths.as_ref().map_or(self.batch, Vec::len)
    }
}

/// Shapes with every choice on and off, then masks and packed sequences.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes = [
        [1, 1, 1, 1],
        [2, 7, 3, 4],
        [1, 0, 8, 4],
        [2, 1, 8, 4],
        [2, 2, 16, 4],
        [1, 3, 5, 4],
        [2, 40, 33, 2],
        [1, 5, 64, 7],
        [1, 70, 600, 4],
        [1, 5000, 9, 3],
    ];
    for (index, shape) in shapes.into_iter().enumerate() {
        for choice in 0..8 {
            // All of them for the small ones, for the large ones some.
            if shape[1] * shape[2] > 1000 && (choice + index) % 3 != 0 {
                continue;
            }
            let (bias, state, silu) = (choice & 1 != 0, choice & 2 != 0, choice & 4 != 0);
            cases.push(Case { bias, state, silu, ..Case::new(shape) });
        }
    }
    let base = Case { bias: true, silu: true, ..Case::new([1, 20, 10, 4]) };
    for lengths in [vec![20], vec![3, 0, 12, 1, 4], vec![1; 20], vec![0, 20, 0]] {
        cases.push(Case { lengths: Some(lengths.clone()), ..base.clone() });
        cases.push(Case { lengths: Some(lengths), state: true, silu: false, ..base.clone() });
    }
    let masks: [fn(usize) -> bool; 5] = [|i| i < 7, |i| i >= 9, |i| i % 3 != 1, |_| false, |_| true];
    for keep in masks {
        let rows = [(0..20).map(|i| u8::from(keep(i))).collect::<Vec<_>>(), vec![1; 20]].concat();
        cases.push(Case { batch: 2, key_mask: Some(rows.clone()), ..base.clone() });
        cases.push(Case { batch: 2, key_mask: Some(rows), state: true, ..base.clone() });
    }
    cases
}

fn random(name: &str, shape: [usize; 4]) -> Array {
    let mut random = Random::new(name);
    Array::from_fn(shape, |_| random.normal())
}

/// Numbers of the dtype.
fn rounded(array: Array, dtype: DType) -> Result<Array> {
    let count = array.data.len();
    let tensor = Tensor::from_vec(array.data, count, &Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F64)?;
    Ok(Array { data: tensor.to_vec1()?, shape: array.shape })
}

impl Case {
    fn inputs(&self, dtype: DType) -> Result<ConvolutionInputs> {
        let Self { batch, tokens, channels, taps, .. } = *self;
        let named = |name: &str, shape| rounded(random(name, shape), dtype);
        let state = self.state.then(|| named("state", [1, self.sequences(), taps - 1, channels])).transpose()?;
        Ok(ConvolutionInputs {
            x: named("x", [1, batch, tokens, channels])?,
            weight: named("weight", [1, 1, channels, taps])?,
            bias: self.bias.then(|| named("bias", [1, 1, 1, channels])).transpose()?,
            state,
        })
    }

    fn reference_options(&self) -> ConvolutionOptions<Array> {
        let shape = [1, 1, self.batch, self.tokens];
        let key_mask = self.key_mask.as_ref().map(|keep| keep.iter().map(|&keep| keep.into()).collect());
        ConvolutionOptions {
            silu: self.silu,
            key_mask: key_mask.map(|data| Array { data, shape }),
            sequences: self.lengths.clone().map(Sequences::of_lengths),
        }
    }

    fn options(&self) -> Result<ConvolutionOptions<Tensor>> {
        let shape = (self.batch, self.tokens);
        let key_mask = self.key_mask.clone().map(|keep| Tensor::from_vec(keep, shape, &Device::Cpu)).transpose()?;
        let sequences = self.lengths.clone().map(Sequences::of_lengths);
        Ok(ConvolutionOptions { silu: self.silu, key_mask, sequences })
    }
}

/// Without leading ones of the reference's shape.
fn var(array: &Array, rank: usize, dtype: DType) -> Result<Var> {
    let tensor = Tensor::from_vec(array.data.clone(), &array.shape[4 - rank..], &Device::Cpu)?;
    Var::from_tensor(&tensor.to_dtype(dtype)?)
}

fn wide(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

#[track_caller]
fn assert_close(ours: &[f64], theirs: &[f64], unit: f64, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let largest = theirs.iter().fold(1.0, |largest: f64, x| largest.max(x.abs()));
    for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= unit * largest, "{what}: {a} is not {b} at {index}");
    }
}

/// Runs a case with gradients, and compares everything.
fn check(case: &Case, dtype: DType, isa: &str) -> Result<()> {
    let inputs = case.inputs(dtype)?;
    let reference_options = case.reference_options();
    let (d_y, d_state) =
        (random("dy", inputs.x.shape), random("dstate", [1, case.sequences(), case.taps - 1, case.channels]));
    let what = format!("{case:?} in {dtype:?} by {isa}");
    // A rounding of the result, and sums over the tokens in the gradients of weights.
    let (unit, sums) = match dtype {
        DType::F64 => (1e-13, 1e-12),
        DType::F32 => (1e-6, 1e-5),
        DType::BF16 => (2f64.powi(-8), 2f64.powi(-7)),
        _ => (2f64.powi(-11), 2f64.powi(-10)),
    };
    let x = var(&inputs.x, 3, dtype)?;
    let weight = var(&inputs.weight, 2, dtype)?;
    let bias = inputs.bias.as_ref().map(|bias| var(bias, 1, dtype)).transpose()?;
    let state = inputs.state.as_ref().map(|state| var(state, 3, dtype)).transpose()?;
    let of = |var: &Option<Var>| var.as_ref().map(|var| var.as_tensor().clone());
    let (y, next) =
        causal_convolution_with_state(&x, &weight, of(&bias).as_ref(), &case.options()?, of(&state).as_ref())?;
    assert_eq!((y.dtype(), next.dtype(), y.dims()), (dtype, dtype, x.dims()));
    let expected = reference::causal_convolution(&inputs, &reference_options);
    assert_close(&wide(&y)?, &expected.data, unit, &what);
    let expected = reference::causal_convolution_state(&inputs, &reference_options);
    assert_close(&wide(&next)?, &expected.data, 0.0, &format!("{what}: state"));
    if !case.state {
        let plain = causal_convolution(&x, &weight, of(&bias).as_ref(), &case.options()?)?;
        assert_eq!(wide(&plain)?, wide(&y)?, "{what}: without a state");
    }

    let weighted = |y: &Tensor, weights: &Array| -> Result<Tensor> {
        let weights = Tensor::from_vec(weights.data.clone(), y.shape(), &Device::Cpu)?;
        (y.to_dtype(DType::F64)? * weights)?.sum_all()
    };
    let gradients = (weighted(&y, &d_y)? + weighted(&next, &d_state)?)?.backward()?;
    // The gradient of a half is a half: dy is rounded on its way.
    let d_y = rounded(d_y, dtype)?;
    let d_state = rounded(d_state, dtype)?;
    let expected = reference::causal_convolution_backward(&inputs, &reference_options, &d_y, Some(&d_state));
    let all = [
        ("x", Some(&x), Some(&expected.x)),
        ("weight", Some(&weight), Some(&expected.weight)),
        ("bias", bias.as_ref(), expected.bias.as_ref()),
        ("state", state.as_ref(), expected.state.as_ref()),
    ];
    for (name, var, expected) in all {
        let (Some(var), Some(expected)) = (var, expected) else { continue };
        let zeros = || vec![0.0; expected.data.len()];
        let ours = gradients.get(var).map_or_else(|| Ok(zeros()), wide)?;
        assert_close(&ours, &expected.data, sums, &format!("{what}: gradient of {name}"));
    }
    Ok(())
}

#[test]
fn equals_the_reference() -> Result<()> {
    for isa in Isa::ALL {
        for case in cases() {
            for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
                isa.force(|| check(&case, dtype, isa.name())).unwrap_or(Ok(()))?;
            }
        }
    }
    Ok(())
}

/// The hand-derived gradients of the reference against central differences.
#[test]
fn gradients_of_the_reference() -> Result<()> {
    const STEP: f64 = 1e-5;
    for case in cases().into_iter().filter(|case| case.tokens * case.channels <= 250) {
        let (inputs, options) = (case.inputs(DType::F64)?, case.reference_options());
        let d_y = random("dy", inputs.x.shape);
        let d_state = random("dstate", [1, case.sequences(), case.taps - 1, case.channels]);
        let dot = |a: &Array, b: &Array| a.data.iter().zip(&b.data).map(|(a, b)| a * b).sum::<f64>();
        let loss = |inputs: &ConvolutionInputs| {
            dot(&reference::causal_convolution(inputs, &options), &d_y)
                + dot(&reference::causal_convolution_state(inputs, &options), &d_state)
        };
        let gradients = reference::causal_convolution_backward(&inputs, &options, &d_y, Some(&d_state));
        let parts: [fn(&mut ConvolutionInputs) -> Option<&mut Array>; 4] = [
            |inputs| Some(&mut inputs.x),
            |inputs| Some(&mut inputs.weight),
            |inputs| inputs.bias.as_mut(),
            |inputs| inputs.state.as_mut(),
        ];
        for part in parts {
            let Some(gradient) = part(&mut gradients.clone()).map(|array| array.data.clone()) else { continue };
            for index in (0..gradient.len()).step_by(gradient.len().div_ceil(12).max(1)) {
                let at = |step: f64| {
                    let mut moved = inputs.clone();
                    if let Some(array) = part(&mut moved) {
                        array.data[index] += step;
                    }
                    loss(&moved)
                };
                let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                assert!((difference - gradient[index]).abs() < 1e-7 * (1.0 + difference.abs()), "{case:?} at {index}");
            }
        }
    }
    Ok(())
}

fn normal(name: &str, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let mut random = Random::new(name);
    let numbers: Vec<f64> = (0..dims.iter().product()).map(|_| random.normal()).collect();
    Tensor::from_vec(numbers, dims, &Device::Cpu)?.to_dtype(dtype)
}

/// Cut anywhere, also into pieces shorter than the taps, with the gradients of the whole.
#[test]
fn pieces_are_the_whole() -> Result<()> {
    let options = ConvolutionOptions { silu: true, ..Default::default() };
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let weight = Var::from_tensor(&normal("weight", &[10, 4], dtype)?)?;
        let x = Var::from_tensor(&normal("x", &[2, 23, 10], dtype)?)?;
        let whole = causal_convolution(&x, &weight, None, &options)?;
        let expected = whole.to_dtype(DType::F64)?.sqr()?.sum_all()?.backward()?;
        for lengths in [&[23][..], &[1; 23], &[7, 1, 0, 9, 1, 5], &[2, 2, 19]] {
            let (mut start, mut state, mut outs) = (0, None, Vec::new());
            for &length in lengths {
                let piece = x.narrow(1, start, length)?;
                let (y, next) = causal_convolution_with_state(&piece, &weight, None, &options, state.as_ref())?;
                (start, state) = (start + length, Some(next));
                outs.push(y);
            }
            let out = Tensor::cat(&outs, 1)?;
            assert_eq!(wide(&out)?, wide(&whole)?, "{lengths:?} in {dtype:?}");
            if dtype == DType::F64 {
                let gradients = out.sqr()?.sum_all()?.backward()?;
                for variable in [&x, &weight] {
                    let [ours, theirs] = [&gradients, &expected].map(|all| wide(all.get(variable).unwrap()));
                    assert_close(&ours?, &theirs?, 1e-12, &format!("{lengths:?}"));
                }
            }
        }
    }
    Ok(())
}

/// The same bits alone, in a batch, packed, and on any number of threads, forward and backward.
#[test]
fn rows_are_their_own() -> Result<()> {
    let weight = normal("weight", &[700, 4], DType::F32)?;
    let x = normal("x", &[3, 150, 700], DType::F32)?;
    let run = |x: &Tensor, options: &ConvolutionOptions<Tensor>, threads: usize| -> Result<[Vec<f64>; 3]> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (x, weight) = (Var::from_tensor(x)?, Var::from_tensor(&weight)?);
            let y = causal_convolution(&x, &weight, None, options)?;
            let gradients = y.sqr()?.sum_all()?.backward()?;
            Ok([wide(&y)?, wide(gradients.get(&x).unwrap())?, wide(gradients.get(&weight).unwrap())?])
        })
    };
    let options = ConvolutionOptions { silu: true, ..Default::default() };
    let all = run(&x, &options, 1)?;
    for threads in [2, 3, 5] {
        assert_eq!(run(&x, &options, threads)?, all, "{threads} threads");
    }
    let packed = x.reshape((1, 450, 700))?;
    let of_packed = ConvolutionOptions { sequences: Some(Sequences::of_lengths([150; 3])), ..options.clone() };
    assert_eq!(run(&packed, &of_packed, 2)?[..2], all[..2]);
    for entry in 0..3 {
        let alone = run(&x.narrow(0, entry, 1)?, &options, 2)?;
        for (alone, all) in alone.iter().zip(&all).take(2) {
            assert_eq!(alone[..], all[entry * 150 * 700..][..150 * 700]);
        }
    }
    Ok(())
}

#[test]
fn removed_tokens_may_hold_anything() -> Result<()> {
    let keep = Tensor::new(&[[0u8, 1, 0, 1, 1, 0]], &Device::Cpu)?;
    let weight = Var::from_tensor(&normal("weight", &[5, 3], DType::F64)?)?;
    let options = ConvolutionOptions { key_mask: Some(keep.clone()), ..Default::default() };
    let x = normal("x", &[1, 6, 5], DType::F64)?;
    let keep = keep.unsqueeze(2)?.broadcast_as(x.shape())?;
    let poisoned = keep.where_cond(&x, &Tensor::full(f64::NAN, x.shape(), &Device::Cpu)?)?;
    let run = |x: &Tensor| -> Result<[Vec<f64>; 3]> {
        let x = Var::from_tensor(x)?;
        let y = causal_convolution(&x, &weight, None, &options)?;
        let gradients = y.sqr()?.sum_all()?.backward()?;
        Ok([wide(&y)?, wide(gradients.get(&x).unwrap())?, wide(gradients.get(&weight).unwrap())?])
    };
    assert_eq!(run(&poisoned)?, run(&x)?);
    Ok(())
}

/// Views that do not lie end to end.
#[test]
fn strided_rows() -> Result<()> {
    let options = ConvolutionOptions { silu: true, ..Default::default() };
    let x = normal("x", &[9, 2, 12], DType::F32)?.narrow(2, 3, 7)?.transpose(0, 1)?;
    let weight = normal("weight", &[4, 7], DType::F32)?.t()?;
    let plain = causal_convolution(&x.contiguous()?, &weight.contiguous()?, None, &options)?;
    assert_eq!(wide(&causal_convolution(&x, &weight, None, &options)?)?, wide(&plain)?);
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let float = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let (x, weight) = (float(&[2, 5, 3])?, float(&[3, 4])?);
    let plain = ConvolutionOptions::default;
    let refused = |result: Result<Tensor>, words: &[&str]| {
        let message = result.unwrap_err().to_string();
        let missing = words.iter().find(|word| !message.contains(**word));
        assert!(missing.is_none(), "{missing:?} is not in: {message}");
    };
    let call = |x: &Tensor, weight: &Tensor| causal_convolution(x, weight, None, &plain());
    refused(call(&float(&[5, 3])?, &weight), &["causal_convolution", "`x`", "[5, 3]", "[batch, tokens, channels]"]);
    refused(call(&float(&[2, 5, 0])?, &float(&[0, 4])?), &["`x`", "at least one channel"]);
    refused(call(&x, &float(&[4, 4])?), &["`weight`", "[4, 4]", "[3, _]"]);
    refused(call(&x, &float(&[3, 1, 4])?), &["`weight`", "[3, 1, 4]"]);
    refused(call(&x, &float(&[3, 0])?), &["`weight`", "at least one tap"]);
    refused(call(&x, &weight.to_dtype(DType::F64)?), &["`weight`", "f64", "f32"]);
    refused(call(&x.to_dtype(DType::U32)?, &weight), &["`x`", "u32"]);
    let bias = float(&[4])?;
    refused(causal_convolution(&x, &weight, Some(&bias), &plain()), &["`bias`", "[4]", "[3]"]);
    let state = float(&[2, 4, 3])?;
    let after = causal_convolution_with_state(&x, &weight, None, &plain(), Some(&state)).map(|(y, _)| y);
    refused(after, &["causal_convolution_with_state", "`state`", "[2, 4, 3]", "[2, 3, 3]"]);
    let sequences = |lengths: &[u32], key_mask| {
        let sequences = Some(Sequences::of_lengths(lengths.iter().copied()));
        ConvolutionOptions { sequences, key_mask, ..plain() }
    };
    let one = float(&[1, 5, 3])?;
    refused(causal_convolution(&x, &weight, None, &sequences(&[5], None)), &["`x`", "1 first"]);
    refused(causal_convolution(&one, &weight, None, &sequences(&[4], None)), &["`sequences`", "end with 4", "5"]);
    let mask = Tensor::ones((1, 5), DType::U8, &Device::Cpu)?;
    let both = sequences(&[5], Some(mask.clone()));
    refused(causal_convolution(&one, &weight, None, &both), &["`key_mask`", "packed sequences"]);
    let masked = |mask| ConvolutionOptions { key_mask: Some(mask), ..plain() };
    refused(causal_convolution(&x, &weight, None, &masked(mask.clone())), &["`key_mask`", "[1, 5]"]);
    refused(causal_convolution(&one, &weight, None, &masked(mask.to_dtype(DType::U32)?)), &["`key_mask`", "u32"]);
    Ok(())
}
