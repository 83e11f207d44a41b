//! Diagonal and selective scans: reference against central differences, every instruction set against the reference.
//!
//! An error may be twice that of the same loop over steps in candle's operations and its gradients in f32, the largest of
//! several inputs, plus one rounding, as root mean square and for the worst number. What f64 may be wrong by is what f32 is,
//! scaled by the ratio of their roundings, and one error of the loop more for the reference's own.

use attn_kernels::cpu::Isa;
use attn_kernels::reference::{self, Array, SelectiveScan};
use attn_kernels::{
    ScanOptions, SelectiveScanOptions, complex_diagonal_scan_with_state, diagonal_scan, diagonal_scan_with_state,
    discounted_returns, generalized_advantages, selective_scan, selective_scan_with_state,
};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::random::Random;

/// Results and gradients, in order.
type Numbers = Vec<Vec<f64>>;

fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    x.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

fn variable(x: &Array, dims: &[usize], dtype: DType) -> Result<Var> {
    Var::from_tensor(&Tensor::from_slice(&x.data, dims, &Device::Cpu)?.to_dtype(dtype)?)
}

/// The same numbers, rounded to a dtype.
fn rounded(x: &Array, dtype: DType) -> Array {
    let round = |x: f64| if dtype == DType::F64 { x } else { f64::from(x as f32) };
    Array { data: x.data.iter().map(|&x| round(x)).collect(), shape: x.shape }
}

/// Room for candle's recursion over a long graph.
fn deep<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(1 << 30).spawn_scoped(scope, f).unwrap();
        thread.join().unwrap()
    })
}

/// Root mean square and largest of the differences.
fn error(x: &[f64], y: &[f64]) -> [f64; 2] {
    assert_eq!(x.len(), y.len());
    let squares: f64 = x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum();
    let largest = x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    [(squares / x.len().max(1) as f64).sqrt(), largest]
}

/// Inputs that the loop in f32 is run on: one may be luck where numbers are few.
const RUNS: usize = 12;

/// Errors of the loop by result, over the size of the result.
type Plain = Vec<[f64; 2]>;

/// Root mean square and largest of the numbers.
fn sizes(x: &[f64]) -> [f64; 2] {
    error(x, &vec![0.0; x.len()])
}

fn plain(runs: impl Iterator<Item = (Numbers, Numbers)>) -> Plain {
    let mut worst = Plain::new();
    for (got, expected) in runs {
        worst.resize(got.len(), [0.0; 2]);
        for (worst, (got, expected)) in worst.iter_mut().zip(got.iter().zip(&expected)) {
            let of = error(got, expected).into_iter().zip(sizes(expected));
            worst.iter_mut().zip(of).for_each(|(worst, (error, size))| *worst = worst.max(error / size.max(1e-30)));
        }
    }
    worst
}

fn judge(what: &str, got: &Numbers, expected: &Numbers, plain: &Plain, dtype: DType) {
    assert_eq!((got.len(), plain.len()), (expected.len(), expected.len()));
    let single = f64::from(f32::EPSILON);
    let (unit, factor) = if dtype == DType::F64 { (f64::EPSILON, 3.0) } else { (single, 2.0) };
    for (which, ((got, expected), plain)) in got.iter().zip(expected).zip(plain).enumerate() {
        for ((ours, plain), size) in error(got, expected).into_iter().zip(plain).zip(sizes(expected)) {
            // No plain run is taken to be better than one rounding.
            let bound = size * unit * (factor * (plain / single).max(1.0) + 1.0);
            assert!(ours <= bound, "{what}, result {which}: {ours:e}, bound {bound:e}");
        }
    }
}

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
                let mut all = vec![Vec::new(), Vec::new()];
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

#[derive(Debug, Clone, Copy)]
struct Selective {
    batch: usize,
    steps: usize,
    channels: usize,
    states: usize,
    has_skip: bool,
    has_state: bool,
    /// Size of Δ·A.
    decay: f64,
}

