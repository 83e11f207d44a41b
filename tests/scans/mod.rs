//! Diagonal and selective scans: reference against central differences, every instruction set against the reference.
//!
//! An error may be twice that of the same loop over steps in candle's operations and its gradients in f32, the largest of
//! several inputs, plus one rounding, as root mean square and for the worst number. What f64 may be wrong by is what f32 is,
//! scaled by the ratio of their roundings, and one error of the loop more for the reference's own.

mod diagonal;
mod returns;
mod selective;

use attn_kernels::reference::Array;
use attn_kernels::{
    ScanOptions, SelectiveScanOptions, diagonal_scan, diagonal_scan_with_state, selective_scan,
    selective_scan_with_state,
};
use candle_core::{DType, Device, Result, Tensor, Var};

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
