//! Norms of rows from the smallest to the largest numbers of a dtype.

use attn_kernels::nn::{Norm, NormConfig, NormKind, seeded_weights};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::VarMap;

use super::random;

/// Row x and its norm and gradient in f64, at a size where nothing is lost: norm(s·x; ε) = norm(x; ε/s²).
struct Expected {
    y: Vec<f64>,
    d_x: Vec<f64>,
}

/// dy_i = 1, 2, 3, …; x is divided by `scale` beforehand.
fn expected(kind: NormKind, x: &[f64], scale: f64, epsilon: f64) -> Expected {
    let n = x.len() as f64;
    let is_centred = kind == NormKind::Layer;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / n;
    let shift = if is_centred { mean(x) } else { 0.0 };
    let centred: Vec<f64> = x.iter().map(|x| x - shift).collect();
    let root = (centred.iter().map(|x| x * x).sum::<f64>() / n).sqrt().hypot(epsilon.sqrt() / scale);
    let y: Vec<f64> = centred.iter().map(|x| x / root).collect();
    let d_y: Vec<f64> = (1..=x.len()).map(|i| i as f64).collect();
    let along = mean(&y.iter().zip(&d_y).map(|(y, d)| y * d).collect::<Vec<_>>());
    let across = if is_centred { mean(&d_y) } else { 0.0 };
    let d_x = y.iter().zip(&d_y).map(|(y, d)| (d - across - y * along) / (root * scale)).collect();
    Expected { y, d_x }
}

