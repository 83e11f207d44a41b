use candle_core::{Result, Tensor};

use super::Operands;
use crate::Error;
use crate::candle::engine::{Computation, compute};
use crate::cpu::elementwise::Element;
use crate::cpu::scan::{self, DiagonalScan};
use crate::scan::ScanOptions;

/// The scan of diagonal recurrences (LRU, Orvieto et al. 2023; minGRU; discounted sums):
///
/// ```text
/// h_t = a_t ⊙ h_{t−1} + b_t,   h_0 = 0
/// ```
///
/// b `[B, N, …]` with any number of further dimensions, a of the same sizes or broadcast to them → h `[B, N, …]`, in their
/// dtype; sums in f32 (f64 for f64), one rounding at the end. a may have any sign; a_t = 0, or e^g with a log-decay
/// g = −∞, cuts off what was before. Time and memory O(N): threads share channels, steps are taken one by one.
/// Gradients: a and b. On the CPU; elsewhere it is an error.
///
/// # Errors
/// Shapes or dtypes that do not fit together, tensors that are not on the CPU.
///
/// # Example
/// ```
/// use attn_kernels::{ScanOptions, diagonal_scan};
/// use candle_core::{Device, Tensor};
///
/// let a = Tensor::new(&[[[0.5f32]]], &Device::Cpu)?;
/// let b = Tensor::new(&[[[1f32], [1.0], [1.0]]], &Device::Cpu)?;
/// let h = diagonal_scan(&a, &b, &ScanOptions::default())?;
/// assert_eq!(h.flatten_all()?.to_vec1::<f32>()?, [1.0, 1.5, 1.75]);
/// let h = diagonal_scan(&a, &b, &ScanOptions { reversed: true })?;
/// assert_eq!(h.flatten_all()?.to_vec1::<f32>()?, [1.75, 1.5, 1.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn diagonal_scan(a: &Tensor, b: &Tensor, options: &ScanOptions) -> Result<Tensor> {
    let (h, _) = call("diagonal_scan", [("a", a)], [("b", b)], options, None)?;
    let [h] = h;
    h.to_dtype(b.dtype())
}

/// [`diagonal_scan`] from a state, `[B, …]` in the dtype of sums (0 for `None`), with the state that follows. Cutting a
/// sequence anywhere and handing the state on gives the results of the whole, to the bit, and its gradients.
///
/// # Errors
/// As [`diagonal_scan`]; a state of another shape or dtype.
pub fn diagonal_scan_with_state(
    a: &Tensor,
    b: &Tensor,
    options: &ScanOptions,
    state: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (h, last) = call("diagonal_scan_with_state", [("a", a)], [("b", b)], options, state.map(|state| [state]))?;
    let ([h], [last]) = (h, last);
    Ok((h.to_dtype(b.dtype())?, last))
}

/// [`diagonal_scan`] of complex numbers (S4D, Gu et al. 2022; S5, Smith et al. 2022), given and returned as real and imaginary
/// parts: both parts of an operand have one shape and dtype. Gradients are those of the parts.
///
/// # Errors
/// As [`diagonal_scan`].
///
/// # Example
/// ```
/// use attn_kernels::{ScanOptions, complex_diagonal_scan};
/// use candle_core::{Device, Tensor};
///
/// // Turned by a quarter at each step.
/// let number = |x: f32| Tensor::new(&[[[x]]], &Device::Cpu);
/// let b = Tensor::new(&[[[1f32], [0.0], [0.0]]], &Device::Cpu)?;
/// let zeros = b.zeros_like()?;
/// let [re, im] =
///     complex_diagonal_scan([&number(0.0)?, &number(1.0)?], [&b, &zeros], &ScanOptions::default())?;
/// assert_eq!(re.flatten_all()?.to_vec1::<f32>()?, [1.0, 0.0, -1.0]);
/// assert_eq!(im.flatten_all()?.to_vec1::<f32>()?, [0.0, 1.0, 0.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn complex_diagonal_scan(a: [&Tensor; 2], b: [&Tensor; 2], options: &ScanOptions) -> Result<[Tensor; 2]> {
    let (h, _) = call("complex_diagonal_scan", parts(["a.re", "a.im"], a), parts(["b.re", "b.im"], b), options, None)?;
    rounded(h, b[0])
}

/// [`complex_diagonal_scan`] from a state, as [`diagonal_scan_with_state`].
///
/// # Errors
/// As [`diagonal_scan_with_state`].
pub fn complex_diagonal_scan_with_state(
    a: [&Tensor; 2],
    b: [&Tensor; 2],
    options: &ScanOptions,
    state: Option<[&Tensor; 2]>,
) -> Result<([Tensor; 2], [Tensor; 2])> {
    let function = "complex_diagonal_scan_with_state";
    let (h, last) = call(function, parts(["a.re", "a.im"], a), parts(["b.re", "b.im"], b), options, state)?;
    Ok((rounded(h, b[0])?, last))
}

type Part<'a> = (&'static str, &'a Tensor);

fn parts<'a>(names: [&'static str; 2], tensors: [&'a Tensor; 2]) -> [Part<'a>; 2] {
    [(names[0], tensors[0]), (names[1], tensors[1])]
}