impl Selective {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for steps in [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200] {
            for (batch, channels, states) in [(1, 1, 1), (2, 5, 16), (1, 130, 3), (2, 64, 4)] {
                let index = all.len();
                let decay = [0.1, 1.0, 30.0, 1e4][index % 4];
                let (has_skip, has_state) = (index % 2 == 0, index % 3 != 0);
                all.push(Self { batch, steps, channels, states, has_skip, has_state, decay });
            }
        }
        all.extend([(1000, 2, 5), (3, 0, 2), (3, 2, 0)].map(|(steps, channels, states)| Self {
            batch: 1,
            steps,
            channels,
            states,
            has_skip: true,
            has_state: true,
            decay: 0.5,
        }));
        all
    }

    /// The operands, and the gradients of y and the last state.
    fn data(&self, dtype: DType, run: usize) -> (SelectiveScan, [Array; 2]) {
        let mut random = Random::new(&format!("{self:?} {run}"));
        let Self { batch, steps, channels, states, .. } = *self;
        let mut array = |shape: [usize; 4]| rounded(&random.array(shape, 1.0), dtype);
        let positive = |x: Array| Array { data: x.data.iter().map(|x| x.abs() + 0.01).collect(), ..x };
        let mut operands = SelectiveScan {
            u: array([1, batch, steps, channels]),
            delta: positive(array([1, batch, steps, channels])),
            a: positive(array([1, 1, channels, states])),
            b: array([1, batch, steps, states]),
            c: array([1, batch, steps, states]),
            skip: array([1, 1, 1, channels]),
            state: array([1, batch, channels, states]),
        };
        operands.a.data.iter_mut().for_each(|a| *a *= -self.decay);
        if !self.has_skip {
            operands.skip.data.fill(0.0);
        }
        if !self.has_state {
            operands.state.data.fill(0.0);
        }
        let d = [array([1, batch, steps, channels]), array([1, batch, channels, states])];
        let all = [&mut operands.delta, &mut operands.a];
        all.into_iter().for_each(|x| *x = rounded(x, dtype));
        (operands, d)
    }

    fn expected(&self, operands: &SelectiveScan, [d_y, d_last]: &[Array; 2]) -> Numbers {
        let [y, last] = reference::selective_scan(operands);
        let SelectiveScan { u, delta, a, b, c, skip, state } =
            reference::selective_scan_backward(operands, d_y, d_last);
        let mut all = vec![y, last, u, delta, a, b, c];
        all.extend(self.has_skip.then_some(skip));
        all.extend(self.has_state.then_some(state));
        all.into_iter().map(|x| x.data).collect()
    }

    fn run(
        &self,
        (operands, d): &(SelectiveScan, [Array; 2]),
        dtype: DType,
        run: impl FnOnce(&[Tensor; 7]) -> Result<[Tensor; 2]>,
    ) -> Result<Numbers> {
        let Self { batch, steps, channels, states, .. } = *self;
        let (rows, by_state) = ([batch, steps, channels], [batch, steps, states]);
        let state_dims = [batch, channels, states];
        let SelectiveScan { u, delta, a, b, c, skip, state } = operands;
        let vars = [
            variable(u, &rows, dtype)?,
            variable(delta, &rows, dtype)?,
            variable(a, &[channels, states], dtype)?,
            variable(b, &by_state, dtype)?,
            variable(c, &by_state, dtype)?,
            variable(skip, &[channels], dtype)?,
            variable(state, &state_dims, dtype)?,
        ];
        let [y, last] = run(&vars.each_ref().map(|var| var.as_tensor().clone()))?;
        let [d_y, d_last] = [variable(&d[0], &rows, dtype)?, variable(&d[1], &state_dims, dtype)?];
        let of = |x: &Tensor, d: &Var| (x * d.as_detached_tensor())?.sum_all();
        let gradients = (of(&y, &d_y)? + of(&last, &d_last)?)?.backward()?;
        let mut results = vec![numbers(&y)?, numbers(&last)?];
        let is_there = [true, true, true, true, true, self.has_skip, self.has_state];
        for (input, _) in vars.iter().zip(is_there).filter(|(_, is_there)| *is_there) {
            let gradient = gradients.get(input).map(numbers).transpose()?;
            results.push(gradient.unwrap_or_else(|| vec![0.0; input.elem_count()]));
        }
        Ok(results)
    }

    fn ours(&self, data: &(SelectiveScan, [Array; 2]), dtype: DType) -> Result<Numbers> {
        self.run(data, dtype, |[u, delta, a, b, c, skip, state]| {
            let options = SelectiveScanOptions { skip: self.has_skip.then(|| skip.clone()) };
            let state = self.has_state.then_some(state);
            let (y, last) = selective_scan_with_state(u, delta, a, b, c, &options, state)?;
            let alone = selective_scan(u, delta, a, b, c, &options)?;
            if state.is_none() {
                assert_eq!(numbers(&alone)?, numbers(&y)?);
            }
            Ok([y, last])
        })
    }

    fn plain(&self, data: &(SelectiveScan, [Array; 2])) -> Numbers {
        let run = || {
            self.run(data, DType::F32, |[u, delta, a, b, c, skip, state]| {
                let mut h = state.clone();
                let mut all = Vec::new();
                for t in 0..self.steps {
                    let [u, delta, b, c] = [u, delta, b, c].map(|x| x.narrow(1, t, 1).unwrap().squeeze(1).unwrap());
                    let kept = (delta.unsqueeze(2)?.broadcast_mul(&a.unsqueeze(0)?)?.exp()? * h)?;
                    h = (kept + (delta * &u)?.unsqueeze(2)?.broadcast_mul(&b.unsqueeze(1)?)?)?;
                    let read = h.broadcast_mul(&c.unsqueeze(1)?)?.sum(2)?;
                    all.push((read + u.broadcast_mul(&skip.unsqueeze(0)?)?)?);
                }
                let y = match &all[..] {
                    [] => u.clone(),
                    all => Tensor::stack(all, 1)?,
                };
                Ok([y, h])
            })
            .unwrap()
        };
        deep(run)
    }
}

