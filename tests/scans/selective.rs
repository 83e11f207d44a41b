//! The selective scan of Mamba.

use attn_kernels::cpu::Isa;
use attn_kernels::reference::{self, Array, SelectiveScan};
use attn_kernels::{SelectiveScanOptions, selective_scan, selective_scan_with_state};
use candle_core::{DType, Result, Tensor, Var};

use super::{Numbers, RUNS, deep, judge, numbers, plain, rounded, variable};
use crate::common::random::Random;

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
