use candle_core::{Result, Tensor};

use super::Operands;
use crate::Error;
use crate::candle::engine::{Computation, compute};
use crate::cpu::elementwise::Element;
use crate::cpu::scan::{self, SelectiveGradients, SelectiveOperands, SelectiveScan};
use crate::scan::SelectiveScanOptions;

/// The selective scan (Mamba, Gu and Dao 2023), for every channel c with S states of its own:
///
/// ```text
/// h_t = exp(Δ_tc A_c) ⊙ h_{t−1} + Δ_tc u_tc B_t,   y_tc = ⟨C_t, h_t⟩ + D_c u_tc
/// ```
///
/// u and Δ `[B, N, C]`, B and C `[B, N, S]` in one dtype, A `[C, S]` and D in the dtype of sums → y `[B, N, C]` in the dtype of
/// u. Δ is that behind softplus and bias; A is negative in a model that forgets. Time O(N·C·S); states exist for a few steps
/// at a time only: memory beside inputs and results is a 32nd of N·C·S for gradients, and C·S without. Gradients: u, Δ, A,
/// B, C and D. On the CPU; elsewhere it is an error.
///
/// # Errors
/// Shapes or dtypes that do not fit together, tensors that are not on the CPU.
///
/// # Example
/// ```
/// use attn_kernels::{SelectiveScanOptions, selective_scan};
/// use candle_core::{Device, Tensor};
///
/// let (channels, states, dev) = (6, 4, &Device::Cpu);
/// let u = Tensor::randn(0f32, 1.0, (2, 10, channels), dev)?;
/// let delta = Tensor::full(0.1f32, (2, 10, channels), dev)?;
/// let a = Tensor::full(-1f32, (channels, states), dev)?;
/// let b = Tensor::randn(0f32, 1.0, (2, 10, states), dev)?;
/// let options = SelectiveScanOptions { skip: Some(Tensor::ones(channels, u.dtype(), dev)?) };
/// assert_eq!(selective_scan(&u, &delta, &a, &b, &b, &options)?.dims(), [2, 10, channels]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn selective_scan(
    u: &Tensor,
    delta: &Tensor,
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
    options: &SelectiveScanOptions<Tensor>,
) -> Result<Tensor> {
    let computation = Selective::new("selective_scan", [u, delta, a, b, c], options, None)?;
    let len = computation.y_len();
    let both = compute(computation, &[len])?;
    both.reshape(u.dims())?.to_dtype(u.dtype())
}

/// [`selective_scan`] from a state `[B, C, S]` in the dtype of sums (0 for `None`), with the state that follows. Cutting a
/// sequence anywhere and handing the state on gives the results of the whole, to the bit, and its gradients: states have
/// them, both ways.
///
/// # Errors
/// As [`selective_scan`]; a state of another shape or dtype.
pub fn selective_scan_with_state(
    u: &Tensor,
    delta: &Tensor,
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
    options: &SelectiveScanOptions<Tensor>,
    state: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let mut computation = Selective::new("selective_scan_with_state", [u, delta, a, b, c], options, state)?;
    computation.returns_state = true;
    let SelectiveScan { batch, channels, states, .. } = computation.scan;
    let (len, last) = (computation.y_len(), batch * channels * states);
    let both = compute(computation, &[len + last])?;
    let y = both.narrow(0, 0, len)?.reshape(u.dims())?.to_dtype(u.dtype())?;
    Ok((y, both.narrow(0, len, last)?.reshape((batch, channels, states))?))
}

/// Of operands u, Δ, A, B, C, then D and the state where there are any. The result is y, and behind it the last state if it
/// is wanted.
struct Selective {
    function: &'static str,
    scan: SelectiveScan,
    operands: Vec<Tensor>,
    has_skip: bool,
    has_state: bool,
    returns_state: bool,
}