fn rounded([re, im]: [Tensor; 2], like: &Tensor) -> Result<[Tensor; 2]> {
    Ok([re.to_dtype(like.dtype())?, im.to_dtype(like.dtype())?])
}

/// h in the dtype of sums, and its last step.
fn call<const P: usize>(
    function: &'static str,
    a: [Part<'_>; P],
    b: [Part<'_>; P],
    options: &ScanOptions,
    state: Option<[&Tensor; P]>,
) -> Result<([Tensor; P], [Tensor; P])> {
    let (argument, main) = b[0];
    let operands = Operands::new(function, argument, main)?;
    let &[batch, steps, ref rest @ ..] = main.dims() else {
        let (got, needs) = (format!("shape {:?}", main.dims()), "[batch, steps, …]".into());
        return Err(Error::Shape { function, argument, got, needs }.into());
    };
    let dims = main.dims();
    // Channels side by side: an engine has fewer dimensions.
    let channels: usize = rest.iter().product();
    let flat = |x: Tensor| x.reshape((batch, steps, channels));
    let mut all = Vec::with_capacity(3 * P);
    for (argument, a) in a {
        let wide = a.broadcast_as(dims).map_err(|_| {
            let (got, needs) = (format!("shape {:?}", a.dims()), format!("one that broadcasts to that of b, {dims:?}"));
            Error::Shape { function, argument, got, needs }
        })?;
        all.push(flat(operands.like(main, argument, &wide, dims, "that of b")?)?);
    }
    for (argument, b) in b {
        all.push(flat(operands.like(main, argument, b, dims, "[batch, steps, …]")?)?);
    }
    let state_dims = [&[batch], rest].concat();
    for state in state.into_iter().flatten() {
        all.push(operands.of_sums("state", state, &state_dims, "[batch, …]")?);
    }
    let scan = DiagonalScan { batch, steps, channels, reversed: options.reversed };
    let h = compute(Scan::<P> { function, scan, operands: all.clone() }, &[P, batch, steps, channels])?;
    let h: [Tensor; P] = collect((0..P).map(|part| h.get(part)?.reshape(dims)))?;
    let last = match steps {
        0 if state.is_some() => collect(all[2 * P..].iter().cloned().map(Ok))?,
        0 => collect((0..P).map(|_| Tensor::zeros(&state_dims[..], operands.dtype, main.device())))?,
        steps => collect(h.iter().map(|h| h.narrow(1, if options.reversed { 0 } else { steps - 1 }, 1)?.squeeze(1)))?,
    };
    Ok((h, last))
}

fn collect<const P: usize>(parts: impl Iterator<Item = Result<Tensor>>) -> Result<[Tensor; P]> {
    let parts: Vec<Tensor> = parts.collect::<Result<_>>()?;
    parts.try_into().map_err(|_| candle_core::Error::msg("another number of parts"))
}

/// Of operands a, b and the state if there is one, each in P parts.
struct Scan<const P: usize> {
    function: &'static str,
    scan: DiagonalScan,
    operands: Vec<Tensor>,
}

/// The next P parts of equal length.
fn pieces<T, const P: usize>(all: &[T]) -> [&[T]; P] {
    let len = all.len() / P;
    std::array::from_fn(|part| &all[part * len..(part + 1) * len])
}

fn rooms<T, const P: usize>(all: &mut [T]) -> [&mut [T]; P] {
    let (len, mut left) = (all.len() / P, all);
    std::array::from_fn(|_| {
        let (first, rest) = std::mem::take(&mut left).split_at_mut(len);
        left = rest;
        first
    })
}

impl<const P: usize> Computation for Scan<P> {
    fn name(&self) -> &'static str {
        self.function
    }

    fn operands(&self) -> Vec<&Tensor> {
        self.operands.iter().collect()
    }

    fn forward<T: Element>(&self, operands: &[&[T]], result: &mut [T]) {
        let (a, rest) = operands.split_first_chunk::<P>().expect("a has its parts");
        let (b, state) = rest.split_first_chunk::<P>().expect("b has its parts");
        scan::diagonal_scan(self.scan, *a, *b, state.first_chunk::<P>().copied(), rooms(result));
    }

    fn backward<T: Element>(&self, operands: &[&[T]], result: &[T], d_result: &[T], gradients: Vec<&mut [T]>) {
        let (a, rest) = operands.split_first_chunk::<P>().expect("a has its parts");
        let state = rest[P..].first_chunk::<P>().copied();
        let mut gradients = gradients.into_iter();
        let mut next = || -> [&mut [T]; P] { std::array::from_fn(|_| gradients.next().expect("one for each operand")) };
        let (mut d_a, mut d_b) = (next(), next());
        let rooms = [&mut d_a, &mut d_b].map(|parts| parts.each_mut().map(|part| &mut **part));
        scan::diagonal_scan_backward(self.scan, *a, state, pieces(result), pieces(d_result), rooms);
        if state.is_some() {
            scan::first_gradient(self.scan, *a, d_b.map(|part| &*part), next());
        }
    }
}
