//! What a call needs of a backend: memory for operands and results, and the two engines on it.

use attn_kernels::Result;
use attn_kernels::cpu::{linear, quadratic};
use attn_kernels::problem::{
    Elements, Linear, LinearGradients, LinearInputs, LinearOutputs, LinearSaved, Quadratic, QuadraticGradients,
    QuadraticInputs, QuadraticSaved, Slice, SliceMut, Strided,
};

use super::tensor::{Buffer, Float};

/// A tensor in the memory of a backend.
pub type View<'a, B> = Strided<<B as Backend>::Slice<'a>>;

pub trait Backend: Clone {
    /// Elements of an operand in the backend's memory.
    type Operand<'a>;
    /// Memory for a result.
    type Room;
    type Slice<'a>: Elements;
    type SliceMut<'a>: Elements;

    /// Brings the elements of an operand to the backend's memory.
    ///
    /// # Errors
    /// Those of the device, as of all functions here.
    fn operand<'a>(&self, elements: Slice<'a>) -> Result<Self::Operand<'a>>;

    /// Zeros.
    fn room(&self, float: Float, len: usize) -> Result<Self::Room>;

    /// Brings a result to main memory.
    fn fetch(&self, room: Self::Room) -> Result<Buffer>;

    fn read<'a>(operand: &'a Self::Operand<'_>) -> Self::Slice<'a>;
    fn read_room(room: &Self::Room) -> Self::Slice<'_>;
    fn write(room: &mut Self::Room) -> Self::SliceMut<'_>;

    /// x ← x + y; gives y back if the backend has no means to.
    fn add(&self, x: &mut Self::Room, y: Self::Room) -> Option<Self::Room>;

    fn quadratic_forward(
        &self,
        problem: &Quadratic,
        inputs: &QuadraticInputs<View<'_, Self>>,
        out: Self::SliceMut<'_>,
        statistic: Option<Self::SliceMut<'_>>,
    ) -> Result<()>;

    fn quadratic_backward(
        &self,
        problem: &Quadratic,
        inputs: &QuadraticInputs<View<'_, Self>>,
        saved: &QuadraticSaved<View<'_, Self>>,
        gradients: QuadraticGradients<Self::SliceMut<'_>>,
    ) -> Result<()>;

    fn linear_forward(
        &self,
        problem: &Linear,
        inputs: &LinearInputs<View<'_, Self>>,
        outputs: LinearOutputs<Self::SliceMut<'_>>,
    ) -> Result<()>;

    fn linear_backward(
        &self,
        problem: &Linear,
        inputs: &LinearInputs<View<'_, Self>>,
        saved: &LinearSaved<View<'_, Self>>,
        gradients: LinearGradients<Self::SliceMut<'_>>,
    ) -> Result<()>;
}

/// The CPU backend, which reads operands where they are.
#[derive(Clone, Copy)]
pub struct Cpu;

impl Backend for Cpu {
    type Operand<'a> = Slice<'a>;
    type Room = Buffer;
    type Slice<'a> = Slice<'a>;
    type SliceMut<'a> = SliceMut<'a>;

    fn operand<'a>(&self, elements: Slice<'a>) -> Result<Slice<'a>> {
        Ok(elements)
    }

    fn room(&self, float: Float, len: usize) -> Result<Buffer> {
        Ok(Buffer::zeros(float, len))
    }

    fn fetch(&self, room: Buffer) -> Result<Buffer> {
        Ok(room)
    }

    fn read<'a>(operand: &'a Slice<'_>) -> Slice<'a> {
        *operand
    }

    fn read_room(room: &Buffer) -> Slice<'_> {
        room.slice()
    }

    fn write(room: &mut Buffer) -> SliceMut<'_> {
        room.slice_mut()
    }

    fn add(&self, x: &mut Buffer, y: Buffer) -> Option<Buffer> {
        x.add(&y);
        None
    }

    fn quadratic_forward(
        &self,
        problem: &Quadratic,
        inputs: &quadratic::QuadraticInputs<'_>,
        out: SliceMut<'_>,
        statistic: Option<SliceMut<'_>>,
    ) -> Result<()> {
        quadratic::forward(problem, inputs, out, statistic)
    }

    fn quadratic_backward(
        &self,
        problem: &Quadratic,
        inputs: &quadratic::QuadraticInputs<'_>,
        saved: &quadratic::QuadraticSaved<'_>,
        gradients: quadratic::QuadraticGradients<'_>,
    ) -> Result<()> {
        quadratic::backward(problem, inputs, saved, gradients)
    }

    fn linear_forward(
        &self,
        problem: &Linear,
        inputs: &linear::LinearInputs<'_>,
        outputs: linear::LinearOutputs<'_>,
    ) -> Result<()> {
        linear::forward(problem, inputs, outputs)
    }

    fn linear_backward(
        &self,
        problem: &Linear,
        inputs: &linear::LinearInputs<'_>,
        saved: &linear::LinearSaved<'_>,
        gradients: linear::LinearGradients<'_>,
    ) -> Result<()> {
        linear::backward(problem, inputs, saved, gradients)
    }
}
