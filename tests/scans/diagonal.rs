//! h_t = a_t ⊙ h_{t−1} + b_t.

use attn_kernels::cpu::Isa;
use attn_kernels::reference::{self, Array};
use attn_kernels::{ScanOptions, complex_diagonal_scan_with_state, diagonal_scan_with_state};
use candle_core::{DType, Device, Result, Tensor, Var};

use super::{Numbers, RUNS, deep, judge, numbers, plain, rounded, variable};
use crate::common::random::Random;

#[derive(Debug, Clone, Copy)]
struct Diagonal {
    batch: usize,
    steps: usize,
    channels: usize,
    is_complex: bool,
    reversed: bool,
    has_state: bool,
    /// Largest |a|.
    keeps: f64,
}

/// Parts of a, b, the state, and the gradients of h and the last state.
struct DiagonalData {
    a: [Array; 2],
    b: [Array; 2],
    state: [Array; 2],
    d_h: [Array; 2],
    d_last: [Array; 2],
}

impl Diagonal {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for steps in [0, 1, 2, 15, 16, 17, 63, 64, 65, 200, 1000] {
            for (batch, channels, is_complex) in [(1, 1, false), (2, 3, true), (1, 257, false), (3, 65, true)] {
                let case = Self { batch, steps, channels, is_complex, reversed: false, has_state: false, keeps: 1.0 };
                all.push(if steps > 200 && channels > 3 { Self { steps: 300, ..case } } else { case });
            }
        }
        let turned = |(index, case): (usize, &Self)| Self {
            reversed: index % 2 == 0,
            has_state: index % 3 != 0,
            keeps: [1.0, 0.0, 0.5, 1.02][index % 4],
            ..*case
        };
        all.iter().enumerate().map(turned).collect()
    }

    fn shape(&self) -> [usize; 4] {
        [1, self.batch, self.steps, self.channels]
    }

    fn data(&self, dtype: DType, run: usize) -> DiagonalData {
        let mut random = Random::new(&format!("{self:?} {run}"));
        let (shape, state) = (self.shape(), [1, self.batch, 1, self.channels]);
        let mut parts = |shape: [usize; 4]| {
            let (re, im) = (random.array(shape, 1.0), random.array(shape, 1.0));
            [rounded(&re, dtype), if self.is_complex { rounded(&im, dtype) } else { Array::zeros(shape) }]
        };
        let [mut a, b, d_h] = [parts(shape), parts(shape), parts(shape)];
        let [state, d_last] = [parts(state), parts(state)];
        // Within the circle of `keeps`; every 16th cuts.
        for at in 0..a[0].data.len() {
            let [re, im] = [a[0].data[at], a[1].data[at]];
            let factor = if at % 16 == 7 { 0.0 } else { self.keeps / (1.0 + (re * re + im * im).sqrt() * 0.1) };
            let size = (re * re + im * im).sqrt().max(1e-3);
            a[0].data[at] = re / size * factor;
            a[1].data[at] = im / size * factor;
        }
        DiagonalData { a: a.map(|a| rounded(&a, dtype)), b, state, d_h, d_last }
    }

    fn expected(&self, data: &DiagonalData) -> Numbers {
        let state = self.has_state.then(|| data.state.each_ref());
        let h = reference::diagonal_scan(data.a.each_ref(), data.b.each_ref(), state, self.reversed);
        let mut d_h = data.d_h.clone();
        let end = if self.reversed { 0 } else { self.steps.saturating_sub(1) };
        let (mut last, empty) = (data.state.clone(), self.steps == 0);
        for part in 0..2 {
            for batch in 0..self.batch {
                match empty {
                    true if !self.has_state => last[part].row_mut(0, batch, 0).fill(0.0),
                    true => {}
                    false => {
                        last[part].row_mut(0, batch, 0).copy_from_slice(h[part].row(0, batch, end));
                        let d_last = data.d_last[part].row(0, batch, 0);
                        d_h[part].row_mut(0, batch, end).iter_mut().zip(d_last).for_each(|(d, last)| *d += last);
                    }
                }
            }
        }
        let [d_a, d_b, mut d_state] = reference::diagonal_scan_backward(
            data.a.each_ref(),
            data.b.each_ref(),
            state,
            self.reversed,
            d_h.each_ref(),
        );
        if empty {
            d_state = data.d_last.clone();
        }
        self.collect([h, last, d_a, d_b, d_state])
    }

    /// Of results with parts, those that there are; the last state, a row of h, behind h: alone it may be what is left of larger
    /// numbers.
    fn collect(&self, all: [[Array; 2]; 5]) -> Numbers {
        let [mut h, last, d_a, d_b, d_state] = all;
        h.iter_mut().zip(last).for_each(|(h, last)| h.data.extend(last.data));
        let mut results = vec![h, d_a, d_b];
        results.extend(self.has_state.then_some(d_state));
        let parts = if self.is_complex { 2 } else { 1 };
        results.into_iter().flat_map(|result| result.into_iter().take(parts)).map(|part| part.data).collect()
    }

    /// Results and gradients of `run`, which takes parts of a, b and the state and returns those of h and the last state.
    fn run(
        &self,
        data: &DiagonalData,
        dtype: DType,
        run: impl FnOnce([[&Tensor; 2]; 2], Option<[&Tensor; 2]>) -> Result<[[Tensor; 2]; 2]>,
    ) -> Result<Numbers> {
        let (dims, state_dims) = ([self.batch, self.steps, self.channels], [self.batch, self.channels]);
        let parts = |x: &[Array; 2], dims: &[usize]| -> Result<Vec<Var>> {
            x.iter().map(|part| variable(part, dims, dtype)).collect()
        };
        let (a, b, state) = (parts(&data.a, &dims)?, parts(&data.b, &dims)?, parts(&data.state, &state_dims)?);
        let (d_h, d_last) = (parts(&data.d_h, &dims)?, parts(&data.d_last, &state_dims)?);
        let pair = |x: &'_ [Var]| -> [Tensor; 2] { [x[0].as_tensor().clone(), x[1].as_tensor().clone()] };
        let (a_pair, b_pair, s_pair) = (pair(&a), pair(&b), pair(&state));
        let [h, last] = run([a_pair.each_ref(), b_pair.each_ref()], self.has_state.then(|| s_pair.each_ref()))?;
        let count = if self.is_complex { 2 } else { 1 };
        let mut loss = Tensor::zeros((), dtype, &Device::Cpu)?;
        for part in 0..count {
            loss = (loss + (&h[part] * d_h[part].as_detached_tensor())?.sum_all()?)?;
            loss = (loss + (&last[part] * d_last[part].as_detached_tensor())?.sum_all()?)?;
        }
        let gradients = loss.backward()?;
        let mut results = Vec::new();
        for (h, last) in h.iter().zip(&last).take(count) {
            results.push([numbers(h)?, numbers(last)?].concat());
        }
        let tracked = a[..count].iter().chain(&b[..count]).chain(&state[..if self.has_state { count } else { 0 }]);
        for input in tracked {
            let gradient = gradients.get(input).map(numbers).transpose()?;
            results.push(gradient.unwrap_or_else(|| vec![0.0; input.elem_count()]));
        }
        Ok(results)
    }

    fn ours(&self, data: &DiagonalData, dtype: DType) -> Result<Numbers> {
        let options = ScanOptions { reversed: self.reversed };
        self.run(data, dtype, |[a, b], state| {
            if self.is_complex {
                let (h, last) = complex_diagonal_scan_with_state(a, b, &options, state)?;
                return Ok([h, last]);
            }
            let (h, last) = diagonal_scan_with_state(a[0], b[0], &options, state.map(|state| state[0]))?;
            Ok([[h.clone(), h], [last.clone(), last]])
        })
    }

    /// The loop over steps in candle's operations.
    fn plain(&self, data: &DiagonalData) -> Numbers {
        let dims = (self.batch, self.channels);
        let run = || {
            self.run(data, DType::F32, |[a, b], state| {
                let zeros = Tensor::zeros(dims, DType::F32, &Device::Cpu)?;
                let mut last = state.map_or([zeros.clone(), zeros], |state| state.map(Tensor::clone));
                let mut all = [Vec::new(), Vec::new()];
                let order: Vec<usize> =
                    if self.reversed { (0..self.steps).rev().collect() } else { (0..self.steps).collect() };
                for t in order {
                    let [[a0, a1], [b0, b1]] =
                        [a, b].map(|x| x.map(|part| part.narrow(1, t, 1).unwrap().squeeze(1).unwrap()));
                    last = match self.is_complex {
                        false => [((a0 * &last[0])? + b0)?, last[1].clone()],
                        true => [
                            (((&a0 * &last[0])? - (&a1 * &last[1])?)? + b0)?,
                            (((a0 * &last[1])? + (a1 * &last[0])?)? + b1)?,
                        ],
                    };
                    all.iter_mut().zip(&last).for_each(|(all, x)| all.push(x.clone()));
                }
                if self.steps == 0 {
                    let none = Tensor::zeros((self.batch, 0, self.channels), DType::F32, &Device::Cpu)?;
                    return Ok([[none.clone(), none], last]);
                }
                if self.reversed {
                    all.iter_mut().for_each(|all| all.reverse());
                }
                Ok([[Tensor::stack(&all[0], 1)?, Tensor::stack(&all[1], 1)?], last])
            })
            .unwrap()
        };
        deep(run)
    }
}