#[test]
fn selective_scans_agree_with_the_reference() {
    let cases = Selective::all();
    assert!(cases.len() >= 40);
    for case in cases {
        let [data32, data64] = [DType::F32, DType::F64].map(|dtype| case.data(dtype, 0));
        let [expected32, expected64] = [&data32, &data64].map(|(operands, d)| case.expected(operands, d));
        let is_empty = case.channels * case.states == 0;
        let plain = plain((0..RUNS).map(|run| {
            let data = case.data(DType::F32, run);
            let expected = case.expected(&data.0, &data.1);
            (if is_empty { expected.clone() } else { case.plain(&data) }, expected)
        }));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let run = |data: &_, dtype| isa.force(|| case.ours(data, dtype)).unwrap().unwrap();
            let what = format!("{case:?} on {isa:?}");
            judge(&what, &run(&data32, DType::F32), &expected32, &plain, DType::F32);
            judge(&what, &run(&data64, DType::F64), &expected64, &plain, DType::F64);
        }
    }
}

#[test]
fn selective_gradients_of_the_reference_are_differences() {
    let case = Selective { batch: 2, steps: 5, channels: 3, states: 2, has_skip: true, has_state: true, decay: 0.7 };
    let (operands, d) = case.data(DType::F64, 0);
    let loss = |operands: &SelectiveScan| -> f64 {
        let results = reference::selective_scan(operands);
        results.iter().zip(&d).map(|(x, d)| x.data.iter().zip(&d.data).map(|(x, d)| x * d).sum::<f64>()).sum()
    };
    let gradients = reference::selective_scan_backward(&operands, &d[0], &d[1]);
    type Field = fn(&mut SelectiveScan) -> &mut Array;
    let fields: [Field; 7] =
        [|x| &mut x.u, |x| &mut x.delta, |x| &mut x.a, |x| &mut x.b, |x| &mut x.c, |x| &mut x.skip, |x| &mut x.state];
    for (which, field) in fields.into_iter().enumerate() {
        let gradient = field(&mut gradients.clone()).clone();
        for at in 0..gradient.data.len() {
            let moved = |by: f64| {
                let mut operands = operands.clone();
                field(&mut operands).data[at] += by;
                loss(&operands)
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((gradient.data[at] - difference).abs() < 1e-8, "operand {which}, {at}");
        }
    }
}

#[test]
fn sequences_can_be_cut_anywhere() -> Result<()> {
    let dev = &Device::Cpu;
    let [u, b] = [(2, 70, 67), (2, 70, 4)].map(|dims| Tensor::randn(0f32, 1.0, dims, dev).unwrap());
    let delta = Tensor::rand(0f32, 1.0, (2, 70, 67), dev)?;
    let a = Tensor::rand(-2f32, 0.0, (67, 4), dev)?;
    let options = SelectiveScanOptions::default();
    let whole = selective_scan(&u, &delta, &a, &b, &b, &options)?;
    let scanned = diagonal_scan(&delta, &u, &ScanOptions::default())?;
    for cut in [0, 1, 31, 32, 33, 69, 70] {
        let part = |x: &Tensor, from: usize, len: usize| x.narrow(1, from, len);
        let (mut state, mut pieces) = (None, Vec::new());
        let (mut h, mut rows) = (None, Vec::new());
        for (from, len) in [(0, cut), (cut, 70 - cut)] {
            let [u, delta, b] = [&u, &delta, &b].map(|x| part(x, from, len).unwrap());
            let (y, last) = selective_scan_with_state(&u, &delta, &a, &b, &b, &options, state.as_ref())?;
            pieces.push(y);
            state = Some(last);
            let (row, last) = diagonal_scan_with_state(&delta, &u, &ScanOptions::default(), h.as_ref())?;
            rows.push(row);
            h = Some(last);
        }
        assert_eq!(numbers(&Tensor::cat(&pieces, 1)?)?, numbers(&whole)?, "cut at {cut}");
        assert_eq!(numbers(&Tensor::cat(&rows, 1)?)?, numbers(&scanned)?, "cut at {cut}");
    }
    Ok(())
}

#[test]
fn halves_are_those_of_f32_rounded() -> Result<()> {
    let dev = &Device::Cpu;
    for dtype in [DType::F16, DType::BF16] {
        let half = |x: Tensor| x.to_dtype(dtype);
        let u = half(Tensor::randn(0f32, 1.0, (2, 40, 9), dev)?)?;
        let delta = half(Tensor::rand(0f32, 1.0, (2, 40, 9), dev)?)?;
        let b = half(Tensor::randn(0f32, 1.0, (2, 40, 3), dev)?)?;
        let a = Tensor::rand(-2f32, 0.0, (9, 3), dev)?;
        let options = SelectiveScanOptions { skip: Some(Tensor::ones(9, DType::F32, dev)?) };
        let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        let y = selective_scan(&u, &delta, &a, &b, &b, &options)?;
        let of_f32 = selective_scan(&wide(&u), &wide(&delta), &a, &wide(&b), &wide(&b), &options)?;
        assert_eq!((y.dtype(), numbers(&y)?), (dtype, numbers(&of_f32.to_dtype(dtype)?)?));
        let h = diagonal_scan(&delta, &u, &ScanOptions::default())?;
        let of_f32 = diagonal_scan(&wide(&delta), &wide(&u), &ScanOptions::default())?;
        assert_eq!((h.dtype(), numbers(&h)?), (dtype, numbers(&of_f32.to_dtype(dtype)?)?));
    }
    Ok(())
}

#[test]
fn bad_scans_are_refused() -> Result<()> {
    let dev = &Device::Cpu;
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, dev).unwrap();
    let message = |result: Result<Tensor>| result.map(|_| ()).unwrap_err().to_string();
    let (b, options) = (zeros(&[2, 5, 3]), ScanOptions::default());
    let scan = |a: &Tensor, b: &Tensor| message(diagonal_scan(a, b, &options));
    assert!(scan(&zeros(&[4]), &b).contains("diagonal_scan: argument `a` has shape [4]"), "{}", scan(&zeros(&[4]), &b));
    assert!(scan(&b, &zeros(&[3])).contains("argument `b` has shape [3], needs [batch, steps, …]"));
    assert!(scan(&b.to_dtype(DType::F64)?, &b).contains("argument `a` has dtype"));
    assert!(scan(&b, &b.to_dtype(DType::U32)?).contains("argument `b` has dtype"));
    let state = zeros(&[2, 4]);
    let with_state = diagonal_scan_with_state(&b, &b, &options, Some(&state)).map(|(h, _)| h);
    assert!(message(with_state).contains("argument `state` has shape [2, 4]"));

    let (u, a, by_state) = (b, zeros(&[3, 4]), zeros(&[2, 5, 4]));
    let none = SelectiveScanOptions::default();
    let select = |u: &Tensor, delta: &Tensor, a: &Tensor, b: &Tensor, options: &SelectiveScanOptions<Tensor>| {
        message(selective_scan(u, delta, a, b, &by_state, options))
    };
    assert!(
        select(&zeros(&[5, 3]), &u, &a, &by_state, &none).contains("selective_scan: argument `u` has shape [5, 3]")
    );
    assert!(select(&u, &zeros(&[2, 5, 4]), &a, &by_state, &none).contains("argument `delta` has shape [2, 5, 4]"));
    assert!(select(&u, &u, &zeros(&[3]), &by_state, &none).contains("argument `a` has shape [3]"));
    assert!(select(&u, &u, &zeros(&[2, 4]), &by_state, &none).contains("argument `a` has shape [2, 4]"));
    assert!(select(&u, &u, &a, &zeros(&[2, 5, 3]), &none).contains("argument `b` has shape [2, 5, 3]"));
    assert!(select(&u, &u, &a.to_dtype(DType::F16)?, &by_state, &none).contains("argument `a` has dtype"));
    let skip = SelectiveScanOptions { skip: Some(zeros(&[4])) };
    assert!(select(&u, &u, &a, &by_state, &skip).contains("argument `skip` has shape [4]"));
    Ok(())
}