/// Rows of one batch: patterns times sizes; a small row beside a large one keeps its digits.
fn check(kind: NormKind, epsilon: f64, dtype: DType, sizes: &[f64], tolerance: f64) -> Result<()> {
    let patterns: [&[f64]; 5] = [
        &[1.0, -1.0, 1.0, 1.0],
        &[0.5, -0.25, 0.0, 0.125],
        &[1.0, 1.0, 1.0, 1.0],
        &[0.0, 0.0, -1.0, 0.0],
        &[0.0, 0.0, 0.0, 0.0],
    ];
    let cases: Vec<_> = sizes.iter().flat_map(|size| patterns.iter().map(move |pattern| (*size, *pattern))).collect();
    let rows: Vec<f64> = cases.iter().flat_map(|(size, pattern)| pattern.iter().map(move |x| x * size)).collect();
    let x = Var::from_tensor(&Tensor::from_vec(rows, (cases.len(), 4), &Device::Cpu)?.to_dtype(dtype)?)?;
    let weights = seeded_weights(&VarMap::new(), 0, dtype, &Device::Cpu);
    let norm = Norm::new(4, &NormConfig { kind, epsilon, ..Default::default() }, weights)?;
    let y = norm.forward(&x)?;
    let d_y = Tensor::new(&[1f64, 2.0, 3.0, 4.0], &Device::Cpu)?.to_dtype(dtype)?;
    let gradients = y.broadcast_mul(&d_y)?.sum_all()?.backward()?;
    let read = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.to_vec2::<f64>();
    let (y, d_x) = (read(&y)?, read(gradients.get(&x).unwrap())?);
    // What the dtype can hold, and what f32 holds of 1/r on the way.
    let smallest = match dtype {
        DType::F64 => 1e-300,
        DType::F16 => 6e-8,
        _ => 1e-38,
    };
    for (index, (size, pattern)) in cases.into_iter().enumerate() {
        // No dtype has a number for ε beside a row of one large number repeated.
        let lowest = if dtype == DType::F64 { 1e-300 } else { 1e-37 };
        if pattern[0] == pattern[1] && pattern[0] != 0.0 && epsilon.sqrt() / size < lowest {
            continue;
        }
        let size = if pattern.iter().all(|x| *x == 0.0) { 1.0 } else { size };
        let expected = expected(kind, pattern, size, epsilon);
        for (ours, theirs, what) in [(&y[index], &expected.y, "y"), (&d_x[index], &expected.d_x, "dx")] {
            let largest = theirs.iter().fold(0f64, |largest, x| largest.max(x.abs()));
            let worst = ours.iter().zip(theirs).fold(0f64, |worst, (a, b)| match (a - b).abs() {
                error if error.is_nan() => f64::INFINITY,
                error => worst.max(error),
            });
            let allowed = tolerance * largest + smallest;
            assert!(
                worst <= allowed || (largest > 65504.0 && dtype == DType::F16),
                "{kind:?} ε {epsilon:e} {dtype:?} {what} of {pattern:?} · {size:e}: {ours:?} is not {theirs:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn rows_of_any_size() -> Result<()> {
    for kind in [NormKind::Rms, NormKind::Layer] {
        for epsilon in [1e-6, 1e-12, 1e-40] {
            let powers = |powers: &[i32]| powers.iter().map(|power| 2f64.powi(*power)).collect::<Vec<f64>>();
            let wide = powers(&[0, 10, 40, 67, 100, 126, -10, -40, -67]);
            check(kind, epsilon, DType::F32, &wide, 2e-6)?;
            check(kind, epsilon, DType::BF16, &wide, 0.02)?;
            check(kind, epsilon, DType::F16, &powers(&[0, 5, 10, 15, -10]), 3e-3)?;
            check(kind, epsilon, DType::F64, &powers(&[0, 100, 500, 600, 1000, -100, -400]), 1e-14)?;
            // No row that is large.
            check(kind, epsilon, DType::F32, &powers(&[0, -20, -60]), 2e-6)?;
        }
    }
    Ok(())
}

/// A row does not depend on its neighbours.
#[test]
fn a_large_row_changes_no_other() -> Result<()> {
    let norm = |rows: &[[f32; 4]]| -> Result<Vec<f32>> {
        let weights = seeded_weights(&VarMap::new(), 0, DType::F32, &Device::Cpu);
        let norm = Norm::new(4, &NormConfig::default(), weights)?;
        norm.forward(&Tensor::from_slice(rows.as_flattened(), (rows.len(), 4), &Device::Cpu)?)?.get(0)?.to_vec1()
    };
    let row = [0.3f32, -0.7, 1e-4, 2.0];
    let (alone, beside) = (norm(&[row])?, norm(&[row, [1e30, 0.0, 1.0, -3e38]])?);
    assert!(alone.iter().zip(&beside).all(|(a, b)| (a - b).abs() <= 2e-7 * a.abs()), "{alone:?} and {beside:?}");
    Ok(())
}

/// Weights less 1 begin where the others do; their sum with 1 is not rounded to the dtype of the weights.
#[test]
fn weights_less_one() -> Result<()> {
    const WIDE: usize = 64;
    let bf16 = |variables: &VarMap| seeded_weights(variables, 0, DType::BF16, &Device::Cpu);
    let read = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.to_vec1::<f64>();
    let x = Tensor::new(&[0.3f32, -0.7, 1e-4, 2.0], &Device::Cpu)?.unsqueeze(0)?;
    let [plain, less_one] = [false, true].map(|unit_offset| -> Result<_> {
        let weights = seeded_weights(&VarMap::new(), 0, DType::F32, &Device::Cpu);
        Norm::new(4, &NormConfig { unit_offset, ..Default::default() }, weights)?.forward(&x)?.to_vec2::<f32>()
    });
    assert_eq!(plain?, less_one?);
    // 1 + w is between the numbers of bf16, which are 2⁻⁷ and 2⁻⁸ apart around 1.
    let variables = VarMap::new();
    let norm = Norm::new(WIDE, &NormConfig { unit_offset: true, ..Default::default() }, bf16(&variables))?;
    let weight = variables.data().lock().unwrap()["weight"].clone();
    assert_eq!(read(&weight)?, [0.0; WIDE]);
    weight.set(&(random("weight", &[WIDE])? * 0.003)?.to_dtype(DType::BF16)?)?;
    let x = random("x", &[WIDE])?.to_dtype(DType::BF16)?;
    let (row, ours) = (read(&x)?, read(&norm.forward(&x.unsqueeze(0)?)?.squeeze(0)?)?);
    let root = (row.iter().map(|x| x * x).sum::<f64>() / WIDE as f64 + 1e-6).sqrt();
    let exact: Vec<f64> = row.iter().zip(read(&weight)?).map(|(x, w)| x / root * (1.0 + w)).collect();
    // One rounding to bf16, and those of f32 on the way: the root, the quotient, the sum and the product.
    let within = |y: f64, exact: f64| (y - exact).abs() <= exact.abs() * (2f64.powi(-8) + 8.0 * 2f64.powi(-24));
    let beyond = ours.iter().zip(&exact).find(|(y, exact)| !within(**y, **exact));
    assert!(beyond.is_none(), "{beyond:?}");
    // A weight in bf16 would show.
    let rounded = (weight.as_tensor() + 1.0)?;
    let twice = row.iter().zip(read(&rounded)?).map(|(x, w)| half::bf16::from_f64(x / root * w).to_f64());
    assert!(twice.zip(&exact).any(|(y, exact)| !within(y, *exact)));
    Ok(())
}
