use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor};

use crate::candle::engine::accumulator;
use crate::candle::own_gradient::with_gradient;
use crate::candle::storage::{by_dtype, elements};
use crate::cpu::elementwise;

/// The loss of a language model, a number:
///
/// ```text
/// mean over rows with a target t of  ln Σ_c exp(x_c) − x_t
/// ```
///
/// logits `[…, classes]` in f32, f64, f16 or bf16; targets `[…]` of u8, u32 or i64, a class each, or below 0 for a row that
/// does not count (padding: PyTorch's −100). The loss is computed and returned in f32 (f64 for f64), 0 when no row counts.
/// On the CPU one pass over the logits forward and one backward; no matrix of logarithms or targets exists. Gradients:
/// logits.
///
/// # Errors
/// Shapes that do not match, other dtypes, a target that is no class.
///
/// # Example
/// ```
/// use attn_kernels::nn::cross_entropy;
/// use candle_core::{Device, Tensor};
///
/// let logits = Tensor::new(&[[0f32, 0.0], [100.0, 0.0], [3.0, 7.0]], &Device::Cpu)?;
/// let targets = Tensor::new(&[1i64, 0, -1], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &targets)?.to_scalar::<f32>()?;
/// assert!((loss - 2f32.ln() / 2.0).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let Some((&classes, rows)) = logits.dims().split_last() else {
        candle_core::bail!("cross_entropy: logits without a dimension of classes");
    };
    if rows != targets.dims() {
        candle_core::bail!("cross_entropy: targets {:?} for logits {:?}", targets.dims(), logits.dims());
    }
    if !matches!(logits.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        candle_core::bail!("cross_entropy: logits of {:?}", logits.dtype());
    }
    let logits = logits.reshape((targets.elem_count(), classes))?.to_dtype(accumulator(logits.dtype()))?;
    let chosen = chosen(targets, classes)?;
    let count = chosen.iter().flatten().count();
    if count == 0 {
        return Tensor::zeros((), logits.dtype(), logits.device());
    }
    if logits.device().is_cpu() { on_cpu(&logits, chosen, count) } else { by_operations(&logits, &chosen, count) }
}

/// The class of each row.
fn chosen(targets: &Tensor, classes: usize) -> Result<Vec<Option<usize>>> {
    if !matches!(targets.dtype(), DType::U8 | DType::U32 | DType::I64) {
        candle_core::bail!("cross_entropy: targets of {:?}", targets.dtype());
    }
    let targets = targets.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let class = |(row, target): (usize, i64)| match usize::try_from(target) {
        Err(_) => Ok(None),
        Ok(class) if class < classes => Ok(Some(class)),
        Ok(class) => candle_core::bail!("cross_entropy: target {class} of row {row}, of {classes} classes"),
    };
    targets.into_iter().enumerate().map(class).collect()
}

fn on_cpu(logits: &Tensor, chosen: Vec<Option<usize>>, count: usize) -> Result<Tensor> {
    let rows = logits.detach().contiguous()?;
    let log_sums = rows.apply_op1_no_bwd(&LogSumExp)?;
    let wide = log_sums.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let at = at_targets(&rows, &chosen)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let losses = chosen.iter().zip(&wide).zip(&at).filter(|((class, _), _)| class.is_some());
    let total: f64 = losses.map(|((_, log_sum), at)| log_sum - at).sum();
    let loss = Tensor::new(total / count as f64, logits.device())?.to_dtype(logits.dtype())?;
    with_gradient("cross_entropy", logits, loss, move |d_loss| {
        let factor = d_loss.to_dtype(DType::F64)?.to_scalar::<f64>()? / count as f64;
        rows.apply_op1_no_bwd(&Gradient { log_sums: &wide, chosen: &chosen, factor })
    })
}

fn by_operations(logits: &Tensor, chosen: &[Option<usize>], count: usize) -> Result<Tensor> {
    let counts = chosen.iter().map(|class| if class.is_some() { 1f32 } else { 0.0 }).collect::<Vec<_>>();
    let counts = Tensor::from_vec(counts, (chosen.len(), 1), logits.device())?.to_dtype(logits.dtype())?;
    let logs = at_targets(&candle_nn::ops::log_softmax(logits, D::Minus1)?, chosen)?;
    (logs * counts)?.sum_all()? * (-1.0 / count as f64)
}

/// The number of each row `[rows, 1]` at its class, at any where it has none.
fn at_targets(rows: &Tensor, chosen: &[Option<usize>]) -> Result<Tensor> {
    let places = chosen.iter().map(|class| class.unwrap_or(0) as i64).collect::<Vec<_>>();
    rows.gather(&Tensor::from_vec(places, (chosen.len(), 1), rows.device())?, D::Minus1)
}

/// ln Σ exp of each row.
struct LogSumExp;

impl CustomOp1 for LogSumExp {
    fn name(&self) -> &'static str {
        "log_sum_exp"
    }

    fn cpu_fwd(&self, rows: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (count, width) = layout.shape().dims2()?;
        let sums = by_dtype!(rows, T => elementwise::log_sum_exp(elements::<T>(rows, layout)?, width));
        Ok((sums, Shape::from(count)))
    }
}

/// d_logits
struct Gradient<'a> {
    log_sums: &'a [f64],
    chosen: &'a [Option<usize>],
    factor: f64,
}

impl CustomOp1 for Gradient<'_> {
    fn name(&self) -> &'static str {
        "cross_entropy gradient"
    }

    fn cpu_fwd(&self, rows: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let gradient = by_dtype!(rows, T => {
            let log_sums: Vec<T> = self.log_sums.iter().map(|&sum| sum as T).collect();
            let rows = elements::<T>(rows, layout)?;
            elementwise::loss_gradient(rows, width, &log_sums, self.chosen, self.factor as T)
        });
        Ok((gradient, layout.shape().clone()))
    }
}
