use candle_core::{CpuStorage, CustomOp2, Layout, Module, Result, Shape, Tensor, WithDType};
use candle_nn::{Init, Linear, VarBuilder};

use crate::candle::storage::elements;
use crate::cpu::products::products;
use crate::problem::{Slice, SliceMut};

/// How rows are multiplied by weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Products {
    /// All in one product of candle's: the roundings of a row depend on how many there are.
    Joint,
    /// On the CPU each as if it were alone.
    Alone,
}

/// A linear layer y = x Wᵀ + b on rows `[…, input]`, W `[output, input]`.
#[derive(Debug, Clone)]
pub(super) struct Projection(Linear);

impl Projection {
    /// Of the weights `weight` `[output, input]` and maybe `bias`. Fresh ones keep the variance of rows: N(0, 1/input), and
    /// 0.
    pub fn new(input: usize, output: usize, bias: bool, weights: VarBuilder) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 1.0 / (input as f64).sqrt() };
        let weight = weights.get_with_hints((output, input), "weight", init)?;
        let bias = if bias { Some(weights.get_with_hints(output, "bias", Init::Const(0.0))?) } else { None };
        Ok(Self(Linear::new(weight, bias)))
    }

    /// With a bias that begins so.
    pub fn with_bias(input: usize, output: usize, bias: Init, weights: VarBuilder) -> Result<Self> {
        let bias = weights.get_with_hints(output, "bias", bias)?;
        let Self(linear) = Self::new(input, output, false, weights)?;
        Ok(Self(Linear::new(linear.weight().clone(), Some(bias))))
    }

    /// Of some of the rows of the weights.
    pub fn part(&self, first: usize, count: usize) -> Result<Self> {
        let of = |tensor: &Tensor| tensor.narrow(0, first, count);
        Ok(Self(Linear::new(of(self.0.weight())?, self.0.bias().map(of).transpose()?)))
    }

    /// Of a matrix without bias.
    pub fn of(weight: Tensor) -> Self {
        Self(Linear::new(weight, None))
    }

    /// `[output, input]`
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// Gradients: x, weight and bias.
    pub fn forward(&self, x: &Tensor, products: Products) -> Result<Tensor> {
        if products == Products::Joint || !x.device().is_cpu() {
            return self.0.forward(x);
        }
        if x.elem_count() == 0 {
            let outer = &x.dims()[..x.rank().saturating_sub(1)];
            return Tensor::zeros([outer, &[self.0.weight().dim(0)?]].concat(), x.dtype(), x.device());
        }
        let y = x.contiguous()?.apply_op2(&self.0.weight().contiguous()?, RowByRow)?;
        self.0.bias().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
    }
}

/// x Wᵀ by [`products`].
struct RowByRow;

impl CustomOp2 for RowByRow {
    fn name(&self) -> &'static str {
        "projection"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (output, input) = w_layout.shape().dims2()?;
        let Some((&width, outer)) = x_layout.dims().split_last().filter(|(width, _)| **width == input) else {
            candle_core::bail!("projection of rows {:?} by weights {:?}", x_layout.shape(), w_layout.shape())
        };
        let shape = Shape::from([outer, &[output]].concat());
        let count = shape.elem_count();
        let y = match x {
            CpuStorage::F16(_) => compute::<half::f16>([(x, x_layout), (w, w_layout)], width, count),
            CpuStorage::BF16(_) => compute::<half::bf16>([(x, x_layout), (w, w_layout)], width, count),
            CpuStorage::F64(_) => compute::<f64>([(x, x_layout), (w, w_layout)], width, count),
            _ => compute::<f32>([(x, x_layout), (w, w_layout)], width, count),
        }?;
        Ok((y, shape))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, d_y: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let rows = |x: &Tensor| x.flatten_to(x.rank() - 2)?.contiguous();
        let d_y = rows(d_y)?;
        Ok((Some(d_y.matmul(w)?.reshape(x.shape())?), Some(d_y.t()?.matmul(&rows(x)?)?)))
    }
}

/// `count` products of elements of type X.
fn compute<X: WithDType>([x, weights]: [(&CpuStorage, &Layout); 2], width: usize, count: usize) -> Result<CpuStorage>
where
    for<'a> Slice<'a>: From<&'a [X]>,
    for<'a> SliceMut<'a>: From<&'a mut [X]>,
{
    let mut y = vec![X::zero(); count];
    products(elements::<X>(x.0, x.1)?.into(), elements::<X>(weights.0, weights.1)?.into(), width, (&mut y[..]).into());
    Ok(X::to_cpu_storage_owned(y))
}
