//! Storages of the tensors of a call, locked for reading.
//!
//! They are locked as candle locks the inputs of its own operations: a thread may hold a lock several times, and waits
//! for a writer that has it, never for one that waits. With [`Tensor::storage_and_layout`], a second lock on a storage
//! would wait for a writer that waits for the first.

use std::cell::RefCell;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Error, Layout, Result, Shape, Tensor, TensorId};

use super::backend::Backend;

/// A storage for the time of an operation.
#[derive(Clone, Copy)]
pub enum Lent<'a> {
    Cpu(&'a CpuStorage),
    Cuda(&'a CudaStorage),
}

impl Lent<'_> {
    pub fn dtype(self) -> DType {
        match self {
            Self::Cpu(storage) => storage.dtype(),
            Self::Cuda(storage) => storage.dtype(),
        }
    }
}

/// Tensors whose storages are locked.
#[derive(Clone, Copy)]
pub struct Readings<'a>(&'a [Held<'a>]);

#[derive(Clone, Copy)]
struct Held<'a> {
    id: TensorId,
    storage: Lent<'a>,
    layout: &'a Layout,
}

impl<'a> Readings<'a> {
    /// One of the tensors.
    pub fn view<B: Backend>(self, backend: &B, tensor: &Tensor) -> Result<B::View<'a>> {
        let held = self.0.iter().find(|held| held.id == tensor.id());
        let held = held.ok_or_else(|| Error::msg("a tensor is read that is not locked"))?;
        backend.view(held.storage, held.layout)
    }

    /// One that may be absent.
    pub fn optional<B: Backend>(self, backend: &B, tensor: Option<&Tensor>) -> Result<Option<B::View<'a>>> {
        tensor.map(|tensor| self.view(backend, tensor)).transpose()
    }
}

/// Calls `then` while the storages of `tensors` are locked.
pub fn read<T>(tensors: &[&Tensor], then: impl FnOnce(Readings<'_>) -> Result<T>) -> Result<T> {
    let (mut then, mut result) = (Some(then), None);
    hold(tensors, &[], &mut |readings| result = then.take().map(|then| then(readings)));
    result.unwrap_or_else(|| Err(Error::msg("a tensor lies where no engine reads")))
}

/// Locks one tensor after the other, each by an operation inside that on the one before.
fn hold(tensors: &[&Tensor], held: &[Held<'_>], then: &mut dyn FnMut(Readings<'_>)) {
    let Some((tensor, others)) = tensors.split_first() else { return then(Readings(held)) };
    let look = Look(RefCell::new(|storage: Lent<'_>, layout: &Layout| {
        let one = Held { id: tensor.id(), storage, layout };
        hold(others, &[held, &[one]].concat(), then);
    }));
    // It has no result, which candle takes for an error.
    let _ = tensor.apply_op1_no_bwd(&look);
}

/// An operation that looks at its input.
struct Look<F>(RefCell<F>);

impl<F: FnMut(Lent<'_>, &Layout)> Look<F> {
    fn at<T>(&self, storage: Lent<'_>, layout: &Layout) -> Result<(T, Shape)> {
        (self.0.borrow_mut())(storage, layout);
        Err(Error::Msg(String::new()))
    }
}

impl<F: FnMut(Lent<'_>, &Layout)> CustomOp1 for Look<F> {
    fn name(&self) -> &'static str {
        "look"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.at(Lent::Cpu(storage), layout)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.at(Lent::Cuda(storage), layout)
    }
}