#[test]
fn diagonal_scans_agree_with_the_reference() {
    let cases = Diagonal::all();
    assert!(cases.len() >= 40);
    for case in cases {
        let [data32, data64] = [DType::F32, DType::F64].map(|dtype| case.data(dtype, 0));
        let [expected32, expected64] = [&data32, &data64].map(|data| case.expected(data));
        let plain = plain((0..RUNS).map(|run| {
            let data = case.data(DType::F32, run);
            (case.plain(&data), case.expected(&data))
        }));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let run = |data: &DiagonalData, dtype| isa.force(|| case.ours(data, dtype)).unwrap().unwrap();
            let what = format!("{case:?} on {isa:?}");
            judge(&what, &run(&data32, DType::F32), &expected32, &plain, DType::F32);
            judge(&what, &run(&data64, DType::F64), &expected64, &plain, DType::F64);
        }
    }
}

#[test]
fn gradients_of_the_reference_are_differences() {
    let case =
        Diagonal { batch: 2, steps: 9, channels: 3, is_complex: true, reversed: true, has_state: true, keeps: 0.9 };
    let data = case.data(DType::F64, 0);
    let loss = |a: &[Array; 2], b: &[Array; 2], state: &[Array; 2]| -> f64 {
        let h = reference::diagonal_scan(a.each_ref(), b.each_ref(), Some(state.each_ref()), true);
        h.iter().zip(&data.d_h).map(|(h, d)| h.data.iter().zip(&d.data).map(|(h, d)| h * d).sum::<f64>()).sum()
    };
    let DiagonalData { a, b, state, d_h, .. } = &data;
    let gradients =
        reference::diagonal_scan_backward(a.each_ref(), b.each_ref(), Some(state.each_ref()), true, d_h.each_ref());
    for (which, gradient) in gradients.iter().enumerate() {
        for part in 0..2 {
            for at in 0..gradient[part].data.len() {
                let moved = |by: f64| {
                    let mut inputs = [a.clone(), b.clone(), state.clone()];
                    inputs[which][part].data[at] += by;
                    loss(&inputs[0], &inputs[1], &inputs[2])
                };
                let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((gradient[part].data[at] - difference).abs() < 1e-8, "input {which}, part {part}, {at}");
            }
        }
    }
}