/// An agent in a corridor of five places learns to walk right, where the reward is, from its advantages.
#[test]
fn a_policy_learns_from_its_advantages() -> Result<()> {
    const PLACES: usize = 5;
    const STEPS: usize = 20;
    let dev = &Device::Cpu;
    let mut random = Random::new("corridor");
    let logits = Var::zeros((PLACES, 2), DType::F32, dev)?;
    let values = Var::zeros(PLACES + 1, DType::F32, dev)?;
    let mut mean_return = Vec::new();
    for _ in 0..150 {
        let chances = candle_nn::ops::softmax(&logits, 1)?.to_vec2::<f32>()?;
        let (mut places, mut actions, mut rewards, mut ends) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut place = 0;
        for _ in 0..STEPS {
            let right = random.uniform() < f64::from(chances[place][1]);
            places.push(place as u32);
            actions.push(u32::from(right));
            place = if right { place + 1 } else { place.saturating_sub(1) };
            let is_end = place == PLACES;
            rewards.push(if is_end { 1f32 } else { -0.05 });
            ends.push(u8::from(is_end));
            place = if is_end { 0 } else { place };
        }
        let row = |x: Tensor| x.unsqueeze(0);
        let (rewards, ends) = (row(Tensor::new(rewards, dev)?)?, row(Tensor::new(ends, dev)?)?);
        let seen = values.index_select(&Tensor::new([&places[..], &[place as u32]].concat(), dev)?, 0)?.unsqueeze(0)?;
        let advantages = generalized_advantages(&rewards, &seen.detach(), 0.95, 0.9, &ends)?.squeeze(0)?;
        let returns = discounted_returns(&rewards, 0.95, &ends)?;
        mean_return.push(returns.mean_all()?.to_scalar::<f32>()?);
        let chosen = candle_nn::ops::log_softmax(&logits, 1)?
            .index_select(&Tensor::new(places, dev)?, 0)?
            .gather(&Tensor::new(actions, dev)?.unsqueeze(1)?, 1)?
            .squeeze(1)?;
        let off = (seen.narrow(1, 0, STEPS)? - returns)?.sqr()?.mean_all()?;
        let loss = (off - (chosen * advantages)?.mean_all()?)?;
        let gradients = loss.backward()?;
        for var in [&logits, &values] {
            let gradient = gradients.get(var).expect("a gradient").clone();
            var.set(&(var.as_tensor() - (gradient * 1.0)?)?)?;
        }
    }
    let mean = |range: &[f32]| range.iter().sum::<f32>() / range.len() as f32;
    let (first, last) = (mean(&mean_return[..10]), mean(&mean_return[140..]));
    assert!(last > first + 0.3 && last > 0.5, "{first} to {last}");
    Ok(())
}
