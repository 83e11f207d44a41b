//! A call of an operation, with every tensor described.

use attn_kernels::problem::DType;

use crate::common::cases::Operation;

/// A tensor that is one number everywhere.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub dims: Vec<usize>,
    pub dtype: DType,
    pub fill: f64,
}

impl Tensor {
    pub fn new(dims: &[usize], dtype: DType, fill: f64) -> Self {
        Self { dims: dims.to_vec(), dtype, fill }
    }
}

/// A call, good unless changed. `None` leaves an optional tensor out.
#[derive(Debug, Clone)]
pub struct Call {
    pub operation: Operation,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// Of the global branch of mixed chunks.
    pub q_lin: Tensor,
    pub k_lin: Tensor,
    pub key_mask: Option<Tensor>,
    pub bias: Option<Tensor>,
    pub log_decay: Option<Tensor>,
    pub attention_bias: Option<Tensor>,
    pub sinks: Option<Tensor>,
    pub omega: Tensor,
    /// S, z.
    pub state: Option<[Tensor; 2]>,
    pub stabilizer: Option<Tensor>,
}

pub const BATCH: usize = 2;
pub const HEADS: usize = 4;
pub const KEY_HEADS: usize = 2;
pub const LENGTH: usize = 6;
pub const WIDTH: usize = 3;
pub const VALUE_WIDTH: usize = 5;
pub const DIRECTIONS: usize = 8;

impl Call {
    pub fn new(operation: Operation) -> Self {
        let float = |dims: &[usize], fill| Tensor::new(dims, DType::F32, fill);
        let (batch, heads, key_heads, n) = (BATCH, HEADS, KEY_HEADS, LENGTH);
        Self {
            operation,
            q: float(&[batch, heads, n, WIDTH], 0.5),
            k: float(&[batch, key_heads, n, WIDTH], 0.5),
            v: float(&[batch, key_heads, n, VALUE_WIDTH], 0.5),
            q_lin: float(&[batch, heads, n, WIDTH + 1], 0.5),
            k_lin: float(&[batch, key_heads, n, WIDTH + 1], 0.5),
            key_mask: None,
            bias: None,
            log_decay: None,
            attention_bias: None,
            sinks: None,
            omega: float(&[DIRECTIONS, WIDTH], 0.5),
            state: None,
            stabilizer: None,
        }
    }
}
