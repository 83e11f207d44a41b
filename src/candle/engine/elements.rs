//! Computations on the elements of contiguous tensors of one dtype, any number of them, on the CPU.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Error, Layout, Result, Shape, Tensor};

use super::backend::{Backend, Cpu};
use super::graph::{Ready, token};
use super::reading::{Readings, read};
use super::tensors::{Buffer, buffer, tensor};
use crate::cpu::elementwise::Element;
use crate::problem::SliceMut;

/// A computation with all that its way back needs.
pub trait Computation: Send + Sync + 'static {
    /// Name of the public function.
    fn name(&self) -> &'static str;

    /// The operands, contiguous, of f32 or f64, on the CPU; at least one.
    fn operands(&self) -> Vec<&Tensor>;

    /// Writes all of the result.
    fn forward<T: Element>(&self, operands: &[&[T]], result: &mut [T]);

    /// Writes all of the gradients, one for each operand.
    fn backward<T: Element>(&self, operands: &[&[T]], result: &[T], d_result: &[T], gradients: Vec<&mut [T]>);
}

/// The result of a computation, behind its operands.
pub fn compute<C: Computation>(computation: C, shape: &[usize]) -> Result<Tensor> {
    let operands = computation.operands();
    let result = filled(&operands, shape.iter().product(), Forward(&computation))?;
    let is_tracked = operands.iter().any(|operand| operand.track_op());
    if !is_tracked || operands.iter().all(|operand| operand.elem_count() == 0) {
        return Ok(tensor(result, shape));
    }
    let token = token(&operands)?;
    token.apply_op1(Join { result: Ready::new(computation.name(), result, shape), computation })
}

/// What is made of elements of either type.
trait Job {
    fn run<T: Element>(self, elements: &[&[T]], room: &mut [T]);
}

/// So many numbers, computed from the elements of tensors.
fn filled(tensors: &[&Tensor], len: usize, job: impl Job) -> Result<Buffer> {
    let dtype = tensors.first().map_or(DType::F32, |first| first.dtype());
    let mut filled = buffer(&Device::Cpu, dtype, len)?;
    let room = Cpu.room(&mut filled)?;
    read(tensors, |readings| match dtype {
        DType::F64 => run::<f64>(tensors, readings, room, job),
        _ => run::<f32>(tensors, readings, room, job),
    })?;
    Ok(filled)
}

fn run<T: Element>(tensors: &[&Tensor], readings: Readings<'_>, room: SliceMut<'_>, job: impl Job) -> Result<()> {
    let of = |tensor: &&Tensor| {
        let all = T::own(readings.view(&Cpu, tensor)?.data()).filter(|_| tensor.is_contiguous());
        all.map(|all| &all[..tensor.elem_count()]).ok_or_else(other_dtype)
    };
    let elements: Vec<&[T]> = tensors.iter().map(of).collect::<Result<_>>()?;
    job.run(&elements, T::elements(room).map_err(|_| other_dtype())?);
    Ok(())
}

fn other_dtype() -> Error {
    Error::msg("operands of several dtypes, or out of order")
}

struct Forward<'c, C>(&'c C);

impl<C: Computation> Job for Forward<'_, C> {
    fn run<T: Element>(self, operands: &[&[T]], result: &mut [T]) {
        self.0.forward(operands, result);
    }
}

/// The way back; behind the operands come the result and its gradient.
struct Backward<'c, C>(&'c C);

impl<C: Computation> Job for Backward<'_, C> {
    fn run<T: Element>(self, elements: &[&[T]], mut room: &mut [T]) {
        let Some((operands, &[result, d_result])) = elements.split_last_chunk() else { return };
        let gradients = operands.iter().map(|operand| {
            let (gradient, rest) = std::mem::take(&mut room).split_at_mut(operand.len());
            room = rest;
            gradient
        });
        let gradients = gradients.collect();
        self.0.backward(operands, result, d_result, gradients);
    }
}

/// The computation on the token of its operands.
struct Join<C> {
    computation: C,
    result: Ready,
}

impl<C: Computation> CustomOp1 for Join<C> {
    fn name(&self) -> &'static str {
        self.computation.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.result.on_cpu()
    }

    fn bwd(&self, token: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let mut tensors = self.computation.operands();
        tensors.extend([result, &gradient]);
        let gradients = filled(&tensors, token.elem_count(), Backward(&self.computation))?;
        Ok(Some(tensor(gradients, token.shape())))
    }
}