/// Channels of several dimensions are those of one, with their gradients.
#[test]
fn channels_may_have_dimensions() -> Result<()> {
    let x = |name: &str, dims: &[usize]| {
        let mut random = Random::new(name);
        Var::from_vec((0..dims.iter().product()).map(|_| random.normal()).collect::<Vec<f64>>(), dims, &Device::Cpu)
    };
    let [re, im] = [x("re", &[1, 1, 3, 2, 4])?, x("im", &[1, 1, 3, 2, 4])?];
    let [b_re, b_im] = [x("b re", &[2, 5, 3, 2, 4])?, x("b im", &[2, 5, 3, 2, 4])?];
    let [s_re, s_im] = [x("s re", &[2, 3, 2, 4])?, x("s im", &[2, 3, 2, 4])?];
    let scan = |flat: bool| -> Result<Vec<Tensor>> {
        let shaped =
            |x: &Var, steps: usize| if flat { x.reshape((x.dim(0)?, steps, 24)) } else { Ok(x.as_tensor().clone()) };
        let state = [&s_re, &s_im].map(|x| if flat { x.flatten_from(1) } else { Ok(x.as_tensor().clone()) });
        let ([a_re, a_im], [b_re, b_im]) = ([&re, &im].map(|x| shaped(x, 1)), [&b_re, &b_im].map(|x| shaped(x, 5)));
        let ([s_re, s_im], options) = (state, ScanOptions::default());
        let (h, last) =
            complex_diagonal_scan_with_state([&a_re?, &a_im?], [&b_re?, &b_im?], &options, Some([&s_re?, &s_im?]))?;
        Ok([h, last].concat())
    };
    let (whole, flat) = (scan(false)?, scan(true)?);
    assert_eq!((whole[0].dims(), whole[2].dims()), (&[2, 5, 3, 2, 4][..], &[2, 3, 2, 4][..]));
    let gradients = |all: &[Tensor]| -> Result<_> {
        let sums = all.iter().map(|x| x.sqr()?.sum_all()).collect::<Result<Vec<_>>>()?;
        Tensor::stack(&sums, 0)?.sum_all()?.backward()
    };
    for (a, b) in whole.iter().zip(&flat) {
        assert_eq!(numbers(a)?, numbers(b)?);
    }
    let (whole, flat) = (gradients(&whole)?, gradients(&flat)?);
    for input in [&re, &im, &b_re, &b_im, &s_re, &s_im] {
        let (Some(a), Some(b)) = (whole.get(input), flat.get(input)) else { panic!("no gradient") };
        assert_eq!(numbers(a)?, numbers(b)?);
    }
    Ok(())
}
