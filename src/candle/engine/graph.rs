//! Results as nodes of candle's graph.
//!
//! A candle operation has at most three inputs. When a fourth one (bias, log-decay or state) is tracked, q and k enter
//! through a token: a tensor of one element, with the shape of both gradients end to end, which hands them on.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Storage, Tensor};

use super::backend::Backend;
use super::tensors::{Buffer, buffer, tensor};

/// The way back of a computation, with everything it needs.
pub trait Node: Send + Sync + 'static {
    /// Name of the public function.
    fn name(&self) -> &'static str;

    /// The inputs that may receive a gradient.
    fn inputs(&self) -> Inputs<'_>;

    /// The gradients of the inputs, given the result and its gradient.
    fn backward(&self, result: &Tensor, gradient: &Tensor) -> Result<Gradients>;

    /// The gradient of v or, where there is one, of the extra input, from that of the result, without any token.
    fn without_tokens(&self, input: &Tensor, _: &Tensor) -> Result<Tensor> {
        zero(input)
    }
}

/// Differentiable inputs of either engine.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    /// Bias, log-decay or state, if tracked.
    pub extra: Option<&'a Tensor>,
}

/// Room for one gradient per input.
pub struct Gradients {
    /// Of q, then of k.
    qk: Buffer,
    v: Buffer,
    extra: Option<Buffer>,
    /// The same where it is made of several.
    pub several: Option<Tensor>,
}

/// Where the gradients go.
pub struct GradientRooms<Room> {
    pub q: Room,
    pub k: Room,
    pub v: Room,
    pub extra: Option<Room>,
}

impl Gradients {
    pub fn new(inputs: Inputs<'_>) -> Result<Self> {
        let Inputs { q, k, v, extra } = inputs;
        let device = q.device();
        Ok(Self {
            qk: buffer(device, q.dtype(), q.elem_count() + k.elem_count())?,
            v: buffer(device, v.dtype(), v.elem_count())?,
            extra: extra.map(|extra| buffer(device, extra.dtype(), extra.elem_count())).transpose()?,
            several: None,
        })
    }

    pub fn rooms<B: Backend>(&mut self, backend: &B, inputs: Inputs<'_>) -> Result<GradientRooms<B::Room<'_>>> {
        let [q, k] = backend.rooms(&mut self.qk, inputs.q.elem_count())?;
        let extra = self.extra.as_mut().map(|extra| backend.room(extra)).transpose()?;
        Ok(GradientRooms { q, k, v: backend.room(&mut self.v)?, extra })
    }
}

/// Puts a result of the given shape into the graph, behind the inputs of `node`.
pub fn attach(node: impl Node, result: Buffer, shape: impl Into<Shape>) -> Result<Tensor> {
    let Inputs { q, k, v, extra } = node.inputs();
    let (q, k, v, extra) = (q.clone(), k.clone(), v.clone(), extra.cloned());
    let join = Join { result: Ready::new(node.name(), result, shape), node };
    match extra {
        None => q.apply_op3(&k, &v, join),
        Some(extra) => q.apply_op2(&k, Token)?.apply_op3(&v, &extra, join),
    }
}

/// The operation on (q, k, v) or (token of q and k, v, extra).
struct Join<N> {
    node: N,
    result: Ready,
}

/// A result that candle has yet to ask for.
pub struct Ready {
    name: &'static str,
    storage: Mutex<Option<Storage>>,
    shape: Shape,
}

impl Ready {
    pub fn new(name: &'static str, result: Buffer, shape: impl Into<Shape>) -> Self {
        Self { name, storage: Mutex::new(Some(result.storage)), shape: shape.into() }
    }

    fn take(&self) -> Result<Storage> {
        let storage = self.storage.lock().unwrap_or_else(PoisonError::into_inner).take();
        storage.ok_or_else(|| Error::msg(format!("{}: asked twice for its result", self.name)))
    }

    pub fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        let Storage::Cpu(result) = self.take()? else { return Err(self.elsewhere()) };
        Ok((result, self.shape.clone()))
    }

    pub fn on_cuda(&self) -> Result<(CudaStorage, Shape)> {
        let Storage::Cuda(result) = self.take()? else { return Err(self.elsewhere()) };
        Ok((result, self.shape.clone()))
    }

    fn elsewhere(&self) -> Error {
        Error::msg(format!("{}: the result is on another device than the inputs", self.name))
    }
}

impl<N: Node> CustomOp3 for Join<N> {
    fn name(&self) -> &'static str {
        self.node.name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.result.on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.result.on_cuda()
    }

    fn bwd(
        &self,
        first: &Tensor,
        second: &Tensor,
        third: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let inputs = self.node.inputs();
        if inputs.q.elem_count() + inputs.k.elem_count() == 0 {
            let tracked = |input: &Tensor, gradient| input.track_op().then_some(gradient);
            let last = self.node.without_tokens(third, gradient)?;
            return Ok((tracked(first, zero(first)?), tracked(second, zero(second)?), tracked(third, last)));
        }
        let Gradients { qk, v, extra, several } = self.node.backward(result, gradient)?;
        let (qk, v) = (tensor(qk, inputs.q.elem_count() + inputs.k.elem_count()), tensor(v, inputs.v.shape()));
        let gradients = match several.or(extra.map(|extra| tensor(extra, third.shape()))) {
            Some(extra) => (qk, v, extra),
            None => {
                let (q, k) = split(&qk, first, second)?;
                (q, k, v)
            }
        };
        let tracked = |input: &Tensor, gradient| input.track_op().then_some(gradient);
        Ok((tracked(first, gradients.0), tracked(second, gradients.1), tracked(third, gradients.2)))
    }
}

/// Inputs of one dtype as one.
pub fn token(inputs: &[&Tensor]) -> Result<Tensor> {
    let (first, others) = inputs.split_first().ok_or_else(|| Error::msg("a token of nothing"))?;
    others.iter().try_fold((*first).clone(), |token, input| token.apply_op2(input, Token))
}

/// Two inputs of one dtype as one.
pub struct Token;

impl CustomOp2 for Token {
    fn name(&self) -> &'static str {
        "token"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, _: &CpuStorage, ly: &Layout) -> Result<(CpuStorage, Shape)> {
        let len = lx.shape().elem_count() + ly.shape().elem_count();
        Ok((x.device().zeros_impl(&Shape::from(1), x.dtype())?, Shape::from(len)))
    }

    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout, _: &CudaStorage, ly: &Layout) -> Result<(CudaStorage, Shape)> {
        let len = lx.shape().elem_count() + ly.shape().elem_count();
        Ok((x.device().zeros_impl(&Shape::from(1), x.dtype())?, Shape::from(len)))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, _: &Tensor, both: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_x, d_y) = split(both, x, y)?;
        Ok((x.track_op().then_some(d_x), y.track_op().then_some(d_y)))
    }
}

/// The gradient of an input where nothing is computed.
pub fn zero(input: &Tensor) -> Result<Tensor> {
    match input.elem_count() {
        0 => Ok(tensor(buffer(input.device(), input.dtype(), 0)?, input.shape())),
        _ => input.zeros_like(),
    }
}

/// Cuts gradients end to end into the shapes of their inputs.
fn split(qk: &Tensor, q: &Tensor, k: &Tensor) -> Result<(Tensor, Tensor)> {
    let (q_len, k_len) = (q.elem_count(), k.elem_count());
    Ok((qk.narrow(0, 0, q_len)?.reshape(q.shape())?, qk.narrow(0, q_len, k_len)?.reshape(k.shape())?))
}