impl Selective {
    fn new(
        function: &'static str,
        [u, delta, a, b, c]: [&Tensor; 5],
        options: &SelectiveScanOptions<Tensor>,
        state: Option<&Tensor>,
    ) -> Result<Self> {
        let operands = Operands::new(function, "u", u)?;
        let (&[batch, steps, channels], &[_, states]) = (u.dims(), a.dims()) else {
            let (argument, x, needs) =
                if u.rank() == 3 { ("a", a, "[channels, states]") } else { ("u", u, "[batch, steps, channels]") };
            let got = format!("shape {:?}", x.dims());
            return Err(Error::Shape { function, argument, got, needs: needs.into() }.into());
        };
        let rows = [batch, steps, channels];
        let by_state = ([batch, steps, states], "[batch, steps, states]");
        let mut all = vec![
            operands.like(u, "u", u, &rows, "[batch, steps, channels]")?,
            operands.like(u, "delta", delta, &rows, "[batch, steps, channels]")?,
            operands.of_sums("a", a, &[channels, states], "[channels, states]")?,
            operands.like(u, "b", b, &by_state.0, by_state.1)?,
            operands.like(u, "c", c, &by_state.0, by_state.1)?,
        ];
        if let Some(skip) = &options.skip {
            all.push(operands.of_sums("skip", skip, &[channels], "[channels]")?);
        }
        if let Some(state) = state {
            all.push(operands.of_sums("state", state, &[batch, channels, states], "[batch, channels, states]")?);
        }
        Ok(Self {
            function,
            scan: SelectiveScan { batch, steps, channels, states },
            operands: all,
            has_skip: options.skip.is_some(),
            has_state: state.is_some(),
            returns_state: false,
        })
    }

    fn y_len(&self) -> usize {
        self.scan.batch * self.scan.steps * self.scan.channels
    }

    fn of<'a, T>(&self, operands: &[&'a [T]]) -> SelectiveOperands<'a, T> {
        let mut rest = operands[5..].iter().copied();
        SelectiveOperands {
            u: operands[0],
            delta: operands[1],
            a: operands[2],
            b: operands[3],
            c: operands[4],
            skip: if self.has_skip { rest.next() } else { None },
            state: if self.has_state { rest.next() } else { None },
        }
    }
}

impl Computation for Selective {
    fn name(&self) -> &'static str {
        self.function
    }

    fn operands(&self) -> Vec<&Tensor> {
        self.operands.iter().collect()
    }

    fn forward<T: Element>(&self, operands: &[&[T]], result: &mut [T]) {
        let SelectiveScan { batch, channels, states, .. } = self.scan;
        let (y, last) = result.split_at_mut(self.y_len());
        let mut unwanted = vec![T::ZERO; if self.returns_state { 0 } else { batch * channels * states }];
        let last = if self.returns_state { last } else { &mut unwanted };
        scan::selective_scan(self.scan, self.of(operands), [y, last]);
    }

    fn backward<T: Element>(&self, operands: &[&[T]], _: &[T], d_result: &[T], gradients: Vec<&mut [T]>) {
        let SelectiveScan { batch, channels, states, .. } = self.scan;
        let (d_y, d_last) = d_result.split_at(self.y_len());
        let mut nobody = [
            vec![T::ZERO; if self.has_skip { 0 } else { channels }],
            vec![T::ZERO; if self.has_state { 0 } else { batch * channels * states }],
        ];
        let [skip, state] = &mut nobody;
        let mut gradients = gradients.into_iter();
        let mut next = || gradients.next().unwrap_or_default();
        let rooms = SelectiveGradients {
            u: next(),
            delta: next(),
            a: next(),
            b: next(),
            c: next(),
            skip: if self.has_skip { next() } else { skip },
            state: if self.has_state { next() } else { state },
        };
        let d_last = Some(d_last).filter(|_| self.returns_state);
        scan::selective_scan_backward(self.scan, self.of(operands), d_y, d_last, rooms);
    }
}
